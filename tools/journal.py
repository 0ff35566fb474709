"""Figures in a file as they come, and a process that is started again.

A new kernel may hang, or break the device's context for all that follows. What
was measured before stays in the journal; what began and never ended is known
there as the culprit, and is not tried again.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]

# Exit status of a process that has nothing to do here.
REFUSED = 2


class Journal:
  """Records by name, in a JSON file that is whole after each of them.

  Attributes:
    content: what the file holds.
    records: of it, name -> record with a "status": started, ok, raised, skipped
      or died.
    suspects: names that were begun together when a process died: which of them
      it was is not known.
  """

  def __init__(self, path: str | None, *, resume: bool = False):
    self._path = pathlib.Path(path) if path else None
    self.content: dict[str, Any] = {"records": {}}
    if resume and self._path and self._path.exists():
      self.content = json.loads(self._path.read_text())
    self.suspects = set(self.content.pop("together", ()))
    for record in self.records.values():
      if record["status"] == "started":
        record.update(status="died", message="hung, or took the device down")

  @property
  def records(self) -> dict[str, Record]:
    return self.content["records"]

  def put(self, name: str, record: Record) -> None:
    """Keeps a record in place of the one before, and writes the file."""
    self.records[name] = record
    self.write()

  def together(self, names: Sequence[str]) -> None:
    """Says which are begun together, until it is called again."""
    self.content["together"] = list(names)
    self.write()

  def write(self) -> None:
    """Replaces the file at once: whoever is killed leaves the last one."""
    if self._path:
      part = self._path.with_name(self._path.name + ".part")
      part.write_text(json.dumps(self.content, indent=1) + "\n")
      part.replace(self._path)


def attempt(
  journal: Journal, name: str, about: Record, work: Callable[[], Record]
) -> bool:
  """Records `about` with what `work` returns, or why it raised; if it did not.

  Args:
    journal: where.
    name: of the record.
    about: what it says in any case.
    work: returns the rest, perhaps with a "status"; else that is ok.
  """
  journal.put(name, about | {"status": "started"})
  try:
    record = {"status": "ok"} | work()
  except Exception as error:  # a compiler's, a runtime's: of any kind
    record = {"status": "raised", "message": message_of(error)}
  journal.put(name, about | record)
  return record["status"] != "raised"


def message_of(error: BaseException) -> str:
  """What an error says, in one line."""
  words = " ".join(str(error).split())
  return f"{type(error).__name__}: {words[:300]}"


def persist(
  module: str, arguments: Sequence[str], path: str, environment: dict[str, str]
) -> int:
  """Runs a module until it ends well, is refused, or gets no further.

  Args:
    module: such as tools.bench_mla; of this repository.
    arguments: its flags; it resumes the journal at `path`.
    path: of the journal.
    environment: variables that it finds set, where they are not yet.

  Returns:
    Its last exit status.
  """
  command = [sys.executable, "-m", module, *arguments]
  root = pathlib.Path(__file__).resolve().parents[1]
  before = None
  while True:
    status = subprocess.run(
      command, cwd=root, env=environment | dict(os.environ), check=False
    ).returncode
    file = pathlib.Path(path)
    known = file.read_text() if file.exists() else None
    if status in (0, REFUSED) or known == before:
      return status
    before = known
    print(f"{module} ended with status {status}: started again", flush=True)
