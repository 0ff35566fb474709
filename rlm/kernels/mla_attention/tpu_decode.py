"""`mla_decode` by the kernel for TPU: any cache, as tiles to visit."""

import jax
import jax.numpy as jnp

from rlm.kernels.attention import attention_mask
from rlm.kernels.backend import chip
from rlm.kernels.mla_attention import tpu_decode_kernel as kernel
from rlm.kernels.mla_attention.caches import (
  Cache,
  Float8Latents,
  PagedLatents,
  shape_of,
)
from rlm.kernels.mla_attention.parts import join_parts
from rlm.kernels.mla_attention.tiles import padded, tpu_tiles
from rlm.kernels.mla_attention.tpu_forward import LANES
from rlm.kernels.mla_attention.visits import visited_tiles

_DTYPES = (jnp.bfloat16, jnp.float32)
# A bit of an int32 for each query that may see a token.
_MOST_QUERIES = 31


def decode_obstacle(q: jax.Array, kv: Cache, kv_lora_rank: int) -> str | None:
  """Why `decode` cannot run these operands, or None."""
  if tpu_tiles() is None:
    return f"{chip()!r} has no row in rlm/kernels/mla_attention/tiles.py"
  if q.dtype not in _DTYPES:
    return f"queries are {q.dtype}; it takes bfloat16 or float32"
  if q.shape[1] > _MOST_QUERIES:
    return f"{q.shape[1]} queries a row; it takes up to {_MOST_QUERIES}"
  latents = kv.pages if isinstance(kv, PagedLatents) else kv
  if isinstance(latents, Float8Latents):
    if latents.k_rope.dtype != q.dtype:
      return f"rope keys are {latents.k_rope.dtype}, queries {q.dtype}"
  elif latents.dtype != q.dtype:
    return f"the cache is {latents.dtype}, queries are {q.dtype}"
  tokens = shape_of(latents)[2]
  if tokens % LANES:
    held = "a page" if isinstance(kv, PagedLatents) else "a row"
    return f"{held} has room for {tokens} tokens, no multiple of {LANES}"
  return None


def decode(
  q: jax.Array,
  kv: Cache,
  q_positions: jax.Array,
  kv_positions: jax.Array,
  q_segment_ids: jax.Array,
  kv_segment_ids: jax.Array,
  selected: jax.Array | None,
  *,
  kv_lora_rank: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """`mla_decode` by the kernel; its arguments."""
  tiles = tpu_tiles()
  assert tiles is not None  # else `decode_obstacle` had one
  b, t, n, _ = q.shape
  mask = attention_mask(
    q_positions, kv_positions, q_segment_ids, kv_segment_ids, selected
  )
  latents = kv.pages if isinstance(kv, PagedLatents) else kv
  tokens = shape_of(latents)[2]
  tile = _tile(tokens, tiles.decode_keys)
  tile_ids, counts = visited_tiles(mask, tile)
  held = tokens // tile
  if isinstance(kv, PagedLatents):
    pages = jnp.take_along_axis(kv.page_table, tile_ids // held, axis=1)
    places = pages * held + tile_ids % held
  else:
    places = jnp.arange(b, dtype=jnp.int32)[:, None] * held + tile_ids
  shifts = jnp.arange(t, dtype=jnp.int32)[None, :, None]
  bits = (mask.astype(jnp.int32) << shifts).sum(axis=1, keepdims=True)
  if isinstance(latents, Float8Latents):
    cache = [latents.latent, latents.scales, latents.k_rope]
  else:
    cache = [latents]
  # Rows that divide among the cores need no parts, which cost float32 outputs.
  cores = tiles.decode_splits
  splits = 1 if b % cores == 0 else cores
  rows, padding = _block(t * n, tiles.decode_rows * 2 // q.dtype.itemsize)
  out, lse = kernel.decode(
    padded(q.reshape(b, t * n, -1), 1, t * n + padding),
    cache,
    bits,
    tile_ids,
    places,
    counts,
    scale=scale,
    heads=n,
    width=kv_lora_rank,
    tile=tile,
    tiles_per_step=max(min(tiles.decode_keys // tile, tile_ids.shape[1]), 1),
    splits=splits,
    rows=rows,
    vmem_bytes=tiles.vmem_bytes,
  )
  out = out[:, :, : t * n].reshape(b, splits, t, n, -1)
  lse = lse[:, :, : t * n].reshape(b, splits, t, n).swapaxes(2, 3)
  if splits == 1:
    return out[:, 0], lse[:, 0]
  out, lse = join_parts(out.swapaxes(0, 1), lse.swapaxes(0, 1))
  return out.astype(q.dtype), lse


def _block(rows: int, most: int) -> tuple[int, int]:
  """Rows in each of few even blocks of up to `most`, and padding of the last.

  A block of several is a multiple of 16 rows, a tile of 16 bits.
  """
  blocks = -(-rows // most)
  if blocks == 1:
    return rows, 0
  block = -(-rows // (16 * blocks)) * 16
  return block, block * blocks - rows


def _tile(tokens: int, most: int) -> int:
  """The greatest multiple of 128 up to `most` that divides `tokens`."""
  lanes = tokens // LANES
  return LANES * max(
    n for n in range(1, lanes + 1) if lanes % n == 0 and n * LANES <= most
  )
