"""The arrays of a checkpoint, read block by block straight to their devices.

Orbax restores all arrays at once and gathers each on the host, of every one of
several devices anew: twice the model and more (`tools/bench_load --own`). What
it writes is an open format, a zarr array per leaf in one OCDBT store, of which
tensorstore reads any part. So no leaf is ever gathered: memory holds the target
and a few blocks. A chunk is read whole; `chunked` has Orbax write small ones,
and a checkpoint from before it has one chunk per leaf.
"""

import functools
import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from rlm.checkpoint import int8
from rlm.checkpoint.leaf_parts import LeafParts, for_each
from rlm.checkpoint.published_names import Tensor, leaf_name
from rlm.models.quantized import Int8Matrix, quantized_shapes

_BLOCK_BYTES = 1 << 22  # of what is read at once, and so of the largest chunk
_KEPT_BLOCKS = 24  # one for each kind of matrix of a layer, and a few more


def chunked(leaf: Any) -> ocp.SaveArgs:
  """How Orbax shall cut a leaf: into what a reader can hold beside the model.

  Chunks are whole matrices (of layers, of experts) where these are small
  enough, so that one is read alone and its channels lie together.

  Args:
    leaf: the array to save.
  """
  size, axes = leaf.size * leaf.dtype.itemsize, 0
  while size > _BLOCK_BYTES and axes < leaf.ndim - 2:
    size //= leaf.shape[axes]
    axes += 1
  return ocp.SaveArgs(
    chunk_byte_size=_BLOCK_BYTES, shard_axes=tuple(range(axes))
  )


class StoredArrays:
  """A tree of dicts of arrays within a saved state.

  Args:
    folder: Orbax's folder of the state.
    field: top-level field of the state, such as "variables".
    shapes: the field as `jax.ShapeDtypeStruct`s.
  """

  def __init__(self, folder: pathlib.Path, field: str, shapes: Any):
    self.shapes = shapes
    self._open = functools.cache(
      lambda name: open_array(folder, f"{field}.{name}")
    )
    self._kept = functools.lru_cache(maxsize=_KEPT_BLOCKS)(self._read_block)

  def load(
    self, shapes: Any, *, quantize: bool = False, shardings: Any = None
  ) -> Any:
    """The arrays, or some of them.

    Args:
      shapes: `jax.ShapeDtypeStruct`s of those to read; their dtypes are those
        of the result.
      quantize: whether matrices become `Int8Matrix`es.
      shardings: a tree of `jax.sharding.Sharding` for the result; None puts
        all of it on the default device.

    Returns:
      A tree like `shapes`, of jax arrays.

    Raises:
      ValueError: a matrix for int8 is not finite.
    """
    wanted = quantized_shapes(shapes) if quantize else shapes
    if shardings is None:
      device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      shardings = jax.tree.map(lambda _: device, wanted)

    def load_leaf(path, leaf, target, sharding):
      name = leaf_name(path)
      if isinstance(target, Int8Matrix):
        return self._load_int8(name, leaf.dtype, target, sharding)
      return self._load_leaf(name, leaf, sharding)

    return jax.tree.map_with_path(load_leaf, shapes, wanted, shardings)

  def read(self, name: str, place: tuple[int, ...] = ()) -> np.ndarray:
    """A leaf, or the part `leaf[place]`, on the host.

    Args:
      name: keys of the leaf joined by dots, without the field.
      place: index into its leading axes. Neighbours are best read one soon
        after the other: they come in the same block.
    """
    steps = _block_shape(self._open(name))[: len(place)]
    starts = tuple(i // n * n for i, n in zip(place, steps, strict=True))
    shared = any(step > 1 for step in steps)
    block = (self._kept if shared else self._read_block)(name, starts, steps)
    return block[tuple(i - n for i, n in zip(place, starts, strict=True))]

  def _read_block(self, name, starts, steps) -> np.ndarray:
    array = self._open(name)
    index = tuple(
      slice(start, min(start + step, size))
      for start, step, size in zip(starts, steps, array.shape, strict=False)
    )
    return array[index].read().result()

  def _load_leaf(self, name: str, leaf: Any, sharding: Any) -> jax.Array:
    """One leaf, made block by block on the devices that hold it."""
    parts, whole = LeafParts(leaf, sharding), _whole(leaf)
    array = self._open(name)

    def copy(index):
      parts.write(whole, index, array[index].read().result())

    tasks = (
      functools.partial(copy, index)
      for index in _blocks(array, leaf.shape, parts.bounds(whole))
    )
    for_each(tasks, workers=parts.workers)
    return parts.finish()

  def _load_int8(self, name, dtype, leaf: Int8Matrix, sharding) -> Int8Matrix:
    """An Int8Matrix; the inputs that share a scale are read together."""
    values = LeafParts(leaf.values, sharding.values)
    scale = LeafParts(leaf.scale, sharding.scale)
    array = self._open(name)

    def convert(index):
      block = array[index].read().result()
      for place in np.ndindex(block.shape[:-2]):  # few floats at a time
        try:
          made = int8.quantize(block[place].astype(dtype), axis=0)
        except ValueError as error:
          raise ValueError(f"{name}: {error}") from error
        at = [
          slice(part.start + i, part.start + i + 1)
          for part, i in zip(index, place, strict=False)
        ]
        lead = (None,) * len(place)
        values.write(_whole(leaf.values), (*at, *index[-2:]), made[0][lead])
        scale_at = (*at, slice(0, 1), index[-1])
        scale.write(_whole(leaf.scale), scale_at, made[1][lead])

    bounds = values.bounds(_whole(leaf.values))
    tasks = (
      functools.partial(convert, index)
      for index in _blocks(array, leaf.shape, bounds, whole_axis=-2)
    )
    for_each(tasks, workers=values.workers)
    return Int8Matrix(values.finish(), scale.finish())


def open_array(folder: pathlib.Path, name: str) -> tensorstore.TensorStore:
  """An array that Orbax saved, to read parts of.

  Args:
    folder: Orbax's folder of the state.
    name: keys of the array joined by dots.
  """
  base = {"driver": "file", "path": f"{folder}/"}
  store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
  return tensorstore.open({"driver": "zarr", "kvstore": store}).result()


def _whole(leaf: Any) -> Tensor:
  """A leaf as one tensor, for LeafParts."""
  return Tensor("", (), False, leaf.shape)


def _block_shape(
  array: tensorstore.TensorStore, whole_axis: int | None = None
) -> tuple[int, ...]:
  """What to read at once: a chunk, or neighbours while they stay small."""
  layout: Any = array.chunk_layout  # its fields are optional in general
  shape = list(layout.read_chunk.shape)
  if whole_axis is not None:
    shape[whole_axis] = array.shape[whole_axis]
  chunk_bytes = math.prod(shape) * array.dtype.numpy_dtype.itemsize
  room = max(1, _BLOCK_BYTES // chunk_bytes)
  for axis in reversed(range(len(shape))):
    chunks = min(room, math.ceil(array.shape[axis] / shape[axis]))
    shape[axis] *= chunks
    room //= chunks
    if shape[axis] < array.shape[axis]:
      break
  return tuple(shape)


def _blocks(
  array: tensorstore.TensorStore,
  shape: tuple[int, ...],
  held: list[tuple[tuple[int, int], ...]],
  *,
  whole_axis: int | None = None,
) -> Iterator[tuple[slice, ...]]:
  """Indices of the blocks of which some part holds anything, each once."""
  if not math.prod(shape):
    return  # saved as one zero, since Orbax refuses it
  steps = _block_shape(array, whole_axis)
  axes = [
    [slice(i, min(i + step, size)) for i in range(0, size, step)]
    for step, size in zip(steps, shape, strict=True)
  ]
  for index in itertools.product(*axes):
    if any(
      all(
        cut.start < stop and start < cut.stop
        for cut, (start, stop) in zip(index, bounds, strict=True)
      )
      for bounds in held
    ):
      yield index
