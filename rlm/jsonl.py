"""Files of one JSON object a line, each with its step, that survive a kill.

A run that restores the checkpoint of step s repeats the steps from s on, so
their lines are dropped first, together with a last line that a kill tore.
"""

import json
import os
import pathlib
from typing import Any

from rlm import files


class JsonlWriter:
  """Appends records in order of their step.

  A line reaches the operating system as soon as it is written (a kill loses
  nothing, and the file can be watched) and the disk at `flush`.
  """

  def __init__(self, path: files.Path, *, next_step: int):
    """Opens the file, creating it and its folder.

    Args:
      path: the file.
      next_step: the first step that this process will write; earlier records
        stay, later ones are dropped.

    Raises:
      DiskFullError: no space left.
    """
    self.path = pathlib.Path(path)
    with files.clear_disk_errors(self.path):
      self.path.parent.mkdir(parents=True, exist_ok=True)
      drop_from(self.path, next_step)
      self._file = open(self.path, "ab", buffering=0)
      files.sync_folder(self.path.parent)
    self._last_step = next_step

  def write(self, record: dict[str, Any]) -> None:
    """Appends one line.

    Args:
      record: what `files.to_json` takes, with the int "step".

    Raises:
      ValueError: the step is before an earlier record's.
      DiskFullError: no space left.
    """
    if record["step"] < self._last_step:
      raise ValueError(
        f"{self.path.name}: a record of step {record['step']} came after step"
        f" {self._last_step}. Steps never go back, so that a resumed run can"
        " cut the file at one place."
      )
    self._last_step = record["step"]
    line = json.dumps(files.to_json(record), allow_nan=False) + "\n"
    with files.clear_disk_errors(self.path):
      # One write per line; a short one (a full disk) raises on the rest.
      data = memoryview(line.encode())
      while data:
        data = data[self._file.write(data) :]

  def flush(self) -> None:
    """Returns when every line written is on the disk."""
    with files.clear_disk_errors(self.path):
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()


def drop_from(path: files.Path, step: int) -> None:
  """Cuts a file before its first record of `step` or later, or its torn line.

  Args:
    path: a file whose steps never go back; it may be absent.
    step: the first step to drop.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return
  with open(path, "r+b") as file:
    keep = 0
    for line in file:
      record = _parse(line)
      if record is None or record["step"] >= step:
        break
      keep += len(line)
    file.truncate(keep)
    os.fsync(file.fileno())


def read_jsonl(path: files.Path) -> list[dict[str, Any]]:
  """Reads every record up to a line that a kill tore.

  Args:
    path: the file.

  Returns:
    The records, oldest first.

  Raises:
    FileNotFoundError: there is no such file.
  """
  records = []
  with open(path, "rb") as file:
    for line in file:
      if (record := _parse(line)) is None:
        break
      records.append(record)
  return records


def _parse(line: bytes) -> dict[str, Any] | None:
  """The record of a whole line, None of a torn one."""
  if not line.endswith(b"\n"):
    return None
  try:
    record = json.loads(line)
  except ValueError:
    return None
  return record if isinstance(record, dict) and "step" in record else None
