"""A leaf in the making: each device's part of it, written block by block.

No leaf is gathered first. On a CPU the devices' memory is the host's: there a
part is an array of numpy that becomes jax's without a copy, written by a few
threads. Elsewhere it is an array of the device, updated in place.
"""

import collections
import concurrent.futures
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rlm.checkpoint.published_names import Tensor

# Numbers of a block; large tensors are cut along their stored rows. Beside the
# leaves, memory holds a few of them.
_BLOCK_SIZE = 1 << 20
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class _HostPart:
  """What a CPU device holds of a leaf: memory that jax will use as it is."""

  def __init__(self, shape: tuple[int, ...], dtype: Any, device: jax.Device):
    self._device = device
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64  # jax copies what is aligned to less
    self._array = memory[start : start + size].view(dtype).reshape(shape)

  def write(self, piece: np.ndarray, at: tuple[slice | int, ...]) -> None:
    # As bits, which numpy copies without holding up the other threads. A
    # bfloat16 is the upper half of a float32 whose lower half is 0.
    array = self._array
    if piece.dtype == _BFLOAT16 and array.dtype in (_BFLOAT16, np.float32):
      bits = array.view(np.uint16)
      if array.dtype == np.float32:
        bits = bits[..., 1::2]
      bits[at] = piece.view(np.uint16)
    else:
      array[at] = piece

  def finish(self) -> jax.Array:
    return jax.device_put(self._array, self._device)


class _DevicePart:
  """What another device holds of a leaf."""

  def __init__(self, shape: tuple[int, ...], dtype: Any, device: jax.Device):
    self._device = device
    self._buffer = jnp.zeros(shape, dtype, device=device)

  def write(self, piece: np.ndarray, at: tuple[slice | int, ...]) -> None:
    starts = tuple(np.int32(i.start if isinstance(i, slice) else i) for i in at)
    # The wait lets one block be written while the next is read; more would
    # pile up on the host.
    jax.block_until_ready(self._buffer)
    # Turned here by the device and not by the host, whose time it would take.
    turned = piece.ndim == 2 and piece.strides[0] < piece.strides[1]
    piece = jax.device_put(piece.T if turned else piece, self._device)
    self._buffer = _update(self._buffer, piece, starts, turned)

  def finish(self) -> jax.Array:
    return self._buffer


@functools.partial(jax.jit, static_argnames="turned", donate_argnames="buffer")
def _update(buffer, piece, starts, turned):
  """`piece` in `buffer`, in place."""
  piece = piece.T if turned else piece
  lead = (1,) * (buffer.ndim - piece.ndim)
  piece = piece.astype(buffer.dtype).reshape(lead + piece.shape)
  return jax.lax.dynamic_update_slice(buffer, piece, starts)


class LeafParts:
  """The parts of one leaf on the devices of this process.

  Args:
    leaf: a `jax.ShapeDtypeStruct`.
    sharding: of the leaf.
    on_host: whether parts are written on the host; None asks the devices.
  """

  def __init__(
    self,
    leaf: Any,
    sharding: jax.sharding.Sharding,
    *,
    on_host: bool | None = None,
  ):
    self._leaf, self._sharding = leaf, sharding
    self._parts = []
    indices: Any = sharding.addressable_devices_indices_map(leaf.shape)
    for device, index in indices.items():
      host = device.platform == "cpu" if on_host is None else on_host
      bounds = tuple(
        part.indices(size)[:2]
        for part, size in zip(index, leaf.shape, strict=True)
      )
      shape = tuple(stop - start for start, stop in bounds)
      made = (_HostPart if host else _DevicePart)(shape, leaf.dtype, device)
      self._parts.append((bounds, made))
    self.workers = 1
    if isinstance(made, _HostPart):
      self.workers = min(os.cpu_count() or 1, 8)

  def _holders(self, tensor: Tensor) -> list[tuple[Any, Any]]:
    """(bounds, part) of those that hold some of a tensor."""
    return [
      (bounds, part)
      for bounds, part in self._parts
      if all(
        start <= place < stop
        for place, (start, stop) in zip(tensor.place, bounds, strict=False)
      )
    ]

  def bounds(self, tensor: Tensor) -> list[tuple[tuple[int, int], ...]]:
    """(start, stop) per axis of a tensor, of each part that holds some."""
    lead, turn = len(tensor.place), -1 if tensor.transposed else 1
    return [bounds[lead:][::turn] for bounds, _ in self._holders(tensor)]

  def write(
    self, tensor: Tensor, index: tuple[slice, ...], block: np.ndarray
  ) -> None:
    """Writes a block to every part that holds some of it.

    Args:
      tensor: where it comes from.
      index: `tensor[index]` is the block; one of `blocks`.
      block: of any float or integer dtype.
    """
    holders, all_bounds = self._holders(tensor), self.bounds(tensor)
    for (lead, part), bounds in zip(holders, all_bounds, strict=True):
      cut, inside = [], []
      for (start, stop), whole in zip(bounds, index, strict=True):
        first, last = max(start, whole.start), min(stop, whole.stop)
        cut.append(slice(first - whole.start, max(first, last) - whole.start))
        inside.append(slice(first - start, max(first, last) - start))
      piece = block[tuple(cut)]
      if not piece.size:
        continue
      if tensor.transposed:
        piece, inside = piece.T, inside[::-1]
      places = zip(tensor.place, lead, strict=False)
      part.write(piece, (*(i - start for i, (start, _) in places), *inside))

  def finish(self) -> jax.Array:
    """The leaf; nothing can be written any more."""
    return jax.make_array_from_single_device_arrays(
      self._leaf.shape,
      self._sharding,
      [part.finish() for _, part in self._parts],
    )


def blocks(
  tensor: Tensor, *leaves: LeafParts, whole_rows: bool = False
) -> Iterator[tuple[slice, ...]]:
  """What to read of a tensor, block by block, for the parts of some leaves.

  Args:
    tensor: the tensor.
    *leaves: what is made of it.
    whole_rows: never cut a row.

  Yields:
    Indices into the tensor. None crosses a border between parts, so that
    devices compile few shapes.
  """
  held = [bounds for leaf in leaves for bounds in leaf.bounds(tensor)]
  borders = sorted({at for bounds in held for at in bounds[0]})
  for first, last in itertools.pairwise(borders):
    over = [b for b in held if b[0][0] <= first and last <= b[0][1]]
    if not over:
      continue
    rest = [
      (0, size)
      if whole_rows
      else (min(b[axis][0] for b in over), max(b[axis][1] for b in over))
      for axis, size in enumerate(tensor.shape[1:], start=1)
    ]
    row = math.prod(stop - start for start, stop in rest)
    step = min(max(1, _BLOCK_SIZE // max(row, 1)), last - first)
    for start in range(first, last, step):
      # The last block reaches back, so that it has the shape of the others.
      start = min(start, last - step)
      yield (slice(start, start + step), *(slice(*cut) for cut in rest))


def for_each(tasks: Iterable[Callable[[], None]], *, workers: int) -> None:
  """Runs tasks by threads; few wait at a time, since each holds a block."""
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    try:
      for task in tasks:
        waiting.append(pool.submit(task))
        if len(waiting) > 2 * workers:
          waiting.popleft().result()
      while waiting:
        waiting.popleft().result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
