"""What is written is what the library reads, and is whole or absent."""

import errno
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from rlm import files
from rlm.checkpoint.tensor_files import DTYPES, open_tensors
from rlm.checkpoint.tensor_writer import TensorWriter

INDEX = "model.safetensors.index.json"


def make_tensors():
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.integers(0, 2, (3, 5)).astype(dtype)
    for name, dtype in DTYPES.items()
  }
  tensors["scalar"] = np.array(2.5, ml_dtypes.bfloat16)
  tensors["empty"] = np.zeros((0, 4), np.float32)
  tensors["transposed"] = np.arange(12, dtype=np.float32).reshape(3, 4).T
  return tensors


def plan_of(tensors):
  return [(name, x.dtype, x.shape) for name, x in tensors.items()]


def write(folder, tensors, max_shard_bytes=10**9, **kwargs):
  plan = plan_of(tensors)
  with TensorWriter(
    folder, plan, max_shard_bytes=max_shard_bytes, **kwargs
  ) as writer:
    for name, tensor in reversed(tensors.items()):  # any order will do
      writer.write(name, tensor)


def listed(folder):
  return sorted(path.name for path in folder.iterdir())


def assert_same(a, b):
  assert a.dtype == b.dtype and a.shape == b.shape
  assert a.tobytes() == b.tobytes()


def test_one_shard_has_no_index(tmp_path):
  folder = tmp_path / "made" / "here"
  tensors = make_tensors()
  write(folder, tensors)
  assert listed(folder) == ["model.safetensors"]
  opened = open_tensors(folder)
  assert sorted(opened.names()) == sorted(tensors)
  for name, tensor in tensors.items():
    assert_same(opened.read(name), tensor)


def test_the_library_reads_every_dtype(tmp_path):
  tensors = make_tensors()
  write(tmp_path, tensors)
  path = tmp_path / "model.safetensors"
  raw = dict(safetensors.deserialize(path.read_bytes()))
  assert raw.keys() == tensors.keys()
  for name, tensor in tensors.items():
    assert DTYPES[raw[name]["dtype"]] == tensor.dtype
    assert tuple(raw[name]["shape"]) == tensor.shape
    assert bytes(raw[name]["data"]) == tensor.tobytes()
  with safetensors.safe_open(path, "numpy") as opened:
    assert opened.metadata() == {"format": "pt"}
    for name, tensor in tensors.items():
      if not name.startswith("F8"):  # numpy has no name for these
        assert_same(opened.get_tensor(name), tensor)


def test_shards_by_hand(tmp_path):
  tensors = {
    "a": np.arange(4, dtype=np.float32),  # 16 bytes
    "b": np.arange(3, dtype=np.int8),  # 3, still in the first shard of 20
    "c": np.arange(2, dtype=np.int16),  # 4, in a new one
    "big": np.arange(100, dtype=np.float64),  # its own
    "d": np.arange(1, dtype=np.float32),
  }
  write(tmp_path, tensors, 20, metadata={"format": "pt", "by": "é"})
  shards = {
    "model-00001-of-00004.safetensors": ["a", "b"],
    "model-00002-of-00004.safetensors": ["c"],
    "model-00003-of-00004.safetensors": ["big"],
    "model-00004-of-00004.safetensors": ["d"],
  }
  assert listed(tmp_path) == [*shards, INDEX]
  index = json.loads((tmp_path / INDEX).read_text())
  assert index == {
    "metadata": {"total_size": 16 + 3 + 4 + 800 + 4},
    "weight_map": {n: shard for shard, held in shards.items() for n in held},
  }
  opened = open_tensors(tmp_path)
  for shard, held in shards.items():
    found = safetensors.numpy.load_file(tmp_path / shard)
    assert sorted(found) == held
    for name in held:
      assert_same(found[name], tensors[name])
      assert_same(opened.read(name), tensors[name])
  with safetensors.safe_open(tmp_path / next(iter(shards)), "numpy") as first:
    assert first.metadata() == {"format": "pt", "by": "é"}


def test_every_tensor_begins_at_a_multiple_of_its_item(tmp_path):
  tensors = {
    "odd": np.ones(3, np.int8),
    "half": np.ones(5, ml_dtypes.bfloat16),
    "single": np.ones(1, np.float32),
    "other": np.ones(1, np.float32),
  }
  write(tmp_path, tensors, metadata={})
  raw = (tmp_path / "model.safetensors").read_bytes()
  (length,) = struct.unpack("<Q", raw[:8])
  assert length % 8 == 0
  header = json.loads(raw[8 : 8 + length])
  assert list(header) == ["single", "other", "half", "odd"]
  assert [header[name]["data_offsets"] for name in header] == [
    [0, 4],
    [4, 8],
    [8, 18],
    [18, 21],
  ]


def test_unwritten_tensors_are_named_and_nothing_is_left(tmp_path):
  tensors = {name: np.ones(2) for name in "abc"}
  with pytest.raises(ValueError, match=r"2 of 3 planned .* written: 'a', 'c'"):
    with TensorWriter(tmp_path, plan_of(tensors), max_shard_bytes=16) as writer:
      writer.write("b", tensors["b"])
  assert listed(tmp_path) == []


def test_an_exception_leaves_nothing(tmp_path):
  tensors = {name: np.ones(2) for name in "ab"}
  with pytest.raises(KeyboardInterrupt):
    with TensorWriter(tmp_path, plan_of(tensors), max_shard_bytes=16) as writer:
      for name, tensor in tensors.items():
        writer.write(name, tensor)
      assert listed(tmp_path) == [
        "model-00001-of-00002.safetensors.partial",
        "model-00002-of-00002.safetensors.partial",
      ]
      raise KeyboardInterrupt
  assert listed(tmp_path) == []
  with pytest.raises(ValueError, match="is not being written: use `with`"):
    writer.write("a", tensors["a"])


def test_a_killed_export_starts_anew(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  killed = {name: np.ones(50) for name in "abc"}
  writer = TensorWriter(tmp_path, plan_of(killed), max_shard_bytes=1)
  writer.__enter__()
  writer.write("a", killed["a"])
  assert len(listed(tmp_path)) == 4
  tensors = {name: np.full(3, 2.0) for name in "xy"}
  write(tmp_path, tensors, 1)
  assert listed(tmp_path) == [
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    INDEX,
  ]
  assert_same(open_tensors(tmp_path).read("y"), tensors["y"])


def test_finished_weights_are_not_overwritten(tmp_path):
  tensors = {"a": np.ones(2)}
  write(tmp_path, tensors)
  before = (tmp_path / "model.safetensors").read_bytes()
  with pytest.raises(ValueError, match=r"already holds model.safetensors. Ch"):
    write(tmp_path, {"b": np.zeros(2)})
  (tmp_path / "model.safetensors").unlink()
  (tmp_path / INDEX).write_text("{}")
  with pytest.raises(ValueError, match=r"already holds .*index.json"):
    write(tmp_path, tensors)
  (tmp_path / INDEX).unlink()
  # Another export finishes in the meantime.
  with pytest.raises(ValueError, match="already holds"):
    with TensorWriter(tmp_path, plan_of(tensors), max_shard_bytes=9) as writer:
      writer.write("a", tensors["a"])
      (tmp_path / "model.safetensors").write_bytes(before)
  assert listed(tmp_path) == ["model.safetensors"]
  assert (tmp_path / "model.safetensors").read_bytes() == before


def test_wrong_tensors_are_told(tmp_path):
  plan = [("a", ml_dtypes.bfloat16, (2, 3))]
  with pytest.raises(ValueError, match="never written"):
    with TensorWriter(tmp_path, plan, max_shard_bytes=100) as writer:
      with pytest.raises(ValueError, match=r"'a' is float32 \[2, 3\]; planned"):
        writer.write("a", np.zeros((2, 3), np.float32))
      with pytest.raises(ValueError, match=r"was bfloat16 \[2, 3\]. Convert"):
        writer.write("a", np.zeros((3, 2), ml_dtypes.bfloat16))
      with pytest.raises(ValueError, match="'b' was not planned"):
        writer.write("b", np.zeros(1))
  with pytest.raises(ValueError, match="'a' was already written"):
    with TensorWriter(tmp_path, plan, max_shard_bytes=100) as writer:
      for _ in range(2):
        writer.write("a", np.zeros((2, 3), ml_dtypes.bfloat16))
  assert listed(tmp_path) == []


@pytest.mark.parametrize(
  ("plan", "message"),
  [
    ([], "no tensors are planned"),
    ([("a", "f4", (1,)), ("a", "f4", (1,))], "'a' is planned twice"),
    ([("__metadata__", "f4", (1,))], "safetensors' own name"),
    ([("a", "c8", (1,))], "'a' is complex64, which is not written.*bfloat16"),
    ([("a", ml_dtypes.int4, (1,))], "'a' is int4, which is not written"),
    ([("a", ">f4", (1,))], "'a' is >f4, which is not written"),
  ],
)
def test_a_plan_that_cannot_be_written_is_told(tmp_path, plan, message):
  with pytest.raises(ValueError, match=message):
    TensorWriter(tmp_path, plan, max_shard_bytes=100)
  assert listed(tmp_path) == []


def test_a_shard_holds_something(tmp_path):
  with pytest.raises(ValueError, match="max_shard_bytes=0 must be at least 1"):
    TensorWriter(tmp_path, [("a", "f4", (1,))], max_shard_bytes=0)


def test_a_disk_that_is_too_small_is_told_before(tmp_path):
  plan = [("a", np.float32, (1 << 20, 1 << 30))]  # 4 PB
  with pytest.raises(files.DiskFullError, match="exported weights need 4,503,"):
    with TensorWriter(tmp_path, plan, max_shard_bytes=1 << 60):
      pass
  assert listed(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "rename", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, step):
  calls = []

  def fail(*args, **kwargs):
    calls.append(args)
    if len(calls) == 2 or step == "replace":
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  real_rename = os.rename

  def fail_rename(*args):
    fail()
    real_rename(*args)

  monkeypatch.setattr(os, step, fail_rename if step == "rename" else fail)
  with pytest.raises(OSError, match="(?i)no space left"):
    write(tmp_path, {name: np.ones(2) for name in "abc"}, 16)
  assert listed(tmp_path) == [] and calls
