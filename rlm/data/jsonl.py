"""JSON Lines files, with errors that name the file and the line."""

import json
import os
import pathlib
from typing import Any


def read_jsonl(path: str | os.PathLike) -> list[tuple[int, dict[str, Any]]]:
  """Reads one JSON object per line; blank lines are skipped.

  Args:
    path: a UTF-8 file.

  Returns:
    (line number from 1, object) of each line.

  Raises:
    ValueError: no such file, an empty one, or a line that is no UTF-8 or no
      JSON object; the message starts with `path:line`.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(
      f"{path} is a folder; a .jsonl file is needed, one object a line."
    )
  if not path.exists():
    raise ValueError(f"no file {path}. Check the path in the config.")
  records = []
  for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
    try:
      line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(
        f"{path}:{number}: byte {raw[error.start]:#04x} at column"
        f" {error.start + 1} is not UTF-8. Convert the file to UTF-8."
      ) from error
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(
        f"{path}:{number}: invalid JSON at column {error.colno}: {error.msg}."
        " Each line holds one whole object."
      ) from error
    if not isinstance(record, dict):
      raise ValueError(
        f"{path}:{number}: expected an object {{...}}, got"
        f" {type(record).__name__}."
      )
    records.append((number, record))
  if not records:
    raise ValueError(f"{path} is empty: it has no line with an object.")
  return records
