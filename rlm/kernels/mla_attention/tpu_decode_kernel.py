"""Latent attention over the cache on a TPU.

Grid (B, splits, blocks, steps). A step takes a few tiles of the cache from HBM,
each once, and uses them as keys and as values: [W, tile] with tokens along
lanes, which pads nothing. Only tiles that a query of the row sees are visited,
by a list made before, through which pages are found too.

The rows of a product are heads of new tokens, of all T * N where VMEM holds
them: else a block of them, each of which reads the cache anew. The running
maximum and sum of the softmax stay in VMEM from step to step.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rlm.kernels.attention import MASKED
from rlm.kernels.backend import interpretation
from rlm.kernels.mla_attention.caches import GROUP
from rlm.kernels.mla_attention.tpu_forward import LANES, bytes_of, estimate
from rlm.kernels.product import ROWS_BY_COLUMNS, ROWS_BY_ROWS, contract


def _plain_scores(q_ref, kv_ref):
  return contract(q_ref[...], kv_ref[...], ROWS_BY_COLUMNS)


def _plain_sum(weights, kv_ref, *, width):
  return contract(weights.astype(kv_ref.dtype), kv_ref[:width, :], ROWS_BY_ROWS)


def _groups(latent_ref):
  return [pl.ds(i, GROUP) for i in range(0, latent_ref.shape[0], GROUP)]


def _float8_scores(q_ref, latent_ref, scales_ref, k_rope_ref):
  """Scales multiply scores, of which there are fewer than latents."""
  dtype, width = q_ref.dtype, latent_ref.shape[0]
  scores = contract(q_ref[:, width:], k_rope_ref[...], ROWS_BY_COLUMNS)
  for i, group in enumerate(_groups(latent_ref)):
    latent = latent_ref[group, :].astype(dtype)
    scale = scales_ref[i : i + 1, :]
    scores += scale * contract(q_ref[:, group], latent, ROWS_BY_COLUMNS)
  return scores


def _float8_sum(weights, latent_ref, scales_ref, *_, width, dtype):
  parts = []
  for i, group in enumerate(_groups(latent_ref)):
    scaled = (weights * scales_ref[i : i + 1, :]).astype(dtype)
    parts.append(
      contract(scaled, latent_ref[group, :].astype(dtype), ROWS_BY_ROWS)
    )
  return jnp.concatenate(parts, axis=1)


def _kernel(
  counts_ref,  # int32 [B]: tiles that a row visits
  *refs,
  scale: float,
  heads: int,
  width: int,  # C
  tiles: int,  # of a step
  arrays: int,  # of a tile: 1, or 3 in float8
):
  """Refs of one step.

  Tables of tiles for the index maps (unused here); q [rows, C + R] of a block;
  then of each tile its arrays and int32 [1, tile] bits, bit t of which says
  whether query t sees the key; out [rows, C] and lse float32 [rows, 1] of a
  split; scratch: top and total float32 [rows, LANES], sum float32 [rows, C].
  """
  _, _, q_ref, *cache_refs = refs[:-5]
  out_ref, lse_ref, top_ref, total_ref, sum_ref = refs[-5:]
  row, split, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)
  first_row = pl.program_id(2) * q_ref.shape[0]
  score = _plain_scores if arrays == 1 else _float8_scores
  add = functools.partial(_plain_sum, width=width)
  if arrays > 1:
    add = functools.partial(_float8_sum, width=width, dtype=q_ref.dtype)

  @pl.when(step == 0)
  def start():
    top_ref[...] = jnp.full_like(top_ref, MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  # Steps of a split: as even as whole steps allow.
  steps = jax.lax.div(
    counts_ref[row] + pl.num_programs(1) * tiles - 1, pl.num_programs(1) * tiles
  )
  first = (split * steps + step) * tiles

  @pl.when((step < steps) & (first < counts_ref[row]))
  def visit():
    rows = q_ref.shape[0]
    nth = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) + first_row
    # Rows that pad the last block see nothing: bit 31 is never set.
    query = jnp.minimum(jax.lax.div(nth, heads), 31)
    scores = []
    for i in range(tiles):
      *cache, bits_ref = cache_refs[i * (arrays + 1) :][: arrays + 1]
      seen = (jax.lax.shift_right_logical(bits_ref[...], query) & 1) == 1
      # A list that ends in the step repeats its last tile.
      seen &= first + i < counts_ref[row]
      tile_scores = score(q_ref, *cache)
      scores.append(jnp.where(seen, tile_scores * scale, MASKED))
    old_top = top_ref[:, :1]
    top = old_top
    for s in scores:
      top = jnp.maximum(top, s.max(axis=1, keepdims=True))
    shrink = jnp.exp(old_top - top)
    total = shrink * total_ref[:, :1]
    sums = shrink * sum_ref[...]
    for i, s in enumerate(scores):
      *cache, _ = cache_refs[i * (arrays + 1) :][: arrays + 1]
      # Without a key yet, top = MASKED would turn masked scores to weights 1.
      weights = jnp.exp(s - jnp.maximum(top, MASKED / 2))
      total += weights.sum(axis=1, keepdims=True)
      sums += add(weights, *cache)
    top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
    sum_ref[...] = sums

  @pl.when(step == pl.num_programs(3) - 1)
  def finish():
    total = total_ref[:, :1]
    safe = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (sum_ref[...] / safe).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(
      total > 0, jnp.log(safe) + top_ref[:, :1], -jnp.inf
    )


def decode(
  q: jax.Array,
  cache: Sequence[jax.Array],
  bits: jax.Array,
  tile_ids: jax.Array,
  places: jax.Array,
  counts: jax.Array,
  *,
  scale: float,
  heads: int,
  width: int,
  tile: int,
  tiles_per_step: int,
  splits: int,
  rows: int,
  vmem_bytes: int,
) -> tuple[jax.Array, jax.Array]:
  """Attention of each split over the tiles that fall to it.

  Args:
    q: [B, Q, C + R], the T * N heads of queries, queries first; padded to whole
      blocks.
    cache: arrays of [rows or pages, ., tokens]: one of C + R, or latents,
      scales and rope keys of Float8Latents.
    bits: int32 [B, 1, S], bit t says whether query t of the row sees a key; bit
      31 is 0.
    tile_ids: int32 [B, visits], of `visited_tiles`.
    places: int32 [B, visits]: row or page of `cache` times the tiles that one
      holds, plus the tile within it.
    counts: int32 [B], visits of a row.
    scale: factor on the scores.
    heads: N.
    width: C.
    tile: tokens of a tile, a divisor of the tokens of a row or page.
    tiles_per_step: tiles taken at once.
    splits: parts of a row's visits, with results of their own.
    rows: of q in a block, a divisor of Q.
    vmem_bytes: that the kernel may take.

  Returns:
    out [B, splits, Q, C], in the dtype of `q` for one split, else float32; lse
    float32 [B, splits, Q].
  """
  b, all_rows, _ = q.shape
  visits = tile_ids.shape[1]
  held = cache[0].shape[2] // tile  # tiles of a row or page
  steps = pl.cdiv(pl.cdiv(visits, tiles_per_step), splits)

  def visited(b, split, step, counts, i):
    """Which of the row's visits; past the last one, the last again."""
    per_split = jax.lax.div(
      counts[b] + splits * tiles_per_step - 1, splits * tiles_per_step
    )
    # Steps beyond those of the split fetch nothing new.
    step = jnp.minimum(step, jnp.maximum(per_split - 1, 0))
    at = (split * per_split + step) * tiles_per_step + i
    return jnp.minimum(at, visits - 1)

  def of_cache(array, i):
    def index(b, split, block, step, counts, tile_ids, places):
      place = places[b, visited(b, split, step, counts, i)]
      return jax.lax.div(place, held), 0, jax.lax.rem(place, held)

    return pl.BlockSpec((None, array.shape[1], tile), index)

  def of_bits(i):
    def index(b, split, block, step, counts, tile_ids, places):
      return b, 0, tile_ids[b, visited(b, split, step, counts, i)]

    return pl.BlockSpec((None, 1, tile), index)

  specs, operands = [], []
  for i in range(tiles_per_step):
    specs += [of_cache(array, i) for array in cache] + [of_bits(i)]
    operands += [*cache, bits]

  def of_block(width):
    return pl.BlockSpec(
      (None, None, rows, width), lambda b, p, r, *_: (b, p, r, 0)
    )

  out_dtype = q.dtype if splits == 1 else jnp.float32
  out_shape = (
    jax.ShapeDtypeStruct((b, splits, all_rows, width), out_dtype),
    jax.ShapeDtypeStruct((b, splits, all_rows, 1), jnp.float32),
  )
  blocks, tokens = all_rows // rows, visits * tile
  per_block = [
    jax.ShapeDtypeStruct((b, array.shape[1], tokens), array.dtype)
    for array in cache
  ]
  out, lse = pl.pallas_call(
    functools.partial(
      _kernel,
      scale=scale,
      heads=heads,
      width=width,
      tiles=tiles_per_step,
      arrays=len(cache),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(b, splits, blocks, steps),
      in_specs=[
        pl.BlockSpec((None, rows, q.shape[2]), lambda b, p, r, *_: (b, r, 0)),
        *specs,
      ],
      out_specs=[of_block(width), of_block(1)],
      scratch_shapes=[
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, width), jnp.float32),
      ],
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem_bytes,
    ),
    cost_estimate=estimate(
      b * all_rows * tokens,
      flops=2 * (q.shape[2] + width),
      bytes_accessed=bytes_of(q, *out_shape)
      + blocks * bytes_of(bits, *per_block),
    ),
    interpret=interpretation(),
    name="mla_decode",
  )(counts, tile_ids, places, q, *operands)
  return out, lse[..., 0]
