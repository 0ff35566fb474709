"""Absorbed latent attention on Hopper, in Mosaic GPU: FlashMLA's arrangement.

A block has 64 rows of queries (a row: one head of one token), one row of the
batch and a part of its cache, which it walks along in tiles of 64 tokens. A
tile is copied to SMEM once and is key and value. One warpgroup multiplies
queries by it, masks, takes the softmax online and leaves the weights in SMEM;
it and a second one each multiply them by half of the latents; a third keeps the
copy engine ahead (gpu_decode_block.py). Parts are joined by XLA.

Which tiles a row visits is a list made by XLA from the mask (visits.py); the
mask itself comes as one integer a key, a bit for each token.

Sums are [64 rows, C], as FlashMLA's, where a call has more than 32 rows. With
fewer they are turned: latents, [C, tokens] as they lie, are the left operand
and weights the right one, of 16 or 32 columns instead of 64 rows, of which most
would be padding. At 16 heads a token then takes the tensor cores 26 cycles, 18
for scores and 8 to read its latents from SMEM once more, not 34; an SM of 132
gets one each 54 cycles, at 1.7 GHz and 4.8 TB/s.

Float8 codes are turned into 16 bits, times their scales, before they are
multiplied, each half of a tile by the warpgroup that accumulates it: scores and
values want the same numbers, those that the reference takes, and tensor cores
could not put a scale of every token and 128 latents in between.

At C = 512, R = 64:

| what | bfloat16 | float8 |
|---|---|---|
| read of the cache, bytes a token | 1152 | 656 |
| read beside it, bytes a token: the mask | 4 | 4 |
| SMEM: queries | 72 KiB | 72 KiB |
| SMEM: a tile as it is copied | 72 KiB | 41 KiB, of which 8 KiB once |
| SMEM: the tile in 16 bits | | 64 KiB |
| SMEM: weights | 8 KiB | 8 KiB |
| SMEM in two stages | 226 KiB | 220 KiB |
| registers of a thread: sums, a product's | 128 + 64 | 128 + 64 |

A block of 64 rows writes 128 KiB of sums, as much as 114 tokens take to read
(of 16 rows: 32 KiB), which `splits` weighs. Blocks of the same tokens are
neighbours, so that of 128 heads one block of two reads from the L2 cache.

Tokens are the minor axis, so a tile is C + R runs of 128 bytes. In pages of 64
tokens they follow each other; in larger ones and in plain caches they are a
page's or a row's length apart, and only parts of the same row, which take its
tiles in turn, read on where another has stopped.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from rlm.kernels.attention import attention_mask
from rlm.kernels.backend import chip, interpretation
from rlm.kernels.mla_attention.caches import (
  GROUP,
  Cache,
  Float8Latents,
  Latents,
  PagedLatents,
  shape_of,
)
from rlm.kernels.mla_attention.gpu_decode_block import (
  KEYS,
  SLAB,
  Sizes,
  block,
  scratch,
  smem_bytes,
)
from rlm.kernels.mla_attention.gpu_products import (
  ROWS,
  SMEM_BYTES,
  other_chip,
)
from rlm.kernels.mla_attention.parts import join_parts
from rlm.kernels.mla_attention.tiles import GpuTiles, gpu_tiles
from rlm.kernels.mla_attention.visits import visited_tiles

_DTYPES = (jnp.bfloat16, jnp.float16)
# Sums of 64 x 512 are all the registers that two warpgroups have to spare.
_MOST_LATENTS = 512
# Bits of a key's mask.
_MOST_TOKENS = 32


def _latents(kv: Cache) -> Latents:
  """Those of pages, or of rows."""
  return kv.pages if isinstance(kv, PagedLatents) else kv


def decode_obstacle(q: jax.Array, kv: Cache, kv_lora_rank: int) -> str | None:
  """Why `decode` cannot run these operands, or None."""
  tiles = gpu_tiles()
  if tiles is None:
    return other_chip()
  _, t, _, width = q.shape
  latents = _latents(kv)
  if isinstance(latents, Float8Latents):
    held, multiple = latents.k_rope, GROUP
    if latents.latent.dtype != jnp.float8_e4m3fn:
      return f"latents are {latents.latent.dtype}; it takes float8_e4m3fn"
  else:
    held, multiple = latents, SLAB
  if q.dtype != held.dtype or q.dtype not in _DTYPES:
    return (
      f"queries are {q.dtype} and keys {held.dtype}; it takes both in bfloat16"
      " or both in float16"
    )
  rope = width - kv_lora_rank
  if kv_lora_rank % multiple or not 0 < kv_lora_rank <= _MOST_LATENTS:
    return f"C is {kv_lora_rank}; it takes multiples of {multiple} to 512"
  if rope % 16 or rope <= 0:
    return f"R is {rope}; it takes multiples of 16"
  if t > _MOST_TOKENS:
    return f"a row has {t} query tokens; it takes {_MOST_TOKENS}"
  room = held.shape[-1]
  if room % KEYS:
    unit = "a page" if isinstance(kv, PagedLatents) else "a row of the cache"
    return f"{unit} has room for {room} tokens; it takes multiples of {KEYS}"
  taken = smem_bytes(_sizes(q, kv, kv_lora_rank, 1.0, tiles))
  if taken > SMEM_BYTES:
    return (
      f"C and R are {kv_lora_rank} and {rope}, whose tiles take {taken} bytes"
      f" of shared memory; there are {SMEM_BYTES}"
    )
  return None


def splits_of(
  blocks: int, tiles: int, columns: int, multiprocessors: int
) -> int:
  """Into how many parts the tiles of a row are split.

  A multiprocessor has one block at a time, so time goes as waves of blocks;
  each pays for its tiles and, in tiles, for its queries and the sums that it
  writes and XLA reads again.

  Args:
    blocks: of one part.
    tiles: of a row, at most.
    columns: rows of queries that a block writes.
    multiprocessors: of the chip.
  """
  overhead = 2 + columns / 16

  def time(splits):
    waves = -(-blocks * splits // multiprocessors)
    return waves * (-(-tiles // splits) + overhead)

  most = max(1, min(tiles, multiprocessors))
  return min(range(1, most + 1), key=time)


def _sizes(
  q: jax.Array, kv: Cache, kv_lora_rank: int, scale: float, tiles: GpuTiles
) -> Sizes:
  """What the call fixes: with all the stages that fit into SMEM, at least 1."""
  b, t, n, width = q.shape
  s = shape_of(kv)[2]
  columns = next((x for x in (16, 32) if t * n <= x), ROWS)
  sizes = Sizes(
    heads=n,
    kv_lora_rank=kv_lora_rank,
    rope=width - kv_lora_rank,
    columns=columns,
    splits=splits_of(
      b * -(-t * n // ROWS), s // KEYS, columns, tiles.multiprocessors
    ),
    stages=tiles.decode_stages,
    page=shape_of(_latents(kv))[2],
    scale=scale,
    float8=isinstance(_latents(kv), Float8Latents),
  )
  while sizes.stages > 1 and smem_bytes(sizes) > SMEM_BYTES:
    sizes = dataclasses.replace(sizes, stages=sizes.stages - 1)
  return sizes


def _places(kv: Cache, ids: jax.Array, page: int) -> jax.Array:
  """int32 [B, tiles]: where tiles `ids` of rows are, counted over all pages."""
  per_page = page // KEYS
  if isinstance(kv, PagedLatents):
    pages = jnp.take_along_axis(kv.page_table, ids // per_page, axis=1)
    return pages * per_page + ids % per_page
  return jnp.arange(len(ids), dtype=jnp.int32)[:, None] * per_page + ids


def decode(
  q: jax.Array,
  kv: Cache,
  q_positions: jax.Array,
  kv_positions: jax.Array,
  q_segment_ids: jax.Array,
  kv_segment_ids: jax.Array,
  selected: jax.Array | None = None,
  *,
  kv_lora_rank: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """`mla_decode` by the kernel; its arguments."""
  tiles = gpu_tiles()
  assert tiles is not None, chip()
  sizes = _sizes(q, kv, kv_lora_rank, scale, tiles)
  b, t, n, width = q.shape
  rows, splits = t * n, sizes.splits
  mask = attention_mask(
    q_positions, kv_positions, q_segment_ids, kv_segment_ids, selected
  )
  ids, counts = visited_tiles(mask, KEYS)
  token = jnp.arange(t, dtype=jnp.int32)[None, :, None]
  bits = (mask.astype(jnp.int32) << token).sum(axis=1, dtype=jnp.int32)
  blocks = -(-rows // ROWS)
  padding = ((0, 0), (0, blocks * sizes.columns - rows), (0, 0))
  latents = _latents(kv)
  if isinstance(latents, Float8Latents):
    codes = lax.bitcast_convert_type(latents.latent, jnp.int8)
    arrays = [codes, latents.scales, latents.k_rope]
  else:
    arrays = [latents]
  if sizes.turned:
    out_shape = (splits, b, kv_lora_rank, sizes.columns)
  else:
    out_shape = (splits, b, blocks * ROWS, kv_lora_rank)
  outs, lses = plgpu.kernel(
    functools.partial(block, sizes=sizes),
    out_type=(
      jax.ShapeDtypeStruct(out_shape, jnp.float32),
      jax.ShapeDtypeStruct((splits, b, blocks * ROWS), jnp.float32),
    ),
    scratch_types=scratch(sizes, q.dtype),
    # Blocks that differ in the last index alone read the same tiles.
    grid=(b, splits, blocks),
    grid_names=("b", "split", "rows"),
    num_threads=3,
    thread_name="group",
    compiler_params=plgpu.CompilerParams(
      approx_math=True, reduction_scratch_bytes=0
    ),
    interpret=interpretation(),
    kernel_name="mla_decode",
  )(
    jnp.pad(q.reshape(b, rows, width), padding),
    bits,
    ids,
    _places(kv, ids, sizes.page),
    counts,
    *arrays,
  )
  if sizes.turned:
    outs = outs.swapaxes(2, 3)
  out, lse = join_parts(
    outs[:, :, :rows].reshape(splits, b, t, n, kv_lora_rank),
    lses[:, :, :rows].reshape(splits, b, t, n).swapaxes(2, 3),
  )
  return out.astype(q.dtype), lse
