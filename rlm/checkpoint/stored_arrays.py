"""The arrays of a checkpoint, read block by block straight to their devices.

Orbax restores all arrays at once and gathers each on the host, of every one of
several devices anew: twice the model and more (`tools/bench_load --own`). What
it writes is an open format, a zarr array per leaf in one OCDBT store, of which
tensorstore reads any part. So no leaf is ever gathered: memory holds the target
and a few blocks. A chunk is read whole; `chunked` has Orbax write small ones,
and a checkpoint from before it has one chunk per leaf.

The checkpoint must stay while it is read: what is lost is an error, and never
zeros, as zarr would have it.
"""

import contextlib
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator
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
# Least part of that for a chunk to be: each costs about 0.1 ms, so that the
# rows of an embedding, one by one, would take longer to find than to read.
_LEAST_PART = 64
_KEPT_BLOCKS = 24  # one for each kind of matrix of a layer, and a few more


def chunked(leaf: Any) -> ocp.SaveArgs:
  """How Orbax shall cut a leaf: into what a reader can hold beside the model.

  Chunks are whole matrices (of layers, of experts) where these are small
  enough, so that one is read alone and its channels lie together. Orbax takes
  no shape of chunks, but axes to cut into single indices, and bytes down to
  which it cuts the rest, by divisors. Where a size has few of them, as a prime
  vocabulary, that would end in chunks of single rows: then other axes are cut.

  Args:
    leaf: the array to save.
  """
  itemsize = leaf.dtype.itemsize
  size, lead = leaf.size * itemsize, 0
  while size > _BLOCK_BYTES and lead < leaf.ndim - 2:
    size //= leaf.shape[lead]
    lead += 1
  sharding = getattr(leaf, "sharding", None)  # numpy's have none
  written = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
  divided = [n < whole for n, whole in zip(written, leaf.shape, strict=True)]
  least = min(_BLOCK_BYTES // _LEAST_PART, math.prod(written) * itemsize)

  def choices(axes):
    sizes = (math.prod(c) * itemsize for c in _cuts(written, divided, axes))
    return [(size, axes) for size in sizes if size >= least]

  every = [
    choice
    for count in range(leaf.ndim + 1)
    for axes in itertools.combinations(range(leaf.ndim), count)
    for choice in choices(axes)
  ]
  for some in (choices(tuple(range(lead))), every):
    if fitting := [choice for choice in some if choice[0] <= _BLOCK_BYTES]:
      size, axes = max(fitting, key=lambda choice: choice[0])
      break
  else:
    size, axes = min(every, key=lambda choice: choice[0])
  # Orbax warns of less than 1 MiB, and stops at the same chunk with more.
  return ocp.SaveArgs(chunk_byte_size=max(size, _BLOCK_BYTES), shard_axes=axes)


def _cuts(
  written: tuple[int, ...], divided: list[bool], axes: tuple[int, ...]
) -> Iterator[list[int]]:
  """Shapes of chunks that Orbax comes by, given `shard_axes`, largest first.

  Args:
    written: the shape of what one device holds.
    divided: per axis, whether devices hold parts of it; cut first.
    axes: `shard_axes`.
  """
  chunk = [1 if i in axes else n for i, n in enumerate(written)]
  yield chunk
  while math.prod(chunk) > 1:
    first = [n if cut else 1 for n, cut in zip(chunk, divided, strict=True)]
    sizes = first if math.prod(first) > 1 else chunk
    axis = sizes.index(max(sizes))
    n = chunk[axis]
    factors = (i for i in range(2, math.isqrt(n) + 1) if n % i == 0)
    chunk = [*chunk[:axis], n // next(factors, n), *chunk[axis + 1 :]]
    yield chunk


class StoredArrays:
  """A tree of dicts of arrays within a saved state.

  Args:
    folder: Orbax's folder of the state.
    field: top-level field of the state, such as "variables".
    shapes: the field as `jax.ShapeDtypeStruct`s.
  """

  def __init__(self, folder: pathlib.Path, field: str, shapes: Any):
    self.shapes = shapes
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    self._leaves = {leaf_name(path): leaf for path, leaf in leaves}
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
      ValueError: a matrix for int8 is not finite, or the checkpoint
        disappeared.
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
      place: index into its leading axes; those behind stay whole. Neighbours
        are best read one soon after the other: they come in the same block.

    Raises:
      ValueError: the checkpoint disappeared.
    """
    leaf = self._leaves[name]
    if not leaf.size:  # saved as one zero, since Orbax refuses it
      return np.zeros(leaf.shape[len(place) :], leaf.dtype)
    steps = _block_shape(self._open(name))[: len(place)]
    starts = tuple(i // n * n for i, n in zip(place, steps, strict=True))
    shared = any(step > 1 for step in steps)
    block = (self._kept if shared else self._read_block)(name, starts, steps)
    inside = (i - start for i, start in zip(place, starts, strict=True))
    index: Any = (*inside, ...)  # with it, even a scalar is an array
    return block[index]

  def _read_block(self, name, starts, steps) -> np.ndarray:
    array = self._open(name)
    index = tuple(
      slice(start, min(start + step, size))
      for start, step, size in zip(starts, steps, array.shape, strict=False)
    )
    return read_array(array, index)

  def _load_leaf(self, name: str, leaf: Any, sharding: Any) -> jax.Array:
    """One leaf, made block by block on the devices that hold it."""
    parts, whole = LeafParts(leaf, sharding), _whole(leaf)
    array = self._open(name)

    def copy(index):
      block = read_array(array, index)
      if not leaf.ndim:  # a part casts by views, which numpy has of no scalar
        block = block.astype(leaf.dtype)
      parts.write(whole, index, block)

    held = parts.bounds(whole)
    _for_each_block(copy, array, leaf.shape, held, workers=parts.workers)
    return parts.finish()

  def _load_int8(self, name, dtype, leaf: Int8Matrix, sharding) -> Int8Matrix:
    """An Int8Matrix; the inputs that share a scale are read together.

    So a block is as wide as a chunk and as high as the matrix: 72 MiB of V3's
    largest in float32, of which few are held at a time.
    """
    values = LeafParts(leaf.values, sharding.values)
    scale = LeafParts(leaf.scale, sharding.scale)
    array = self._open(name)

    def convert(index):
      block = read_array(array, index)
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

    # A process may hold a scale of values that it does not.
    held = [
      *values.bounds(_whole(leaf.values)),
      *scale.bounds(_whole(leaf.scale)),
    ]
    _for_each_block(
      convert,
      array,
      leaf.shape,
      held,
      workers=values.workers,
      whole_axis=-2,
    )
    return Int8Matrix(values.finish(), scale.finish())


def open_array(folder: pathlib.Path, name: str) -> tensorstore.TensorStore:
  """An array that Orbax saved, to read parts of.

  Args:
    folder: Orbax's folder of the state.
    name: keys of the array joined by dots.

  Raises:
    ValueError: it is not there (any more).
  """
  base = {"driver": "file", "path": f"{folder}/"}
  store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
  # Orbax writes chunks of zeros too, so that none is missing.
  spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
  with _disappearance_named():
    return tensorstore.open(spec).result()


def read_array(array: tensorstore.TensorStore, index: Any = ...) -> np.ndarray:
  """A part of an array of `open_array`.

  Args:
    array: the array.
    index: of the part; `...` is all of it.

  Raises:
    ValueError: it is not there any more.
  """
  with _disappearance_named():
    return array[index].read().result()


@contextlib.contextmanager
def _disappearance_named() -> Iterator[None]:
  """Turns tensorstore's NOT_FOUND into words about checkpoints."""
  try:
    yield
  except ValueError as error:
    if not str(error).startswith("NOT_FOUND"):
      raise
    what = str(error).split(" [")[0]  # a page of its settings follows
    raise ValueError(
      "the checkpoint disappeared, or lost files, while it was read: a run"
      " that goes on deletes its oldest. Read again, which takes the newest;"
      " if it comes again, stop the run or raise its keep_checkpoints."
      f" ({what})"
    ) from error


def _whole(leaf: Any) -> Tensor:
  """A leaf as one tensor, for LeafParts."""
  return Tensor("", (), False, leaf.shape)


def _block_shape(
  array: tensorstore.TensorStore, whole_axis: int | None = None
) -> tuple[int, ...]:
  """What to read at once: a chunk, or neighbours while they stay small."""
  layout: Any = array.chunk_layout  # its fields are optional in general
  shape = list(layout.read_chunk.shape or ())  # None of a scalar
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


def _for_each_block(
  work: Callable[[tuple[slice, ...]], None],
  array: tensorstore.TensorStore,
  shape: tuple[int, ...],
  held: list[tuple[tuple[int, int], ...]],
  *,
  workers: int,
  whole_axis: int | None = None,
) -> None:
  """Calls `work` with the index of each block, by threads.

  Args:
    work: reads the block and writes it to the parts.
    array: what is read.
    shape: of the leaf.
    held: bounds of the parts.
    workers: threads, at most. Where blocks are large there are fewer, so that
      together they hold about 4 blocks of `_BLOCK_BYTES` for each.
    whole_axis: an axis that no block cuts.
  """
  if not math.prod(shape):
    return  # saved as one zero, since Orbax refuses it
  steps = _block_shape(array, whole_axis)
  block_bytes = math.prod(steps) * array.dtype.numpy_dtype.itemsize
  room = max(1, 4 * workers * _BLOCK_BYTES // block_bytes)
  tasks = (
    functools.partial(work, index) for index in _blocks(steps, shape, held)
  )
  for_each(tasks, workers=min(workers, room))


def _blocks(
  steps: tuple[int, ...],
  shape: tuple[int, ...],
  held: list[tuple[tuple[int, int], ...]],
) -> Iterator[tuple[slice, ...]]:
  """Indices of the blocks of which some part holds anything, each once."""
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
