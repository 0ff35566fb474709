"""Tensors of a folder of safetensors, whole or in part, read without mapping.

The safetensors library maps the whole file, and pages of a mapping that were
touched count as resident until the kernel wants them back; its numpy face has
no FP8. The format is small: 8 bytes with the header's length (little endian),
the header (JSON: name -> dtype, shape, data_offsets), then the tensors' bytes
in the order of their offsets, without holes. So it is read here, into memory
that the result owns.

Files come from strangers: every field is checked before it is used.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The library's own bound: no header takes more memory than this.
MAX_HEADER_BYTES = 100_000_000

DTYPES = {
  name: np.dtype(dtype)
  for name, dtype in {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
  }.items()
}

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """Where one tensor lies."""

  path: pathlib.Path
  dtype: np.dtype[Any]
  shape: tuple[int, ...]
  offset: int  # of its first byte in the file

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
  """The tensors of `model.safetensors`, or of the index and its shards.

  Only headers are read here, a few MB for the largest published models. No
  file stays open, so that threads may read at the same time.

  A single file may have any name that ends with .safetensors. Of a folder with
  both forms `model.safetensors` counts, as in transformers. A tensor that a
  shard holds and the index does not list is there like any other.

  Args:
    folder: the folder.

  Attributes:
    folder: the folder.
    problems: what is wrong with the files, a line each; tensors named there may
      not be read. `open_tensors` raises instead.

  Raises:
    ValueError: no such folder, or no safetensors in it.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    problems: list[str] = []
    self._tensors: dict[str, _Tensor] = {}
    weight_map, paths = _find(self.folder, problems)
    broken = set()
    for path in paths:
      try:
        found = _read_header(path, problems)
      except ValueError as error:
        problems.append(str(error))
        broken.add(path.name)
        continue
      for name, tensor in found.items():
        other = self._tensors.setdefault(name, tensor)
        if other is not tensor:
          problems.append(
            f"tensor {name!r} is held twice, by {other.path.name} and"
            f" {path.name}"
          )
    held = {(tensor.path.name, n) for n, tensor in self._tensors.items()}
    read = {path.name for path in paths} - broken
    problems += [
      f"tensor {name!r} is not in {shard}, where the index puts it"
      for name, shard in weight_map.items()
      if shard in read and (shard, name) not in held
    ]
    self.problems = tuple(problems)

  def __contains__(self, name: object) -> bool:
    return name in self._tensors

  def names(self) -> list[str]:
    """Every tensor, by shard and then by place in it."""
    return list(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._tensor(name).shape

  def dtype(self, name: str) -> np.dtype[Any]:
    return self._tensor(name).dtype

  def nbytes(self, name: str) -> int:
    """Bytes of the whole tensor."""
    return self._tensor(name).nbytes

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A tensor, or a part of it, as `tensor[index]`.

    The bytes of the leading axis's range are read; where a later axis is cut
    as well, in pieces of 16 MB (or one entry of the leading axis), so that
    memory holds the result and one piece.

    Args:
      name: the tensor.
      index: a slice of step 1 per leading axis; axes without one are whole.

    Returns:
      An array that owns its memory.

    Raises:
      ValueError: no such tensor, an index of another kind, or a file that
        changed since it was opened.
    """
    tensor = self._tensor(name)
    starts, shape = _bounds(name, tensor.shape, index)
    part = np.empty(shape, tensor.dtype)
    if not part.size:
      return part
    row_shape = tensor.shape[1:]
    row_bytes = math.prod(row_shape) * tensor.dtype.itemsize
    with open(tensor.path, "rb", buffering=0) as file:
      file.seek(tensor.offset + (starts[0] * row_bytes if starts else 0))
      if shape[1:] == row_shape:
        _fill(file, part, name)
      else:
        cut = tuple(
          slice(start, start + size)
          for start, size in zip(starts[1:], shape[1:], strict=True)
        )
        step = max(1, _CHUNK_BYTES // row_bytes)
        for row in range(0, shape[0], step):
          rows = min(step, shape[0] - row)
          piece = np.empty((rows, *row_shape), tensor.dtype)
          _fill(file, piece, name)
          part[row : row + rows] = piece[:, *cut]
    # numpy takes any byte of a bool for granted and gives wrong sums.
    if tensor.dtype == np.bool_ and (part.view(np.uint8) > 1).any():
      raise ValueError(
        f"tensor {name!r} is BOOL and holds bytes other than 0 and 1."
        f" {tensor.path.name} is damaged: download or export it again."
      )
    return part

  def _tensor(self, name: str) -> _Tensor:
    if name not in self._tensors:
      some = ", ".join(map(repr, itertools.islice(self._tensors, 3)))
      raise ValueError(
        f"no tensor {name!r} in {self.folder}, which holds"
        f" {len(self._tensors)}: {some}, ..."
      )
    return self._tensors[name]


def open_tensors(folder: str | os.PathLike) -> TensorFiles:
  """The tensors of a folder whose files are sound.

  Raises:
    ValueError: no such folder, no safetensors in it, or files that are broken
      or do not fit together; the message lists every problem.
  """
  files = TensorFiles(folder)
  if files.problems:
    raise ValueError(
      f"{folder} does not hold sound safetensors:\n- "
      + "\n- ".join(files.problems)
      + "\nDownload or export these files again."
    )
  return files


def _find(
  folder: pathlib.Path, problems: list[str]
) -> tuple[dict[str, str], list[pathlib.Path]]:
  """The index's weight_map, {} without one, and the files to read."""
  if not folder.is_dir():
    raise ValueError(
      f"{folder} is no folder. Give the folder that holds {SINGLE} or {INDEX}."
    )
  if (folder / SINGLE).is_file():
    return {}, [folder / SINGLE]
  if not (folder / INDEX).exists():
    return {}, [_lone_file(folder)]
  try:
    weight_map = _read_index(folder / INDEX)
  except ValueError as error:
    problems.append(str(error))
    return {}, []
  paths = []
  for shard in dict.fromkeys(weight_map.values()):
    if not _is_plain_name(shard):
      problems.append(
        f"{INDEX} names the shard {shard!r:.100}, which is not the name of a"
        " .safetensors file in the folder"
      )
    elif not (folder / shard).is_file():
      problems.append(f"the shard {shard}, named by {INDEX}, does not exist")
    else:
      paths.append(folder / shard)
  return weight_map, paths


def _lone_file(folder: pathlib.Path) -> pathlib.Path:
  """The only safetensors of a folder without index."""
  found = sorted(folder.glob("*.safetensors"))
  if len(found) == 1 and found[0].is_file():
    return found[0]
  if found:
    raise ValueError(
      f"{folder} holds {len(found)} .safetensors and no {INDEX}, which says"
      " what belongs together. Add the index, or keep one file."
    )
  pickles = [p.name for p in folder.iterdir() if p.suffix in _PICKLES]
  if pickles:
    raise ValueError(
      f"{folder} holds pickled weights only ({min(pickles)!r}). They are never"
      " read, because a pickle runs its author's code: safetensors are needed."
      " Download or convert to those."
    )
  raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}.")


def _is_plain_name(shard: str) -> bool:
  """Whether a hostile index stays inside of its folder with this name."""
  return (
    shard.isprintable()  # without NUL, and it can be encoded
    and shard.endswith(".safetensors")
    and len(shard.encode()) <= 255
    and not any(part in shard for part in ("/", "\\", ".."))
  )


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """The weight_map of an index."""
  if not path.is_file() or path.stat().st_size > MAX_HEADER_BYTES:
    raise ValueError(f"{INDEX} is no file or beyond {MAX_HEADER_BYTES} bytes")
  index = _parse_json(path.read_bytes(), INDEX)
  weight_map = index.get("weight_map")
  if (
    not isinstance(weight_map, dict)
    or not weight_map
    or not all(isinstance(shard, str) for shard in weight_map.values())
  ):
    raise ValueError(f"{INDEX} has no weight_map of tensor to file name")
  return weight_map


def _read_header(path: pathlib.Path, problems: list[str]) -> dict[str, _Tensor]:
  """The tensors of a file, in the order of their bytes.

  Args:
    path: the file.
    problems: what is wrong with single tensors is added.

  Returns:
    The tensors.

  Raises:
    ValueError: the header as a whole is broken.
  """
  size = path.stat().st_size
  with open(path, "rb") as file:
    start = file.read(8)
    if start == b"version ":  # https://git-lfs.github.com/spec/v1
      raise ValueError(f"{path.name} is a Git LFS pointer: run `git lfs pull`")
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
      raise ValueError(
        f"{path.name} of {size} bytes is truncated or no safetensors: its"
        f" header would have {length} bytes (at most {MAX_HEADER_BYTES})"
      )
    raw = file.read(length)
  header = _parse_json(raw, f"the header of {path.name}")
  header.pop("__metadata__", None)
  ranges, tensors = [], {}
  for name, entry in header.items():
    try:
      dtype, shape, begin, end = _parse_entry(entry)
    except ValueError as error:
      problems.append(f"tensor {name!r} in {path.name}: {error}")
      continue
    ranges.append((begin, end, name))
    tensors[name] = _Tensor(path, dtype, shape, 8 + length + begin)
  ranges.sort()
  data_bytes = size - 8 - length
  previous = 0
  for begin, end, name in ranges:
    # A broken entry leaves a hole of its own, which would only repeat it.
    if begin != previous and len(tensors) == len(header):
      kind = "overlap others" if begin < previous else "leave a hole before it"
      problems.append(
        f"tensor {name!r} in {path.name}: the offsets {begin} to {end} {kind}"
      )
    previous = max(previous, end)
    if end > data_bytes:
      problems.append(
        f"tensor {name!r} in {path.name} is cut:"
        f" {max(0, data_bytes - begin)} of {end - begin} bytes are there"
      )
  if previous < data_bytes and len(tensors) == len(header):
    problems.append(
      f"{path.name} ends with {data_bytes - previous} bytes of no tensor"
    )
  return {name: tensors[name] for _, _, name in ranges}


def _parse_entry(
  entry: Any,
) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
  """(dtype, shape, first byte, last byte + 1) of a header's entry."""
  if not isinstance(entry, dict):
    raise ValueError(f"an object is needed, not {entry!r:.60}")
  name: Any = entry.get("dtype")
  shape: Any = entry.get("shape")
  offsets: Any = entry.get("data_offsets")
  if not isinstance(name, str) or name not in DTYPES:
    raise ValueError(
      f"dtype {name!r:.60} is unknown; known are {', '.join(DTYPES)}"
    )
  if not _are_sizes(shape) or len(shape) > 32:  # numpy's limit was 32 long
    raise ValueError(f"shape {shape!r:.60} is no list of sizes")
  if not _are_sizes(offsets) or len(offsets) != 2:
    raise ValueError(f"data_offsets {offsets!r:.60} are not two offsets")
  dtype, (begin, end) = DTYPES[name], offsets
  if math.prod(shape) * dtype.itemsize != end - begin:
    raise ValueError(
      f"the offsets {begin} to {end} do not fit {name} {shape!r:.60}"
    )
  return dtype, tuple(shape), begin, end


def _are_sizes(value: Any) -> bool:
  """Whether JSON gave a list of integers that fit 48 bits, no bools."""
  return isinstance(value, list) and all(
    type(item) is int and 0 <= item < 1 << 48 for item in value
  )


def _parse_json(raw: bytes, what: str) -> dict[str, Any]:
  """A JSON object from a stranger."""
  try:
    value = json.loads(raw.decode(), object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{what} is not valid JSON ({error!s:.200})") from error
  if not isinstance(value, dict):
    raise ValueError(f"{what} is no JSON object")
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; JSON itself lets the last of two equal names win."""
  found: dict[str, Any] = {}
  for name, value in pairs:
    if name in found:
      raise ValueError(f"{name!r:.100} is there twice")
    found[name] = value
  return found


def _bounds(
  name: str, shape: tuple[int, ...], index: tuple[slice, ...]
) -> tuple[list[int], tuple[int, ...]]:
  """Where a part begins on each axis, and its shape."""
  if (
    not isinstance(index, tuple)
    or len(index) > len(shape)
    or any(not isinstance(s, slice) or s.step not in (None, 1) for s in index)
  ):
    raise ValueError(
      f"index {index!r} of tensor {name!r} with shape {shape}: a tuple of at"
      f" most {len(shape)} slices of step 1 is needed."
    )
  index += (slice(None),) * (len(shape) - len(index))
  starts, sizes = [], []
  for part, size in zip(index, shape, strict=True):
    start, stop, _ = part.indices(size)
    starts.append(start)
    sizes.append(max(0, stop - start))
  return starts, tuple(sizes)


def _fill(file: Any, array: np.ndarray, name: str) -> None:
  """Reads the bytes of a contiguous array from where the file stands."""
  view = array.reshape(-1).view(np.uint8).data
  while view:
    count = file.readinto(view)
    if not count:
      raise ValueError(
        f"{file.name} ends within tensor {name!r}: it changed after it was"
        " opened. Read it when it is complete."
      )
    view = view[count:]
