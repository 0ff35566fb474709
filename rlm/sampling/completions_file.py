"""A .jsonl file that is written in order, and continued after any kill.

Beside FILE.jsonl lies FILE.jsonl.settings.json with all that the lines depend
on. It is there before the first line, and each line is a function of its own
number and these settings; so what is whole in the file stays, a line that a
kill tore is dropped, and the file ends as if nothing had happened.
"""

import fcntl
import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

from rlm import files
from rlm.sampling.prompts_file import ADDED, json_line
from rlm.workdir import differences


class CompletionsFile:
  """Appends lines to a file that nobody else writes.

  with CompletionsFile(path, records, settings) as output:
    output.begin(environment=..., weights=...)
    for first in range(output.done, len(records), n):
      output.append(...)

  Attributes:
    path: the file.
    done: lines in it.
  """

  def __init__(
    self,
    path: files.Path,
    records: Sequence[dict[str, Any]],
    settings: dict[str, Any],
  ):
    """Opens the file, or makes it, and finds out how far it is.

    Args:
      path: the file.
      records: the input of each line.
      settings: what the lines depend on, as JSON data.

    Raises:
      ValueError: it holds something else, was made with other settings, or
        another process is writing it. Nothing was changed then.
      DiskFullError: no space left.
    """
    self.path = pathlib.Path(path)
    self._settings_path = pathlib.Path(f"{self.path}.settings.json")
    self._settings = files.to_json(settings)
    with files.clear_disk_errors(self.path):
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._file = open(self.path, "a+b", buffering=0)
    try:
      self._lock()
      self.done, size = self._check(records)
      if size < os.fstat(self._file.fileno()).st_size:
        self._file.truncate(size)
    except BaseException:
      self._file.close()
      raise

  def begin(self, *, weights: str, environment: dict[str, Any]) -> None:
    """Records the settings, or checks the rest of them; before any `append`.

    Args:
      weights: a digest of the model's.
      environment: versions and device. Others may round otherwise, so that
        lines are not the same to the bit: a warning says so.

    Raises:
      ValueError: the lines that are there came from other weights.
    """
    settings = {**self._settings, "weights": weights}
    if not self.done:
      record = {"settings": settings, "environment": environment}
      files.write_json(self._settings_path, record)
      return
    saved = self._saved()
    self._compare(saved["settings"], settings)
    changed = differences(saved["environment"], environment)
    if changed:
      warnings.warn(
        f"{self.path} continues on other versions or another device, so its"
        f" lines may differ from an uninterrupted run's:\n{changed}",
        stacklevel=2,
      )

  def append(self, records: Sequence[dict[str, Any]]) -> None:
    """Returns when these lines are on the disk.

    Raises:
      DiskFullError: no space left.
    """
    data = memoryview(b"".join(map(json_line, records)))
    with files.clear_disk_errors(self.path):
      while data:
        data = data[self._file.write(data) :]
      os.fsync(self._file.fileno())
    self.done += len(records)

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self._file.close()  # which gives up the lock

  def _lock(self) -> None:
    try:
      fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(
        f"{self.path} is being written by another process. Wait for it to end,"
        " or choose another --output."
      ) from error

  def _check(self, records: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Whole lines that belong to the input, and their size in bytes."""
    self._file.seek(0)
    if not os.fstat(self._file.fileno()).st_size:
      return 0, 0
    if not self._settings_path.is_file():
      raise ValueError(
        f"{self.path} exists without {self._settings_path.name}, so it is no"
        " output that could be continued. Choose another --output, or remove"
        " it."
      )
    saved = self._saved()["settings"]
    # The weights are not read yet; `begin` looks at them.
    self._compare(saved, {**self._settings, "weights": saved["weights"]})
    done = size = 0
    for line in self._file:
      if not line.endswith(b"\n"):
        break
      if done == len(records):
        self._refuse(done, "has more lines than the input")
      self._check_line(done, line, records[done])
      done += 1
      size += len(line)
    return done, size

  def _saved(self) -> dict[str, Any]:
    saved = files.read_json(self._settings_path)
    try:
      saved["settings"]["weights"], saved["environment"]
    except (KeyError, TypeError) as error:
      raise ValueError(
        f"{self._settings_path} holds no settings of it. Choose another"
        " --output, or remove both files."
      ) from error
    return saved

  def _check_line(
    self, index: int, line: bytes, record: dict[str, Any]
  ) -> None:
    try:
      found = json.loads(line)
      given = {k: v for k, v in found.items() if k not in ADDED}
    except (ValueError, AttributeError):
      self._refuse(index, "is no JSON object")
    if not all(key in found for key in ADDED):
      self._refuse(index, "has no completion")
    if json_line(given) != json_line(record):  # as texts: NaN equals NaN
      self._refuse(index, "does not belong to this line of the input")

  def _refuse(self, index: int, what: str) -> None:
    raise ValueError(
      f"{self.path}:{index + 1}: {what}; it was changed, or the input was."
      " Choose another --output, or remove it to start anew."
    )

  def _compare(self, saved: Any, settings: Any) -> None:
    changed = differences(saved, settings)
    if changed:
      raise ValueError(
        f"{self.path} was begun with other settings; before -> now:\n{changed}"
        "\nGive the same command, choose another --output, or remove it to"
        " start anew."
      )
