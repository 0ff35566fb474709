"""A recipe that is killed anywhere ends as the one that never was."""

import json
import os
import pathlib
import random
import re
import shutil
import subprocess

import numpy as np
import pytest

from rlm.checkpoint.manager import restore_part
from rlm.files import read_json
from rlm.jsonl import read_jsonl

# A clock writes these; `init_from` and such name the folder.
CLOCKS = ("seconds", "seconds_total", "ledger")


def without_clocks(value):
  if isinstance(value, dict):
    return {k: without_clocks(v) for k, v in value.items() if k not in CLOCKS}
  return (
    [without_clocks(v) for v in value] if isinstance(value, list) else value
  )


def flat(tree, prefix=""):
  if isinstance(tree, dict):
    return {
      k: v for n in tree for k, v in flat(tree[n], f"{prefix}/{n}").items()
    }
  if isinstance(tree, list):
    return flat(dict(enumerate(tree)), prefix)
  return {prefix: tree}


def results(root):
  """Everything of a finished recipe that must not depend on kills."""
  found = {}
  for path in sorted(root.rglob("*")):
    name = str(path.relative_to(root))
    if name.startswith("compilation_cache") or ".torn/" in name:
      continue
    if path.name == "summary.json":
      found[name] = without_clocks(read_json(path))
    elif path.name == "timing.jsonl":
      found[name] = [record["step"] for record in read_jsonl(path)]
    elif path.suffix == ".jsonl":
      found[name] = path.read_bytes()
    elif path.name == "checkpoints":
      for part in ("variables", "opt_state"):
        for leaf, array in flat(restore_part(path, part)).items():
          if array is not None:
            found[f"{name}/{part}{leaf}"] = np.asarray(array).tobytes()
      found[f"{name}/steps"] = sorted(
        p.name for p in path.iterdir() if p.name.isdecimal()
      )
  return found


def check_same(root, whole):
  """Compares by file, so that a failure says where."""
  ours, theirs = results(root), results(whole)
  assert ours.keys() == theirs.keys()
  different = [name for name in ours if ours[name] != theirs[name]]
  assert not different, different


@pytest.fixture(scope="module")
def expected(whole):
  """The results of the recipe that nothing disturbed; that they are many."""
  root, _ = whole
  found = results(root)
  for name in (
    *("summary.json", "evaluate/rl/summary.json", "rl/traces/rl.jsonl"),
    *("rejection/messages.jsonl", "pretrain/metrics.jsonl"),
    "distill/checkpoints/variables/params/head",
  ):
    assert name in found
  return root


def codes(done):
  """The exit code of each process."""
  return [
    int(n) for n in re.findall(r" ended with code (-?\d+)\n", done.stdout)
  ]


def output_of(done, fault):
  """What the process with this fault printed."""
  before = done.stdout.split(f"{fault} ended with code")[0]
  return re.split(r" ended with code -?\d+\n", before)[-1]


@pytest.mark.full
def test_kills_stops_and_a_torn_checkpoint_change_nothing(recipes, expected):
  faults = (
    "kill@push:pretrain#90",  # 10 steps after a save
    "tear@push:rl#6",  # saved after 2 and 4 steps
    "term@generate:rejection#2",
    "kill@line:evaluate/sft/traces/sft.jsonl#2",
    "kill@rename:student_pretrain/summary.json#1",
    "none",
  )
  done = recipes.start("killed", *faults)
  assert codes(done) == [-9, -9, 0, -9, -9, 0], done.stdout + done.stderr
  stopped = output_of(done, faults[2])
  assert "rejection stopped after step 2 and is saved. The same" in stopped
  assert "Traceback" not in done.stderr
  warned = [line for line in done.stderr.splitlines() if "Warning: " in line]
  assert len(warned) == 1
  assert re.search(
    r"checkpoint 4 in .*/rl/checkpoints is torn or corrupt \(.* bytes instead"
    r" of \d+\); falling back to the one of step 2",
    warned[0],
  )
  assert (recipes.folder / "killed/rl/checkpoints/4.torn").is_dir()
  check_same(recipes.folder / "killed", expected)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_seeded_points_change_nothing(recipes, expected, whole, seed):
  _, done = whole
  events = int(re.search(r"^(\d+) events$", done.stdout, re.MULTILINE)[1])
  rng = random.Random(seed)
  # Each process gets on by a fifth on average; saves are closer than that.
  faults = [f"kill@*#{rng.randint(1, 2 * events // 5)}" for _ in range(7)]
  done = recipes.start(f"fuzz{seed}", *faults, "none")
  assert set(codes(done)) <= {0, -9} and codes(done)[-1] == 0, done.stderr
  assert codes(done).count(-9) >= 3
  assert "Traceback" not in done.stderr and "Warning" not in done.stderr
  check_same(recipes.folder / f"fuzz{seed}", expected)


def rewind(whole, folder, *stages):
  """A copy of the finished recipe as it was before its last stages began."""
  shutil.copytree(whole, folder)
  for name in ("summary.json", "report.html"):
    (folder / name).unlink()
  seconds = read_json(folder / "seconds.json")
  for stage in stages:
    shutil.rmtree(folder / stage)
    shutil.rmtree(folder / "evaluate" / stage)
    del seconds[stage]
  (folder / "seconds.json").write_text(json.dumps(seconds))


@pytest.mark.full
def test_kills_and_a_stop_late_in_the_recipe_change_nothing(recipes, expected):
  folder = recipes.folder / "late"
  rewind(expected, folder, "student_pretrain", "distill")
  faults = (
    "kill@rename:student_pretrain/summary.json#1",
    "term@push:distill#3",
    "kill@line:evaluate/distill/traces/distill.jsonl#2",
    "none",
  )
  done = recipes.start("late", *faults)
  assert codes(done) == [-9, 0, -9, 0], done.stdout + done.stderr
  stopped = output_of(done, faults[1])
  assert "distill stopped after step 3 and is saved. The same" in stopped
  assert "Traceback" not in done.stderr and "Warning" not in done.stderr
  check_same(folder, expected)


@pytest.mark.full
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(
  recipes, expected, tmp_path
):
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = f"mount -t tmpfs -o size=64m tmpfs {disk}"
  namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
  if not shutil.which("unshare") or (
    subprocess.run([*namespace, mounted], capture_output=True).returncode
  ):
    pytest.skip("a small disk of its own needs user namespaces")
  rewind(expected, tmp_path / "before", "distill")
  faults = (
    "fill@fsync:distill/metrics.jsonl#1",
    "fill@generate:evaluate/distill#1",
    "none",
  )
  done = recipes.start(
    str(disk),
    *faults,
    prefix=[
      *namespace,
      f"{mounted} && cp -r {tmp_path}/before/. {disk} && code=0;"
      f' "$@" || code=$?; cp -r {disk} {tmp_path}/after; exit $code',
      "sh",
    ],
  )
  assert codes(done) == [1, 1, 0], done.stdout + done.stderr
  assert (
    done.stderr.count("error: no space left on the disk while writing") == 2
  )
  assert done.stderr.count("run the same command again: it continues") == 2
  # Orbax logs what its threads met, with their traces; ours ends in a message.
  assert "experiments/launch.py" not in done.stderr
  check_same(tmp_path / "after", expected)


@pytest.mark.full
def test_a_torn_compiled_program_is_compiled_again(recipes, expected, tmp_path):
  folder = recipes.folder / "torn_cache"
  rewind(expected, folder, "distill")
  # Torn where it is: its path is part of what jax looks a program up by.
  cache = pathlib.Path(recipes.env["JAX_COMPILATION_CACHE_DIR"])
  shutil.copytree(cache, tmp_path / "whole_cache")
  try:
    for path in cache.iterdir():
      os.truncate(path, path.stat().st_size // 2)
    done = recipes.start("torn_cache", "none")
  finally:
    shutil.rmtree(cache)
    shutil.copytree(tmp_path / "whole_cache", cache)
  assert codes(done) == [0], done.stderr
  assert "Error reading persistent compilation cache entry" in done.stderr
  check_same(folder, expected)
