"""Files that are either whole or absent; a full disk said in plain words."""

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

Path = str | os.PathLike

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
  """The disk, or the user's quota on it, has no room for what is written."""


@contextlib.contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
  """Turns "no space left" inside the block into a DiskFullError with advice.

  TensorStore reports a full disk as ValueError or RuntimeError with the
  system's text, so the text counts as well as the errno.

  Args:
    path: what is being written, for the message.

  Raises:
    DiskFullError: the block failed for want of space.
  """
  try:
    yield
  except DiskFullError:
    raise
  except Exception as error:
    full = isinstance(error, OSError) and error.errno in _FULL
    if full or any(os.strerror(code) in str(error) for code in _FULL):
      raise DiskFullError(
        errno.ENOSPC,
        f"no space left on the disk while writing {path}. Free some space and"
        " run the same command again: it continues from the last checkpoint.",
      ) from error
    raise


def require_free_space(path: Path, needed_bytes: int, what: str) -> None:
  """Checks, before anything expensive, that the disk can hold `what`.

  Args:
    path: a file or folder, which need not exist yet.
    needed_bytes: bytes about to be written.
    what: what they are, for the message.

  Raises:
    DiskFullError: fewer bytes are free.
  """
  folder = pathlib.Path(path).absolute()
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  if free < needed_bytes:
    raise DiskFullError(
      errno.ENOSPC,
      f"{what} need {needed_bytes / 1e6:,.0f} MB and {folder} has"
      f" {free / 1e6:,.0f} MB free. Free some space, choose another --workdir,"
      " or keep fewer checkpoints.",
    )


def write_bytes(path: Path, data: bytes) -> None:
  """Replaces a file atomically: after a crash it is the old one or the new.

  Args:
    path: the file; its folder exists.
    data: its whole content.

  Raises:
    DiskFullError: no space left; the old file is untouched.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
  with clear_disk_errors(path):
    try:
      with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except BaseException:
      temporary.unlink(missing_ok=True)
      raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
  """Makes the names in `folder` survive a power cut."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
  """Writes `data` as indented JSON, atomically.

  Args:
    path: the file; its folder exists.
    data: nested dicts, lists, scalars, numpy or jax arrays.

  Raises:
    DiskFullError: no space left; the old file is untouched.
    TypeError: `data` holds something JSON has no form for.
  """
  text = json.dumps(to_json(data), indent=2, allow_nan=False)
  write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
  """Reads a JSON file.

  Args:
    path: the file.

  Returns:
    Its content.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not JSON; the message names the file.
  """
  data = pathlib.Path(path).read_bytes()
  try:
    return json.loads(data)
  except ValueError as error:
    raise ValueError(
      f"{path} is not valid JSON ({error}). Restore or remove it."
    ) from error


def to_json(value: Any) -> Any:
  """`value` in JSON's own types; floats keep every digit.

  Args:
    value: nested dicts (keys become text), lists, tuples, scalars, paths,
      numpy or jax arrays.

  Returns:
    The same with dict, list, str, int, float, bool and None.  JSON has no nan
    and no infinity: they become None.

  Raises:
    TypeError: something else was inside.
  """
  if value is None or isinstance(value, (bool, str)):
    return value
  if isinstance(value, dict):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [to_json(item) for item in value]
  if isinstance(value, int):
    return int(value)
  if isinstance(value, float):
    return float(value) if math.isfinite(value) else None
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "__array__"):
    return to_json(np.asarray(value).tolist())
  raise TypeError(f"{type(value).__name__} has no JSON form: {value!r:.60}")
