"""TensorBoard event files, written by the thread that calls.

tensorboardX's own writer leaves writing to another thread. On a full disk that
one dies, and soon the run would wait for it for ever; so only the messages and
their checksum are taken from there.
"""

import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from rlm import files

_VERSION = "brain.Event:2"


class EventsWriter:
  """One event file of a run; a resumed run adds another."""

  def __init__(self, folder: files.Path, *, next_step: int):
    """Creates the file, hiding what earlier ones hold of `next_step` and later.

    Args:
      folder: of the run's event files, created if need be.
      next_step: the first step that will be added.

    Raises:
      DiskFullError: no space left.
    """
    folder = pathlib.Path(folder)
    # By process too: it may not be the only one to start within a second.
    name = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
    self._path = folder / f"events.out.tfevents.{name}"
    with files.clear_disk_errors(self._path):
      folder.mkdir(parents=True, exist_ok=True)
      self._file = open(self._path, "ab", buffering=0)
    self._write(event_pb2.Event(file_version=_VERSION))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(step=next_step, session_log=start))

  def add(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the scalars of a step.

    Args:
      step: the step, counted from 0.
      scalars: name -> number.

    Raises:
      DiskFullError: no space left.
    """
    values = [
      summary_pb2.Summary.Value(tag=name, simple_value=value)
      for name, value in scalars.items()
    ]
    summary = summary_pb2.Summary(value=values)
    self._write(event_pb2.Event(step=step, summary=summary))

  def flush(self) -> None:
    """Returns when everything added is on the disk.

    Raises:
      DiskFullError: no space left.
    """
    with files.clear_disk_errors(self._path):
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _write(self, event: event_pb2.Event) -> None:
    """Appends a record: length, its checksum, the message, its checksum."""
    event.wall_time = time.time()
    message = event.SerializeToString()
    length = struct.pack("<Q", len(message))
    record = b"".join(
      [
        *(length, struct.pack("<I", masked_crc32c(length))),
        *(message, struct.pack("<I", masked_crc32c(message))),
      ]
    )
    with files.clear_disk_errors(self._path):
      data = memoryview(record)
      while data:  # a short write, on a full disk, raises on the rest
        data = data[self._file.write(data) :]
