"""The list of a checkpoint's files with their checksums, written last.

Of damaged bytes Orbax notices some; others (a flipped bit, a page of zeros
after a power cut) come back as wrong weights, as damaging every file of a
checkpoint showed.  So each one lists its files and is compared before it is
read.
"""

import concurrent.futures
import pathlib
import warnings
import zlib

import jax

from rlm import files

NAME = "manifest.json"
_CHUNK_BYTES = 1 << 22


def write_manifest(folder: pathlib.Path) -> None:
  """Brings a checkpoint to the disk, with the list of its files.

  On several processes the sizes alone are listed: one of them would have to
  read back what all have written.

  Args:
    folder: the checkpoint, complete but for the list.

  Raises:
    OSError: a file could not be brought to the disk.
  """
  paths = sorted(folder.rglob("*"))
  # fsync of a descriptor: for files as well as for the names in folders.
  for path in [*paths, folder]:
    files.sync_folder(path)
  contents = [path for path in paths if path.is_file()]
  one = jax.process_count() == 1
  checksums = _checksums(contents) if one else [None] * len(contents)
  listed = {
    path.relative_to(folder).as_posix(): [path.stat().st_size, checksum]
    for path, checksum in zip(contents, checksums, strict=True)
  }
  files.write_json(folder / NAME, listed)


def damage(folder: pathlib.Path) -> str | None:
  """Compares a checkpoint with its manifest.

  Args:
    folder: the checkpoint.

  Returns:
    What is wrong with it; None where every byte is as it was written.
  """
  try:
    listed = files.read_json(folder / NAME)
  except FileNotFoundError:
    return f"{NAME} is missing"
  except ValueError:
    return f"{NAME} is not JSON"
  for name, (size, _) in listed.items():
    path = folder / name
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != size:
      return f"{name} has {path.stat().st_size} bytes instead of {size}"
  checked = [
    name for name, (_, checksum) in listed.items() if checksum is not None
  ]
  found = _checksums([folder / name for name in checked])
  for name, checksum in zip(checked, found, strict=True):
    if checksum != listed[name][1]:
      return f"the bytes of {name} are not those written"
  return None


def saved_steps(folder: pathlib.Path) -> list[int]:
  """Steps with a checkpoint, oldest first."""
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def newest_whole(
  folder: pathlib.Path, steps: list[int]
) -> tuple[int, list[int]]:
  """The newest checkpoint that is whole, and the newer ones, which are torn.

  Args:
    folder: the checkpoints' folder.
    steps: of which to choose.

  Raises:
    ValueError: none is whole.

  Warns:
    UserWarning: one was torn.
  """
  reasons: dict[int, str] = {}
  for step in sorted(steps, reverse=True):
    reason = damage(folder / str(step))
    if reason is not None:
      reasons[step] = reason
      continue
    for torn, reason in reasons.items():
      warnings.warn(
        f"checkpoint {torn} in {folder} is torn or corrupt ({reason}); falling"
        f" back to the one of step {step}.",
        stacklevel=4,
      )
    return step, list(reasons)
  lines = "\n".join(f"  {step}: {reason}" for step, reason in reasons.items())
  raise ValueError(
    f"no checkpoint in {folder} is whole:\n{lines}\nRemove the folder to start"
    " from the beginning."
  )


def _checksums(paths: list[pathlib.Path]) -> list[int | None]:
  """CRC-32 of each file, 2 GB/s and core."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(_checksum, paths))


def _checksum(path: pathlib.Path) -> int:
  checksum = 0
  with open(path, "rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      checksum = zlib.crc32(chunk, checksum)
  return checksum
