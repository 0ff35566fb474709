"""Weights of a published folder -> our variables, tensor by tensor.

No leaf is ever gathered on the host: each device's part of it is made there,
and tensors are read, turned and cast into it one after the other. On the host
lie one tensor as stored and one as it is handed over.
"""

import functools
import math
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rlm.checkpoint import fp8
from rlm.checkpoint.published_names import (
  Tensor,
  copies,
  is_determined,
  leaf_name,
  published_tensors,
)
from rlm.checkpoint.tensor_files import TensorFiles
from rlm.models.config import ModelConfig

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
    """Name of each FP8 weight -> its scales, float32 [out / 128, in / 128]."""
    names = [t.name for ts in self.tensors.values() for t in ts]
    return {
      name: self.files.read(name + SCALE_SUFFIX).astype(np.float32)
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
      shardings: a tree of `jax.sharding.Sharding`; None puts all of it on the
        default device.
      on_read: is told the bytes of each tensor after it was read.

    Returns:
      {"params": ..., "router": ...} of jax arrays.

    Raises:
      ValueError: a copy (the head of an MTP module, say) is none.
    """
    self._check_copies()
    if shardings is None:
      device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      shardings = jax.tree.map(lambda _: device, shapes)

    def load_leaf(path, leaf, sharding):
      tensors = self.tensors[leaf_name(path)]
      return self._load_leaf(leaf, sharding, tensors, on_read)

    return jax.tree.map_with_path(load_leaf, shapes, shardings)

  def _check_copies(self) -> None:
    """What a model shares must be equal, or we would compute another one."""
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
            " The model shares the two: these weights are of another one."
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
    parts: dict[Any, list[jax.Device]] = {}
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    for device, index in indices.items():
      bounds = tuple(
        part.indices(size)[:2]
        for part, size in zip(index, leaf.shape, strict=True)
      )
      parts.setdefault(bounds, []).append(device)
    made = []
    for bounds, devices in parts.items():
      shape = tuple(stop - start for start, stop in bounds)
      buffers = [jnp.zeros(shape, leaf.dtype, device=d) for d in devices]
      for tensor in tensors:
        index, at = _within(bounds, tensor)
        if index is None:
          continue
        piece = self.read(tensor.name, index)
        buffers = [
          _place(b, jax.device_put(piece, d), at, tensor.transposed)
          for b, d in zip(buffers, devices, strict=True)
        ]
        on_read(self.files.nbytes(tensor.name))
      made += buffers
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, made)


def _within(bounds, tensor: Tensor):
  """(index into the tensor, place in the part), or (None, None) outside."""
  lead = len(tensor.place)
  at = []
  for place, (start, stop) in zip(tensor.place, bounds[:lead], strict=True):
    if not start <= place < stop:
      return None, None
    at.append(place - start)
  index = tuple(slice(start, stop) for start, stop in bounds[lead:])
  return index[::-1] if tensor.transposed else index, tuple(at)


@functools.partial(
  jax.jit, static_argnames="transposed", donate_argnames="buffer"
)
def _write(buffer, piece, at, transposed):
  if transposed:
    piece = piece.T
  lead = buffer.ndim - piece.ndim
  piece = piece.astype(buffer.dtype).reshape((1,) * lead + piece.shape)
  starts = (*at, *(jnp.int32(0) for _ in range(piece.ndim - lead)))
  return jax.lax.dynamic_update_slice(buffer, piece, starts)


def _place(buffer, piece, at, transposed):
  """`piece` written into `buffer` at an index of its leading axes, in place."""
  return _write(buffer, piece, tuple(map(np.int32, at)), transposed)
