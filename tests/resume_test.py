"""Runs that are killed anywhere end as the run that never was.

Each case starts tests/resume_loop.py as a user would, lets it kill itself with
SIGKILL, and gives the same command again.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from rlm.checkpoint.manager import restore_part
from rlm.jsonl import read_jsonl

LOOP = pathlib.Path(__file__).with_name("resume_loop.py")
ROOT = LOOP.parents[1]
CONFIG = """
import ml_collections

def get_config():
  c = ml_collections.ConfigDict()
  c.seed, c.steps, c.save_every_steps, c.on_nonfinite = 0, 14, 3, "stop"
  return c
"""


class Runs:
  """Starts the loop, with a fault, in folders beside one config."""

  def __init__(self, folder):
    self.folder = folder
    (folder / "tiny.py").write_text(CONFIG)

  def start(self, name, fault="none:0", *flags):
    return subprocess.run(
      [
        sys.executable,
        str(LOOP),
        f"--config={self.folder / 'tiny.py'}",
        f"--workdir={self.folder / name}",
        *flags,
      ],
      env={**os.environ, "FAULT": fault, "PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      timeout=120,
    )

  def results(self, name):
    """Everything of a finished run that must not depend on kills."""
    folder = self.folder / name
    timing = read_jsonl(folder / "timing.jsonl")
    return {
      "metrics": (folder / "metrics.jsonl").read_bytes(),
      "summary": (folder / "summary.json").read_bytes(),
      "weights": np.asarray(
        restore_part(folder / "checkpoints", "w")
      ).tobytes(),
      "timed_steps": [record["step"] for record in timing],
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  runs = Runs(tmp_path_factory.mktemp("runs"))
  done = runs.start("whole")
  assert done.returncode == 0, done.stderr
  assert len(read_jsonl(runs.folder / "whole" / "metrics.jsonl")) == 14
  return runs


def test_kills_and_stops_in_turn_change_nothing(runs):
  done = runs.start("killed", "term:2")
  assert done.returncode == 0, done.stderr
  assert "tiny stopped after step 2 and is saved" in done.stdout
  assert "The same command continues it" in done.stdout
  steps = read_jsonl(runs.folder / "killed" / "metrics.jsonl")
  assert [record["step"] for record in steps] == [0, 1]
  # In a flush, in Orbax's commit, between flush and save, in pruning.
  for fault in ("line:4", "rename:3", "save:2", "prune:1"):
    done = runs.start("killed", fault)
    assert done.returncode == -signal.SIGKILL, (fault, done.stderr)
    assert "Warning" not in done.stderr, done.stderr
  done = runs.start("killed")
  assert done.returncode == 0, done.stderr
  assert runs.results("killed") == runs.results("whole")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(8))
def test_kills_at_seeded_points_change_nothing(runs, seed):
  rng = random.Random(seed)
  last = {"line": 10, "io": 60, "rename": 8, "save": 2, "prune": 1, "step": 5}
  kinds = ["io", "io", "rename", rng.choice(["line", "save", "step", "prune"])]
  rng.shuffle(kinds)
  faults = [f"{kind}:{rng.randint(1, last[kind])}" for kind in kinds]
  # A process that ends before its fault comes is one kill less.
  for fault in faults:
    done = runs.start(f"fuzz{seed}", fault)
    assert done.returncode in (0, -signal.SIGKILL), (fault, done.stderr)
  done = runs.start(f"fuzz{seed}")
  assert done.returncode == 0, done.stderr
  assert runs.results(f"fuzz{seed}") == runs.results("whole")


def test_a_finished_run_and_another_config_start_nothing(runs):
  before = runs.results("whole")
  done = runs.start("whole")
  assert done.returncode == 0 and "is finished" in done.stdout
  done = runs.start("whole", "none:0", "--config.seed=1")
  assert done.returncode == 2
  assert "run of another config" in done.stderr
  assert "seed: 0 -> 1" in done.stderr and "Traceback" not in done.stderr
  assert runs.results("whole") == before


def test_a_nonfinite_loss_stops_with_its_batch_and_never_saves(runs):
  done = runs.start("nan", "nan:5")
  assert done.returncode == 1
  assert "error: step 4: loss = nan" in done.stderr
  folder = runs.folder / "nan"
  with np.load(folder / "nonfinite_step_000004.npz") as batch:
    assert batch["step"] == 4
  assert {path.name for path in (folder / "checkpoints").iterdir()} == {"3"}
  assert not (folder / "summary.json").exists()
