"""Writes safetensors shards tensor by tensor; memory holds one at a time."""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rlm import files
from rlm.checkpoint.tensor_files import DTYPES, INDEX, SINGLE

_FORMATS = {dtype: name for name, dtype in DTYPES.items()}
_PARTIAL = ".partial"


@dataclasses.dataclass
class _Planned:
  """A tensor, and from `_lay_out` on where its bytes go."""

  dtype: np.dtype[Any]
  shape: tuple[int, ...]
  shard: int = 0
  offset: int = 0

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
  """A folder of safetensors as transformers writes them, streamed.

  ```
  tensors = [("model.norm.weight", ml_dtypes.bfloat16, (7168,)), ...]
  with TensorWriter(folder, tensors, max_shard_bytes=5 * 10**9) as writer:
    writer.write("model.norm.weight", array)
  ```

  All names, dtypes and shapes come first, so that headers are written before
  the data and `write` puts each tensor, in any order, where it belongs. Shards
  are called `<name>.partial` until the end of the `with`, which makes sure that
  they are complete and on the disk; the index comes last. After an exception
  nothing of them is left; after a kill `.partial` files are, which the next
  writer replaces.

  Tensors go to shards in their order. Inside a shard wide dtypes come first:
  torch refuses a tensor that does not begin at a multiple of its item size.

  Args:
    folder: made if need be; holds no finished safetensors yet.
    tensors: (name, dtype, shape) of everything that will be written.
    max_shard_bytes: of tensors in a shard; a larger tensor gets its own.
    metadata: strings for the header of every shard; transformers asks for
      {"format": "pt"}.

  Raises:
    ValueError: no tensors, a name twice, a dtype that safetensors (or our
      reader) lacks, or `max_shard_bytes` below 1.
  """

  def __init__(
    self,
    folder: files.Path,
    tensors: Iterable[tuple[str, npt.DTypeLike, tuple[int, ...]]],
    *,
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
  ):
    self.folder = pathlib.Path(folder)
    self._metadata = dict({"format": "pt"} if metadata is None else metadata)
    self._planned = _check_plan(tensors)
    if max_shard_bytes < 1:
      raise ValueError(f"{max_shard_bytes=} must be at least 1 byte.")
    self._shards = _pack(self._planned, max_shard_bytes)
    count = len(self._shards)
    self._names = [
      f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)
    ]
    if count == 1:
      self._names = [SINGLE]
    self._missing = [set(shard) for shard in self._shards]
    self._open = False

  def __enter__(self) -> "TensorWriter":
    """Writes the headers.

    Raises:
      ValueError: the folder holds finished safetensors.
      DiskFullError: the disk has no room for all tensors.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    self._refuse_finished()
    for path in self.folder.glob("model*.safetensors" + _PARTIAL):
      path.unlink()
    files.require_free_space(self.folder, self.total_bytes, "exported weights")
    self._open = True
    try:
      for i, shard in enumerate(self._shards):
        header = _lay_out(shard, self._planned, i, self._metadata)
        with files.clear_disk_errors(self._partial(i)):
          self._partial(i).write_bytes(header)
    except BaseException:
      self._remove()
      raise
    return self

  def __exit__(self, kind: Any, *rest: Any) -> None:
    """Finishes after success; removes what was written after an exception."""
    if kind is None:
      self.close()
    else:
      self._remove()

  @property
  def total_bytes(self) -> int:
    """Bytes of all planned tensors."""
    return sum(tensor.nbytes for tensor in self._planned.values())

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes one tensor to its place.

    Args:
      name: a planned tensor, not written before.
      array: of the planned dtype and shape.

    Raises:
      ValueError: another name, dtype or shape, or outside of the `with`.
      DiskFullError: no space left.
    """
    if not self._open:
      raise ValueError(f"{self.folder} is not being written: use `with`.")
    tensor = self._planned.get(name)
    if tensor is None:
      raise ValueError(
        f"tensor {name!r} was not planned. Give every tensor to TensorWriter."
      )
    missing = self._missing[tensor.shard]
    if name not in missing:
      raise ValueError(f"tensor {name!r} was already written. Write it once.")
    array = np.asarray(array)
    if array.dtype != tensor.dtype or array.shape != tensor.shape:
      raise ValueError(
        f"tensor {name!r} is {array.dtype} {list(array.shape)}; planned was"
        f" {tensor.dtype} {list(tensor.shape)}. Convert it, or plan it so."
      )
    path = self._partial(tensor.shard)
    with files.clear_disk_errors(path), open(path, "r+b") as file:
      file.seek(tensor.offset)
      flat = np.ascontiguousarray(array).reshape(-1)
      file.write(flat.view(np.uint8).data)
      file.flush()
      if missing == {name}:
        # Here and not at the end, so that the disk works during the export.
        os.fsync(file.fileno())
    missing.remove(name)

  def close(self) -> None:
    """Gives the files their names, the index last; `with` calls it.

    Raises:
      ValueError: planned tensors were not written; nothing is left.
      DiskFullError: no space left for the index; nothing is left.
    """
    if not self._open:
      return
    left = [name for name in self._planned if self._is_missing(name)]
    if left:
      self._remove()
      raise ValueError(
        f"{len(left)} of {len(self._planned)} planned tensors were never"
        f" written: {', '.join(map(repr, left))}. Write each, or do not plan"
        " it."
      )
    named: list[pathlib.Path] = []
    try:
      self._refuse_finished()  # another export that was faster
      for i, name in enumerate(self._names):
        os.rename(self._partial(i), self.folder / name)
        named.append(self.folder / name)
      files.sync_folder(self.folder)
      if len(self._names) > 1:
        named.append(self.folder / INDEX)
        files.write_json(self.folder / INDEX, self._index())
    except BaseException:
      # A folder of some shards would look like an export.
      for path in named:
        path.unlink(missing_ok=True)
      self._remove()
      raise
    self._open = False

  def _index(self) -> dict[str, Any]:
    weight_map = {
      name: self._names[tensor.shard] for name, tensor in self._planned.items()
    }
    return {
      "metadata": {"total_size": self.total_bytes},
      "weight_map": weight_map,
    }

  def _is_missing(self, name: str) -> bool:
    return name in self._missing[self._planned[name].shard]

  def _partial(self, shard: int) -> pathlib.Path:
    return self.folder / (self._names[shard] + _PARTIAL)

  def _refuse_finished(self) -> None:
    """Weights that took days to train are not overwritten by an export."""
    found = sorted(path.name for path in self.folder.glob("*.safetensors"))
    found += [INDEX] if (self.folder / INDEX).exists() else []
    if found:
      raise ValueError(
        f"{self.folder} already holds {found[0]}. Choose another folder, or"
        " remove its safetensors and their index."
      )

  def _remove(self) -> None:
    self._open = False
    for i in range(len(self._names)):
      self._partial(i).unlink(missing_ok=True)


def _check_plan(
  tensors: Iterable[tuple[str, npt.DTypeLike, tuple[int, ...]]],
) -> dict[str, _Planned]:
  """The plan by name, or why it cannot be written."""
  planned: dict[str, _Planned] = {}
  for name, dtype, shape in tensors:
    if name in planned or name == "__metadata__":
      raise ValueError(
        f"tensor {name!r} is planned twice, or safetensors' own name. Give"
        " each tensor a name of its own."
      )
    if np.dtype(dtype) not in _FORMATS:
      raise ValueError(
        f"tensor {name!r} is {np.dtype(dtype)}, which is not written. Convert"
        f" it to one of {', '.join(map(str, _FORMATS))}."
      )
    planned[name] = _Planned(np.dtype(dtype), tuple(int(n) for n in shape))
  if not planned:
    raise ValueError("no tensors are planned; at least one is needed.")
  return planned


def _pack(
  planned: dict[str, _Planned], max_shard_bytes: int
) -> list[list[str]]:
  """Names of each shard, in order, as many as fit."""
  shards: list[list[str]] = [[]]
  used = 0
  for name, tensor in planned.items():
    if shards[-1] and used + tensor.nbytes > max_shard_bytes:
      shards.append([])
      used = 0
    shards[-1].append(name)
    used += tensor.nbytes
  return shards


def _lay_out(
  shard: list[str],
  planned: dict[str, _Planned],
  number: int,
  metadata: dict[str, str],
) -> bytes:
  """The bytes before a shard's data; its tensors learn their places."""
  header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
  end = 0
  for name in sorted(shard, key=lambda name: -planned[name].dtype.itemsize):
    tensor = planned[name]
    tensor.shard, tensor.offset = number, end
    end += tensor.nbytes
    header[name] = {
      "dtype": _FORMATS[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [tensor.offset, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  for name in shard:
    planned[name].offset += 8 + len(text)
  return struct.pack("<Q", len(text)) + text
