"""A learning rate that no training survives: it stops, or skips, by config."""

import pathlib

import numpy as np
import pytest
import rich.console

from experiments import pretrain, r1
from rlm.config import build, plain
from rlm.jsonl import read_jsonl
from rlm.metrics import NonFiniteError
from rlm.optim.config import ScheduleConfig
from rlm.optim.schedule import make_schedule
from tests.experiments import shrunk_laptop


def config(**changes):
  """Four steps of the small student's pretraining."""
  recipe = build(r1.Config, plain(shrunk_laptop.get_config()))
  name = "student_pretrain"
  _, c = r1.stage_config(recipe, name, pathlib.Path("unused"))
  schedule = dict(c["schedule"], peak=1e30)
  optimizer = dict(c["optimizer"], muon=None)  # compiles faster
  c |= dict(
    schedule=schedule, optimizer=optimizer, steps=4, checkpoint_every_steps=1
  )
  return c | changes


def run(c, folder):
  return pretrain.run(c, folder, console=rich.console.Console(quiet=True))


def test_it_stops_and_saves_the_batch(tmp_path):
  with pytest.raises(
    NonFiniteError, match=r"step 1: .*nan.*on_nonfinite='skip' would go on.*"
  ) as caught:
    run(config(), tmp_path)
  batch = tmp_path / "nonfinite_step_000001.npz"
  assert str(batch) in str(caught.value)
  with np.load(batch) as saved:
    assert saved["tokens"].shape == (2, 8, 48)  # its microbatches
    assert saved["loss_mask"].any()
  assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [0]
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"1"}
  assert not (tmp_path / "summary.json").exists()
  # As the error says, skipping goes on from there.
  assert run(config(on_nonfinite="skip"), tmp_path)["steps"] == 4


def test_it_skips_and_ends(tmp_path):
  summary = run(config(on_nonfinite="skip"), tmp_path)
  records = read_jsonl(tmp_path / "metrics.jsonl")
  assert [r["nonfinite"] for r in records] == [0, 1, 1, 1]
  # Skipped steps count: the rate goes on along its schedule.
  rate = make_schedule(build(ScheduleConfig, dict(config()["schedule"])))
  assert [r["learning_rate"] for r in records] == [rate(i) for i in range(4)]
  assert records[0]["loss"] > 0 and records[1]["loss"] is None
  assert summary["steps"] == 4 and summary["loss"] is None
  assert not list(tmp_path.glob("nonfinite_*"))
