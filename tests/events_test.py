"""Event files as TensorBoard reads them, and a disk that is full."""

import struct

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from rlm import files
from rlm.events import EventsWriter


def read_events(path):
  """Every event of a file whose checksums are right."""
  data, events = path.read_bytes(), []
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    message = data[12 : 12 + size]
    sums = struct.unpack("<II", data[8:12] + data[12 + size : 16 + size])
    assert sums == (masked_crc32c(data[:8]), masked_crc32c(message))
    events.append(event_pb2.Event.FromString(message))
    data = data[16 + size :]
  return events


def test_a_file_begins_with_its_version_and_hides_the_steps_to_come(tmp_path):
  writer = EventsWriter(tmp_path / "tensorboard", next_step=4)
  writer.add(4, {"loss": 2.5, "load/0": 1.0})
  writer.flush()  # at once on the disk, the file still open
  (path,) = (tmp_path / "tensorboard").iterdir()
  version, start, step = read_events(path)
  writer.close()
  assert version.file_version == "brain.Event:2"
  assert start.step == 4
  assert start.session_log.status == event_pb2.SessionLog.START
  assert step.step == 4 and step.wall_time >= start.wall_time > 0
  values = {v.tag: v.simple_value for v in step.summary.value}
  assert values == {"loss": 2.5, "load/0": 1.0}


def test_two_writers_of_one_second_lose_nothing(tmp_path):
  for step in range(2):
    writer = EventsWriter(tmp_path, next_step=step)
    writer.add(step, {"loss": 1.0})
    writer.close()
  events = [e for path in tmp_path.iterdir() for e in read_events(path)]
  assert sum(bool(e.summary.value) for e in events) == 2


def test_a_full_disk_is_said(tmp_path):
  writer = EventsWriter(tmp_path, next_step=0)
  writer.close()
  with open("/dev/full", "wb", buffering=0) as writer._file:
    with pytest.raises(files.DiskFullError) as caught:
      writer.add(0, {"loss": 1.0})
  assert "no space left on the disk while writing" in caught.value.strerror
  assert "events.out.tfevents" in caught.value.strerror
