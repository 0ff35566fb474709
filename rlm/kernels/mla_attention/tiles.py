"""Tile sizes of the kernels, by chip, and lengths cut into them.

A TPU's are those that `tools/search_tiles.py` finds best, as docs/kernels.md
tells; of decode the second best, whose tiles are half as long. Hopper's follow
from registers and shared memory, by hand: `tools/bench_mla.py --gpu --tiles`,
which times choices of them, has not been run yet.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from rlm.hardware import chip_of_device_kind
from rlm.kernels.backend import chip


@dataclasses.dataclass(frozen=True)
class Cut:
  """A length cut into tiles, and into runs of tiles that VMEM holds.

  Attributes:
    tile: tokens, a multiple of 128 lanes.
    held: tokens, whole tiles.
    padded: the length, rounded up to whole runs.
  """

  tile: int
  held: int
  padded: int


def cut(length: int, tile: int, held: int) -> Cut:
  """Cuts into as few, as even tiles as `tile` and `held` tokens allow."""
  runs = -(-length // held)
  run = -(-length // runs)
  tiles = -(-run // tile)
  even = -(-run // tiles)
  lanes = -(-even // 128) * 128
  return Cut(lanes, lanes * tiles, lanes * tiles * runs)


def padded(x: jax.Array, axis: int, length: int) -> jax.Array:
  """Zeros at the end of an axis: padding tokens have segment 0."""
  if x.shape[axis] == length:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths)


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """What one step of a TPU's kernels takes, in tokens.

  Attributes:
    forward_queries: of a tile of scores of `mla_attention`, forward.
    forward_keys: likewise.
    forward_held: keys and values of one head in VMEM.
    backward_queries: of a tile of scores, backward.
    backward_keys: likewise.
    backward_held: queries of one head in VMEM, and keys of one call.
    decode_keys: latents in a step of `mla_decode`.
    decode_rows: heads of query tokens in a product there, at most; half as many
      in float32.
    decode_splits: cores of a device: parts of the cache that `mla_decode`
      attends to side by side, unless its rows divide among them.
    vmem_bytes: that a kernel may take.
  """

  forward_queries: int
  forward_keys: int
  forward_held: int
  backward_queries: int
  backward_keys: int
  backward_held: int
  decode_keys: int
  decode_rows: int
  decode_splits: int
  vmem_bytes: int


_MIB = 2**20
_TPU = {
  "v5e": TpuTiles(1024, 1024, 8192, 512, 512, 8192, 2048, 1024, 1, 96 * _MIB),
  "v5p": TpuTiles(1024, 1024, 8192, 512, 512, 8192, 2048, 1024, 2, 48 * _MIB),
  "v6e": TpuTiles(256, 1024, 8192, 512, 512, 8192, 2048, 1024, 1, 96 * _MIB),
  "tpu7x": TpuTiles(256, 1024, 8192, 512, 512, 8192, 2048, 1024, 1, 48 * _MIB),
}


def tpu_tiles() -> TpuTiles | None:
  """Tiles of the chip that programs are made for; None for one unknown."""
  if _tried and isinstance(_tried[-1], TpuTiles):
    return _tried[-1]
  known = chip_of_device_kind(chip())
  return _TPU.get(known.name) if known else None


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """What one step of a GPU's kernels takes, in tokens.

  Attributes:
    forward_keys: of a tile of scores of `mla_attention`, forward; its queries
      are 64 of each of two warpgroups, here and in `dq`.
    forward_stages: tiles of keys and values in SMEM at once, forward.
    dq_keys: of a tile of scores of the gradient to queries.
    dq_stages: tiles of keys and values at once, there.
    dk_queries: of a tile of scores of the gradient to keys and values; its
      keys are 64 of each of two warpgroups.
    dk_stages: tiles of queries at once, there.
    dk_heads: that a block adds up in the gradient to the rope key, at most.
    decode_stages: tiles of `mla_decode` in SMEM at once, at most.
    multiprocessors: that a call of `mla_decode` spreads over.
  """

  forward_keys: int
  forward_stages: int
  dq_keys: int
  dq_stages: int
  dk_queries: int
  dk_stages: int
  dk_heads: int
  decode_stages: int
  multiprocessors: int


_HOPPER = GpuTiles(128, 2, 64, 3, 32, 6, 4, 4, 132)
_GPU = dict.fromkeys(("H100", "H200", "H20", "H800"), _HOPPER)
_GPU["H20"] = dataclasses.replace(_HOPPER, multiprocessors=78)


def gpu_tiles() -> GpuTiles | None:
  """Tiles of the chip that programs are made for; None for one unknown.

  Device kinds say more than the chip, as "NVIDIA GH200 480GB".
  """
  if _tried and isinstance(_tried[-1], GpuTiles):
    return _tried[-1]
  return next((t for name, t in _GPU.items() if name in chip()), None)


_tried: list[TpuTiles | GpuTiles] = []


@contextlib.contextmanager
def trying(tiles: TpuTiles | GpuTiles) -> Iterator[None]:
  """Within it, kernels are traced with these tiles: a search, or a test."""
  _tried.append(tiles)
  try:
    yield
  finally:
    _tried.pop()
