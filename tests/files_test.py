"""Atomic files, JSON forms, and how a full disk is told."""

import errno
import os

import jax.numpy as jnp
import numpy as np
import pytest

from rlm import files


def test_json_round_trip_keeps_every_digit(tmp_path):
  x = np.float32(0.1)
  data = {
    "python": 0.1,
    "float32": x,
    "bfloat16": jnp.asarray(1.5, jnp.bfloat16),
    "array": jnp.arange(4).reshape(2, 2),
    "nested": [(1, True), None, {"a": np.int64(3)}],
    "path": tmp_path,
    4: "key",
  }
  files.write_json(tmp_path / "x.json", data)
  back = files.read_json(tmp_path / "x.json")
  assert back["python"] == 0.1 and np.float32(back["float32"]) == x
  assert back["bfloat16"] == 1.5 and back["array"] == [[0, 1], [2, 3]]
  assert back["nested"] == [[1, True], None, {"a": 3}]
  assert back["path"] == str(tmp_path) and back["4"] == "key"


def test_nan_and_infinity_become_null(tmp_path):
  data = {"a": float("nan"), "b": np.float32("inf"), "c": jnp.array([jnp.nan])}
  files.write_json(tmp_path / "x.json", data)
  assert files.read_json(tmp_path / "x.json") == {
    "a": None,
    "b": None,
    "c": [None],
  }


def test_what_json_cannot_hold_is_a_type_error():
  with pytest.raises(TypeError, match=r"set has no JSON form"):
    files.to_json({"a": {1}})


def test_broken_json_names_its_file(tmp_path):
  (tmp_path / "x.json").write_text('{"a": ')
  with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
    files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, step):
  path = tmp_path / "x.json"
  files.write_json(path, {"old": 1})

  def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  where = "builtins" if step == "open" else "os"
  monkeypatch.setattr(f"{where}.{step}", fail)
  with pytest.raises(
    files.DiskFullError, match=r"no space left .*x\.json.*same command again"
  ):
    files.write_json(path, {"new": 2})
  monkeypatch.undo()
  assert files.read_json(path) == {"old": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    ValueError("RESOURCE_EXHAUSTED: writing x: No space left on device"),
  ],
)
def test_every_form_of_a_full_disk_is_recognised(error):
  with (
    pytest.raises(files.DiskFullError, match="while writing out"),
    files.clear_disk_errors("out"),
  ):
    raise error


def test_other_errors_pass_unchanged():
  with pytest.raises(ValueError, match="^other$"), files.clear_disk_errors("x"):
    raise ValueError("other")
  with pytest.raises(PermissionError), files.clear_disk_errors("x"):
    raise PermissionError(errno.EACCES, "no")


def test_free_space_is_checked_for_folders_to_come(tmp_path):
  files.require_free_space(tmp_path / "a" / "b", 1, "checkpoints")
  with pytest.raises(
    files.DiskFullError, match=r"checkpoints need [\d,]+ MB and .* MB free"
  ):
    files.require_free_space(tmp_path / "a" / "b", 10**18, "checkpoints")
