"""Expanded latent attention on a TPU, forward.

Grid (B, N, tiles of queries, spans of keys). A span of keys and values of one
head stays in VMEM while the queries pass by; the rope key, which all heads
share, is read once a row. Several spans come anew for each tile of queries.

Inside a step a loop goes over the tiles of keys that the tile of queries may
see, with the running maximum and sum of the softmax (arXiv:2205.14135). Queries
are sublanes, keys are lanes. Rope parts come with their R numbers as sublanes,
since a TPU pads 64 lanes to 128, in HBM too.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rlm.kernels.attention import MASKED
from rlm.kernels.backend import interpretation
from rlm.kernels.mla_attention.rounding import lost
from rlm.kernels.mla_attention.tiles import Cut
from rlm.kernels.mla_attention.visible import (
  hull,
  tile_bounds,
  tiles_that_meet,
)
from rlm.kernels.product import ROWS_BY_COLUMNS, ROWS_BY_ROWS, contract

LANES = 128


def column(row: jax.Array) -> jax.Array:
  """[1, L] along lanes -> [L, 1] along sublanes."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _kernel(
  start_ref,  # int32 [B, query tiles]: the first tile of keys seen
  stop_ref,  # and the one after the last
  q_nope_ref,  # [queries, H]
  q_rope_ref,  # [R, queries]
  k_nope_ref,  # [span, H]
  k_rope_ref,  # [R, span]
  v_ref,  # [span, h]
  q_places_ref,  # int32 [2, queries]: positions, segments
  kv_places_ref,  # int32 [2, span]
  out_ref,  # [queries, h]
  softmax_ref,  # float32 [2, queries]: maximum and sum
  *refs,  # int8 [queries / 2, h]: what rounding took, if asked; and scratch
  scale: float,
  keys: int,
):
  *lost_refs, q_rope_rows_ref, top_ref, total_ref, sum_ref = refs
  row, query_tile, span = pl.program_id(0), pl.program_id(2), pl.program_id(3)

  @pl.when(span == 0)
  def _():
    q_rope_rows_ref[...] = q_rope_ref[...].T
    top_ref[...] = jnp.full_like(top_ref, MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  q_position = column(q_places_ref[0:1, :])
  q_segment = column(q_places_ref[1:2, :])

  def visit(tile, _):
    here = pl.ds(tile * keys, keys)
    scores = contract(q_nope_ref[...], k_nope_ref[here, :], ROWS_BY_ROWS)
    scores += contract(
      q_rope_rows_ref[...], k_rope_ref[:, here], ROWS_BY_COLUMNS
    )
    seen = q_segment == kv_places_ref[1:2, here]
    seen &= q_position >= kv_places_ref[0:1, here]
    seen &= q_segment != 0
    scores = jnp.where(seen, scores * scale, MASKED)
    old_top = top_ref[:, :1]
    top = jnp.maximum(old_top, scores.max(axis=1, keepdims=True))
    # Without a key yet, top = MASKED would turn masked scores into weights 1.
    weights = jnp.exp(scores - jnp.maximum(top, MASKED / 2))
    shrink = jnp.exp(old_top - top)
    total = shrink * total_ref[:, :1] + weights.sum(axis=1, keepdims=True)
    top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
    sum_ref[...] = shrink * sum_ref[...] + contract(
      weights.astype(v_ref.dtype), v_ref[here, :], ROWS_BY_COLUMNS
    )

  tiles = k_nope_ref.shape[0] // keys
  start = jnp.maximum(start_ref[row, query_tile] - span * tiles, 0)
  stop = jnp.minimum(stop_ref[row, query_tile] - span * tiles, tiles)
  jax.lax.fori_loop(start, stop, visit, None)

  @pl.when(span == pl.num_programs(3) - 1)
  def _():
    total = total_ref[:, :1]
    exact = sum_ref[...] / jnp.where(total > 0, total, 1.0)
    out = exact.astype(out_ref.dtype)
    out_ref[...] = out
    for ref in lost_refs:
      ref[...] = lost(exact, out)
    softmax_ref[0:1, :] = top_ref[...].T[:1, :]
    softmax_ref[1:2, :] = total_ref[...].T[:1, :]


def forward(
  q_nope: jax.Array,
  q_rope: jax.Array,
  k_nope: jax.Array,
  k_rope: jax.Array,
  v: jax.Array,
  q_places: jax.Array,
  kv_places: jax.Array,
  *,
  scale: float,
  q_cut: Cut,
  kv_cut: Cut,
  vmem_bytes: int,
  keep_lost: bool,
) -> list[jax.Array]:
  """Attention of whole tiles.

  Args:
    q_nope: [B, N, T, H].
    q_rope: [B, N, R, T].
    k_nope: [B, N, S, H].
    k_rope: [B, R, S].
    v: [B, N, S, h].
    q_places: int32 [B, 2, T]: positions, segment ids.
    kv_places: int32 [B, 2, S].
    scale: factor on the scores.
    q_cut: T in tiles.
    kv_cut: S in tiles, and in spans that VMEM holds.
    vmem_bytes: that the kernel may take.
    keep_lost: whether to give the last result.

  Returns:
    out [B, N, T, h] in the dtype of `q_nope`; float32 [B, N, 2, T], the maximum
    of a query's scores and the sum of their exponentials relative to it, 0
    where it sees no key; and, if asked, int8 [B, N, T / 2, h], what `restored`
    needs to take back the rounding of each tile of queries of bfloat16.
  """
  b, n, t, h_nope = q_nope.shape
  s, h_rope, h_v = k_nope.shape[2], q_rope.shape[2], v.shape[3]
  queries, keys, span = q_cut.tile, kv_cut.tile, kv_cut.held
  meet = tiles_that_meet(
    tile_bounds(q_places[:, 0], q_places[:, 1], queries),
    tile_bounds(kv_places[:, 0], kv_places[:, 1], keys),
  )
  start, stop = hull(meet)

  def span_seen(row, i, j, start_ref, stop_ref):
    """Spans without a key to see are not fetched: the nearest one stays."""
    # `//` asks for the sign, which Mosaic lowers only where a chip is at hand.
    first = jax.lax.div(start_ref[row, i] * keys, span)
    last = jax.lax.div((jnp.maximum(stop_ref[row, i], 1) - 1) * keys, span)
    return jnp.clip(j, first, last)

  def of_queries(width):
    return pl.BlockSpec(
      (None, None, queries, width), lambda b, n, i, j, *_: (b, n, i, 0)
    )

  def of_keys(width):
    return pl.BlockSpec(
      (None, None, span, width),
      lambda b, n, i, j, *refs: (b, n, span_seen(b, i, j, *refs), 0),
    )

  def of_all_heads(width):
    return pl.BlockSpec(
      (None, width, span),
      lambda b, n, i, j, *refs: (b, 0, span_seen(b, i, j, *refs)),
    )

  reads = spans_read(t // queries, s // span, t == s)
  operands = (q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places)
  out_shape = [
    jax.ShapeDtypeStruct((b, n, t, h_v), q_nope.dtype),
    jax.ShapeDtypeStruct((b, n, 2, t), jnp.float32),
  ]
  lost_shape = jax.ShapeDtypeStruct((b, n, t // 2, h_v), jnp.int8)
  out_shape += [lost_shape] * keep_lost
  return pl.pallas_call(
    functools.partial(_kernel, scale=scale, keys=keys),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(b, n, t // queries, s // span),
      in_specs=[
        of_queries(h_nope),
        pl.BlockSpec(
          (None, None, h_rope, queries), lambda b, n, i, j, *_: (b, n, 0, i)
        ),
        of_keys(h_nope),
        of_all_heads(h_rope),
        of_keys(h_v),
        pl.BlockSpec((None, 2, queries), lambda b, n, i, j, *_: (b, 0, i)),
        of_all_heads(2),
      ],
      out_specs=[
        of_queries(h_v),
        pl.BlockSpec(
          (None, None, 2, queries), lambda b, n, i, j, *_: (b, n, 0, i)
        ),
        *[
          pl.BlockSpec(
            (None, None, queries // 2, h_v), lambda b, n, i, j, *_: (b, n, i, 0)
          )
        ]
        * keep_lost,
      ],
      scratch_shapes=[
        pltpu.VMEM((queries, h_rope), q_rope.dtype),
        pltpu.VMEM((queries, LANES), jnp.float32),  # maximum
        pltpu.VMEM((queries, LANES), jnp.float32),  # sum of weights
        pltpu.VMEM((queries, h_v), jnp.float32),  # sum of weighted values
      ],
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=vmem_bytes,
    ),
    cost_estimate=estimate(
      b * n * pairs_seen(t, s),
      flops=2 * (h_nope + h_rope + h_v),
      bytes_accessed=bytes_of(q_nope, q_rope, q_places, *out_shape)
      + bytes_of(k_nope, v) * reads
      # One span of them stays for all heads of a row.
      + bytes_of(k_rope, kv_places) * (1 if s == span else n * reads),
    ),
    interpret=interpretation(),
    name="mla_attention_forward",
  )(start, stop, *operands)


def pairs_seen(t: int, s: int) -> int:
  """Query-key pairs that are reckoned with: half where T = S, all else.

  What is seen depends on positions, which a program does not know ahead.
  """
  return t * (t + 1) // 2 if t == s else t * s


def spans_read(tiles: int, spans: int, causal: bool) -> float:
  """How often all keys of a head pass HBM, of which VMEM holds a span.

  One span stays while all tiles of queries pass; several come anew for each.
  """
  if spans == 1:
    return 1.0
  return tiles * (spans + 1) / (2 * spans) if causal else float(tiles)


def estimate(
  pairs: int, *, flops: int, bytes_accessed: float
) -> pl.CostEstimate:
  """For XLA's scheduler and our counts.

  Args:
    pairs: of queries and keys, over rows and heads.
    flops: of a pair.
    bytes_accessed: read and written in HBM.
  """
  return pl.CostEstimate(
    flops=pairs * flops,
    transcendentals=pairs,
    bytes_accessed=int(bytes_accessed),
  )


def bytes_of(*arrays: jax.Array | jax.ShapeDtypeStruct) -> int:
  """Of all of them, each once."""
  return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
