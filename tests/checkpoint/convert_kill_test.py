"""A conversion that is killed continues, and comes to the same."""

import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlm.checkpoint import convert
from rlm.checkpoint.load import load_checkpoint
from tests.checkpoint.convert_test import publish
from tests.parity import cases

ROOT = pathlib.Path(__file__).resolve().parents[2]

_KILL = """
import os, signal, sys
import numpy as np
import orbax.checkpoint as ocp
from rlm.checkpoint import convert

convert._MARK_BYTES = 0

def kill():
  os.kill(os.getpid(), signal.SIGKILL)
"""
_RUN = "convert.import_published(*sys.argv[1:])"
# After so many marks; each says how much of a leaf is whole.
_AFTER_MARKS = """
done = []

def report(*_):
  done.append(1)
  if len(done) == {marks}:
    kill()

convert.import_published(*sys.argv[1:], on_read=report)
"""
# Of the third tensor half the rows have reached the leaf's file.
_IN_A_LEAF = """
class Torn(np.memmap):
  written = 0

  def __setitem__(self, place, part):
    Torn.written += 1
    if Torn.written < 3:
      return super().__setitem__(place, part)
    half = len(part) // 2
    np.asarray(self)[place][:half] = part[:half]
    self.flush()
    kill()

open_leaf = convert._open_leaf
convert._open_leaf = lambda *args: open_leaf(*args).view(Torn)
"""
# Orbax's own folder is there, without the arrays or with all of them.
_BEFORE_THE_ARRAYS = """
ocp.CompositeCheckpointHandler.async_save = lambda *args, **kwargs: kill()
"""
_BEFORE_THE_COMMIT = """
ocp.CompositeCheckpointHandler.finalize = lambda *args, **kwargs: kill()
"""


def convert_until_killed(fault, *paths):
  done = subprocess.run(
    [sys.executable, "-c", _KILL + fault + _RUN, *map(str, paths)],
    cwd=ROOT,
    timeout=120,
  )
  assert done.returncode == -signal.SIGKILL


def convert_and_count(monkeypatch, source, ours):
  """Tensors that a conversion read."""
  read = []
  original = convert.PublishedWeights.read

  def counted(self, name, index=()):
    read.append(name)
    return original(self, name, index)

  with monkeypatch.context() as patched:
    patched.setattr(convert.PublishedWeights, "read", counted)
    convert.import_published(source, ours)
  return len(read)


def assert_whole(source, ours):
  assert not (ours / ".converting").exists()
  assert [path.name for path in (ours / "checkpoints").iterdir()] == ["0"]
  (_, a), (_, b) = load_checkpoint(ours), load_checkpoint(source)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("marks", [1, pytest.param(40, marks=pytest.mark.full)])
def test_a_kill_after_a_mark(tmp_path, marks, monkeypatch):
  source, ours = tmp_path / "in", tmp_path / "ours"
  stored = publish(source, cases.CONFIGS["deepseek_v3"])
  convert_until_killed(_AFTER_MARKS.format(marks=marks), source, ours)
  assert list((ours / ".converting").glob("*.done"))
  read = convert_and_count(monkeypatch, source, ours)
  assert read == len(stored) - marks
  assert_whole(source, ours)
  assert convert_and_count(monkeypatch, source, ours) == 0  # finished


def test_a_kill_in_the_middle_of_a_leaf_s_file(tmp_path, monkeypatch):
  source, ours = tmp_path / "in", tmp_path / "ours"
  stored = publish(source, cases.CONFIGS["qwen2"])
  convert_until_killed(_IN_A_LEAF, source, ours)
  stage = ours / ".converting"
  marks = [int(path.read_text()) for path in stage.glob("*.done")]
  assert sum(marks) == 2  # whole tensors; not the third
  torn = max(stage.glob("*.bin"), key=lambda path: path.stat().st_mtime_ns)
  held = np.fromfile(torn, np.float32)
  assert 0 < np.count_nonzero(held) < held.size
  assert convert_and_count(monkeypatch, source, ours) == len(stored) - 2
  assert_whole(source, ours)


@pytest.mark.parametrize(
  "fault",
  [
    pytest.param(_BEFORE_THE_ARRAYS, marks=pytest.mark.full),
    _BEFORE_THE_COMMIT,
  ],
  ids=["before the arrays", "before the commit"],
)
def test_a_kill_while_orbax_saves(tmp_path, monkeypatch, fault):
  source, ours = tmp_path / "in", tmp_path / "ours"
  publish(source, cases.CONFIGS["qwen2"])
  convert_until_killed(fault, source, ours)
  aside = list((ours / "checkpoints").iterdir())
  # Orbax makes the folder in the background, beside the arrays.
  assert len(aside) == 1 or (not aside and fault == _BEFORE_THE_ARRAYS)
  for path in aside:
    assert path.name.startswith(".aside-new.orbax-checkpoint-tmp")
    assert any(path.rglob("*.ocdbt")) == (fault == _BEFORE_THE_COMMIT)
  with pytest.raises(ValueError, match="no checkpoint; found: none"):
    load_checkpoint(ours)
  assert convert_and_count(monkeypatch, source, ours) == 0  # all was gathered
  assert_whole(source, ours)
