"""Records survive kills: torn and repeated ones are dropped, others kept."""

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm import files, jsonl


def write(path, steps, next_step=0):
  with jsonl.JsonlWriter(path, next_step=next_step) as writer:
    for step in steps:
      writer.write({"step": step, "x": step / 3})
    writer.flush()


def test_records_come_back(tmp_path):
  path = tmp_path / "sub" / "x.jsonl"
  write(path, [0, 0, 1])
  assert jsonl.read_jsonl(path) == [
    {"step": 0, "x": 0.0},
    {"step": 0, "x": 0.0},
    {"step": 1, "x": 1 / 3},
  ]


@given(
  cut=st.integers(0, 400),
  restored=st.integers(0, 12),
  rest=st.binary(max_size=9),
)
def test_resuming_after_any_tear_repeats_the_file(
  tmp_path_factory, cut, restored, rest
):
  folder = tmp_path_factory.mktemp("jsonl")
  whole, torn = folder / "whole.jsonl", folder / "torn.jsonl"
  write(whole, range(12))
  data = whole.read_bytes()
  # A checkpoint follows a flush, so the records before it are whole.
  flushed = sum(len(line) for line in data.splitlines(True)[:restored])
  torn.write_bytes(data[: max(cut, flushed)] + rest)
  write(torn, range(restored, 12), next_step=restored)
  assert torn.read_bytes() == data


def test_reading_stops_at_a_torn_line(tmp_path):
  path = tmp_path / "x.jsonl"
  write(path, [0, 1])
  with open(path, "a") as file:
    file.write('{"step": 2, "x": 0.')
  assert [r["step"] for r in jsonl.read_jsonl(path)] == [0, 1]


def test_steps_never_go_back(tmp_path):
  with jsonl.JsonlWriter(tmp_path / "x.jsonl", next_step=3) as writer:
    writer.write({"step": 5})
    with pytest.raises(ValueError, match="step 4 came after step 5"):
      writer.write({"step": 4})
  with (
    jsonl.JsonlWriter(tmp_path / "y.jsonl", next_step=3) as writer,
    pytest.raises(ValueError, match="step 2 came after step 3"),
  ):
    writer.write({"step": 2})


def test_a_full_disk_is_said_plainly(tmp_path, monkeypatch):
  with jsonl.JsonlWriter(tmp_path / "x.jsonl", next_step=0) as writer:

    def fail(descriptor):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(files.DiskFullError, match=r"no space left.*x\.jsonl"):
      writer.flush()
