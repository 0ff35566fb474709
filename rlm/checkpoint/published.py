"""Weights of a published folder -> our variables, tensor by tensor.

No leaf is ever gathered on the host: each device's part of it is made there,
and tensors are read, turned and cast into it one after the other, the large
ones in blocks. On the host lie a few blocks (`tools/bench_load`).
"""

import functools
import math
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from rlm.checkpoint import fp8, int8
from rlm.checkpoint.leaf_parts import LeafParts, blocks, for_each
from rlm.checkpoint.published_names import (
  Tensor,
  copies,
  is_determined,
  leaf_name,
  published_tensors,
)
from rlm.checkpoint.tensor_files import TensorFiles
from rlm.models.config import ModelConfig
from rlm.models.quantized import Int8Matrix, is_quantized

_STORED = frozenset(
  np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
)
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE_SUFFIX = "_scale_inv"


class PublishedWeights:
  """The safetensors of a folder, checked against a model.

  Args:
    folder: holds them.
    cfg: the model's sizes.
    shapes: its variables as `jax.ShapeDtypeStruct`s.
    ignored: prefixes of tensors to leave alone.

  Raises:
    ValueError: tensors are missing, surplus, misshapen, truncated or of a
      dtype that is not read; the message names all of them.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    cfg: ModelConfig,
    shapes: Any,
    *,
    ignored: Sequence[str] = (),
  ):
    self.files = TensorFiles(folder)
    self.tensors = published_tensors(cfg, shapes)
    self._copies = copies(cfg)
    self._ignored = tuple(ignored)
    problems = [*self.files.problems, *self._problems(cfg)]
    if problems:
      raise ValueError(
        f"{folder} does not hold the weights of its config.json:\n- "
        + "\n- ".join(problems)
        + "\nCorrect config.json, or take the files that belong to it."
      )

  def _problems(self, cfg: ModelConfig) -> list[str]:
    needed = {t.name: t.shape for ts in self.tensors.values() for t in ts}
    missing = [name for name in needed if name not in self.files]
    problems = [f"{name} is missing" for name in missing]
    prefix = f"model.layers.{cfg.num_hidden_layers}."
    mtp = [name for name in needed if name.startswith(prefix)]
    if mtp and set(mtp) <= set(missing):
      problems = [f"{name} is missing" for name in missing if name not in mtp]
      problems.append(
        f"all {len(mtp)} tensors {prefix}* are missing, though"
        f" num_nextn_predict_layers={cfg.num_nextn_predict_layers}:"
        " transformers leaves MTP out when it saves. To load the model without,"
        " set it to 0, or give load_checkpoint mtp=False"
      )
    for name in self.files.names():
      if is_determined(name) or name.startswith(self._ignored):
        continue
      shape = needed.get(name)
      if shape is None and name in self._copies:
        shape = self._copied_shape(name, needed)
      problems += self._tensor_problems(name, shape)
    return problems

  def _copied_shape(self, name: str, needed: dict[str, Any]) -> Any:
    while name in self._copies:
      name = self._copies[name]
    return needed.get(name)

  def _tensor_problems(self, name: str, shape: Any) -> list[str]:
    files = self.files
    if shape is None:
      owner = name.removesuffix(SCALE_SUFFIX)
      if owner != name and owner in files and files.dtype(owner) == _FP8:
        return []  # checked with its owner
      return [f"{name} is surplus: the model has no place for it"]
    if files.shape(name) != shape:
      return [f"{name} has shape {files.shape(name)}, {shape} is needed"]
    dtype = files.dtype(name)
    if dtype != _FP8:
      if dtype in _STORED:
        return []
      return [f"{name} is {dtype}, which holds no weights that we read"]
    scale = name + SCALE_SUFFIX
    if scale not in files:
      return [f"{name} is {dtype} without {scale}"]
    blocks = tuple(
      math.ceil(n / b) for n, b in zip(shape, fp8.BLOCK, strict=True)
    )
    if files.shape(scale) != blocks:
      return [f"{scale} has shape {files.shape(scale)}, {blocks} is needed"]
    return []

  def total_bytes(self) -> int:
    """Bytes of all tensors that `load` reads."""
    return sum(
      self.files.nbytes(t.name) for ts in self.tensors.values() for t in ts
    )

  def scales(self) -> dict[str, np.ndarray]:
    """Name of each FP8 weight -> its scales [out / 128, in / 128] as stored."""
    names = [t.name for ts in self.tensors.values() for t in ts]
    return {
      name: self.files.read(name + SCALE_SUFFIX)
      for name in names
      if self.files.dtype(name) == _FP8
    }

  def fingerprint(self) -> str:
    """CRC-32 of names, shapes, dtypes and files' times, to tell them apart."""
    names = sorted(self.files.names())
    held = [(n, self.files.shape(n), str(self.files.dtype(n))) for n in names]
    times = [
      (path.name, path.stat().st_size, path.stat().st_mtime_ns)
      for path in sorted(self.files.folder.glob("*.safetensors"))
    ]
    return f"{zlib.crc32(repr((held, times)).encode()):08x}"

  def load(
    self,
    shapes: Any,
    *,
    shardings: Any = None,
    on_read: Callable[[int], None] = lambda _: None,
  ) -> Any:
    """The variables.

    Args:
      shapes: `jax.ShapeDtypeStruct`s; their dtypes are those of the result.
        Matrices that are `Int8Matrix`es of shapes become int8.
      shardings: a tree of `jax.sharding.Sharding`; None puts all of it on the
        default device.
      on_read: is told the bytes of each tensor when it is being read.

    Returns:
      {"params": ..., "router": ...} of jax arrays.

    Raises:
      ValueError: a copy (the head of an MTP module, say) is none, or a matrix
        for int8 is not finite.
    """
    self.check_copies()
    if shardings is None:
      device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      shardings = jax.tree.map(lambda _: device, shapes)

    def load_leaf(path, leaf, sharding):
      tensors = self.tensors[leaf_name(path)]
      load = self._load_int8 if is_quantized(leaf) else self._load_leaf
      return load(leaf, sharding, tensors, on_read)

    return jax.tree.map_with_path(
      load_leaf, shapes, shardings, is_leaf=is_quantized
    )

  def check_copies(self) -> None:
    """What a model shares must be equal, or we would compute another one.

    Raises:
      ValueError: a tensor differs from what it is said to be a copy of.
    """
    for name, original in self._copies.items():
      if name not in self.files or original not in self.files:
        continue
      rows = self.files.shape(name)[0]
      step = max(1, rows // 64)  # two whole heads would be too much memory
      for row in range(0, rows, step):
        part = (slice(row, row + step),)
        ours, theirs = (self.read(n, part) for n in (original, name))
        if not np.array_equal(ours, theirs, equal_nan=True):
          raise ValueError(
            f"{name} is stored as a copy of {original}, but differs from it."
            " The model shares the two: these weights are of another one. An"
            " MTP module can be left out (mtp=False, --without_mtp)."
          )

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A tensor, or the part `tensor[index]`, as stored or dequantised.

    Args:
      name: of the tensor.
      index: a slice per axis, or none.

    Returns:
      As stored; FP8 as float32.
    """
    stored = self.files.read(name, index)
    if stored.dtype != _FP8:
      return stored
    starts = [part.start or 0 for part in index] + [0, 0]
    return fp8.dequantize(
      stored,
      self.files.read(name + SCALE_SUFFIX),
      np.float32,
      first_row=starts[0],
      first_column=starts[1],
      shape=self.files.shape(name),
    )

  def _load_leaf(self, leaf, sharding, tensors: list[Tensor], on_read) -> Any:
    """One leaf, made part by part on the devices that hold it."""
    parts = LeafParts(leaf, sharding)

    def copy(tensor, index):
      parts.write(tensor, index, self.read(tensor.name, index))

    def tasks():
      for tensor in tensors:
        for index in blocks(tensor, parts):
          yield functools.partial(copy, tensor, index)
        on_read(self.files.nbytes(tensor.name))

    for_each(tasks(), workers=parts.workers)
    return parts.finish()

  def _load_int8(self, leaf, sharding, tensors: list[Tensor], on_read) -> Any:
    """An Int8Matrix; a row of a stored matrix is a channel, read whole."""
    values = LeafParts(leaf.values, sharding.values)
    scale = LeafParts(leaf.scale, sharding.scale)

    def convert(tensor, index):
      rows = self.read(tensor.name, index)
      try:
        values_block, scale_block = int8.quantize(rows, axis=1)
      except ValueError as error:
        raise ValueError(f"{tensor.name}: {error}") from error
      values.write(tensor, index, values_block)
      scale.write(tensor, (index[0], slice(0, 1)), scale_block)

    def tasks():
      for tensor in tensors:
        for index in blocks(tensor, values, scale, whole_rows=True):
          yield functools.partial(convert, tensor, index)
        on_read(self.files.nbytes(tensor.name))

    for_each(tasks(), workers=values.workers)
    return Int8Matrix(values.finish(), scale.finish())
