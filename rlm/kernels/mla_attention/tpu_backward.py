"""Expanded latent attention on a TPU, backward, all five gradients at once.

Grid (groups of heads, B, heads of the group, tiles of keys). All queries of a
head, and the gradients of its queries, stay in VMEM while its tiles of keys
pass by, so that scores are made once: five products a tile (arXiv:2205.14135,
algorithm 4) and no atomic sum. Keys are sublanes here and queries lanes, which
makes rows of what belongs to a query (lse, delta, position, segment).

The gradient of the rope key adds up over the heads of a group in VMEM. There
are two groups where heads are even, one for each core of a chip that has two
behind one device; XLA adds the two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rlm.kernels.attention import MASKED
from rlm.kernels.backend import interpretation
from rlm.kernels.mla_attention.tiles import Cut
from rlm.kernels.mla_attention.tpu_forward import (
  bytes_of,
  column,
  estimate,
)
from rlm.kernels.mla_attention.visible import (
  hull,
  tile_bounds,
  tiles_that_meet,
)
from rlm.kernels.product import (
  COLUMNS_BY_COLUMNS,
  ROWS_BY_COLUMNS,
  ROWS_BY_ROWS,
  contract,
)


def _kernel(
  start_ref,  # int32 [B, key tiles]: the first tile of queries that sees it
  stop_ref,  # and the one after the last
  q_nope_ref,  # [T, H]
  q_rope_ref,  # [R, T]
  k_nope_ref,  # [keys, H]
  k_rope_ref,  # [R, keys]
  v_ref,  # [keys, h]
  q_places_ref,  # int32 [2, T]
  kv_places_ref,  # int32 [2, keys]
  softmax_ref,  # float32 [3, T]: maximum, 1 / sum, delta
  d_out_ref,  # [T, h]
  dq_nope_ref,  # [T, H]
  dq_rope_ref,  # [R, T]
  dk_nope_ref,  # [keys, H]
  dk_rope_ref,  # float32 [R, S], of a group of heads
  dv_ref,  # [keys, h]
  dq_nope_sum_ref,  # scratch float32 [T, H]
  dq_rope_sum_ref,  # scratch float32 [R, T]
  k_rope_rows_ref,  # scratch [keys, R]
  dk_nope_sum_ref,  # scratch float32 [keys, H]
  dk_rope_sum_ref,  # scratch float32 [R, keys]
  dv_sum_ref,  # scratch float32 [keys, h]
  *,
  scale: float,
  queries: int,
):
  row, head, key_tile = pl.program_id(1), pl.program_id(2), pl.program_id(3)

  @pl.when(key_tile == 0)
  def _():
    dq_nope_sum_ref[...] = jnp.zeros_like(dq_nope_sum_ref)
    dq_rope_sum_ref[...] = jnp.zeros_like(dq_rope_sum_ref)

  k_rope_rows_ref[...] = k_rope_ref[...].T
  for ref in (dk_nope_sum_ref, dk_rope_sum_ref, dv_sum_ref):
    ref[...] = jnp.zeros_like(ref)
  kv_position = column(kv_places_ref[0:1, :])
  kv_segment = column(kv_places_ref[1:2, :])
  dtype = q_nope_ref.dtype

  def visit(tile, _):
    here = pl.ds(tile * queries, queries)
    q_nope, q_rope = q_nope_ref[here, :], q_rope_ref[:, here]
    d_out = d_out_ref[here, :]
    scores = contract(k_nope_ref[...], q_nope, ROWS_BY_ROWS)  # [keys, queries]
    scores += contract(k_rope_rows_ref[...], q_rope, ROWS_BY_COLUMNS)
    q_segment = q_places_ref[1:2, here]
    seen = q_segment == kv_segment
    seen &= q_places_ref[0:1, here] >= kv_position
    seen &= q_segment != 0
    # As forward made them: log-sum-exp in one number would lose digits.
    scores = jnp.where(seen, scores * scale, MASKED)
    probs = jnp.exp(scores - softmax_ref[0:1, here]) * softmax_ref[1:2, here]
    dv_sum_ref[...] += contract(probs.astype(dtype), d_out, ROWS_BY_COLUMNS)
    d_probs = contract(v_ref[...], d_out, ROWS_BY_ROWS)
    d_scores = probs * (d_probs - softmax_ref[2:3, here]) * scale
    d_scores = d_scores.astype(dtype)
    dk_nope_sum_ref[...] += contract(d_scores, q_nope, ROWS_BY_COLUMNS)
    dk_rope_sum_ref[...] += contract(q_rope, d_scores, ROWS_BY_ROWS)
    dq_nope_sum_ref[here, :] += contract(
      d_scores, k_nope_ref[...], COLUMNS_BY_COLUMNS
    )
    dq_rope_sum_ref[:, here] += contract(
      k_rope_ref[...], d_scores, ROWS_BY_COLUMNS
    )

  jax.lax.fori_loop(
    start_ref[row, key_tile], stop_ref[row, key_tile], visit, None
  )
  dk_nope_ref[...] = dk_nope_sum_ref[...].astype(dk_nope_ref.dtype)
  dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)
  keys = k_nope_ref.shape[0]
  these = pl.ds(key_tile * keys, keys)

  @pl.when(head == 0)
  def _():
    dk_rope_ref[:, these] = dk_rope_sum_ref[...]

  @pl.when(head > 0)
  def _():
    dk_rope_ref[:, these] += dk_rope_sum_ref[...]

  @pl.when(key_tile == pl.num_programs(3) - 1)
  def _():
    dq_nope_ref[...] = dq_nope_sum_ref[...].astype(dq_nope_ref.dtype)
    dq_rope_ref[...] = dq_rope_sum_ref[...].astype(dq_rope_ref.dtype)


def backward(
  q_nope: jax.Array,
  q_rope: jax.Array,
  k_nope: jax.Array,
  k_rope: jax.Array,
  v: jax.Array,
  q_places: jax.Array,
  kv_places: jax.Array,
  softmax: jax.Array,
  d_out: jax.Array,
  *,
  scale: float,
  q_cut: Cut,
  kv_cut: Cut,
  out_dtype: Any,
  vmem_bytes: int,
  pairs: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients of what `tpu_forward.forward` takes, for T that VMEM holds.

  Args:
    q_nope: [B, N, T, H].
    q_rope: [B, N, R, T].
    k_nope: [B, N, S, H].
    k_rope: [B, R, S].
    v: [B, N, S, h].
    q_places: int32 [B, 2, T]: positions, segment ids.
    kv_places: int32 [B, 2, S].
    softmax: float32 [B, N, 3, T]: the maximum and one over the sum of
      `forward`, 0 where that is 0; and delta, the sum over h of d_out * out
      less the gradient of lse.
    d_out: [B, N, T, h].
    scale: factor on the scores.
    q_cut: T in tiles.
    kv_cut: S in tiles.
    out_dtype: of the gradients.
    vmem_bytes: that the kernel may take.
    pairs: of queries and keys of a head that see each other, reckoned.

  Returns:
    dq_nope, dq_rope, dk_nope, dk_rope and dv, of the shapes of their operands;
    dk_rope is float32 whatever `out_dtype`.
  """
  b, n, t, h_nope = q_nope.shape
  s, h_rope, h_v = k_nope.shape[2], q_rope.shape[2], v.shape[3]
  queries, keys = q_cut.tile, kv_cut.tile
  groups = 2 if n % 2 == 0 else 1
  heads = n // groups
  meet = tiles_that_meet(
    tile_bounds(q_places[:, 0], q_places[:, 1], queries),
    tile_bounds(kv_places[:, 0], kv_places[:, 1], keys),
  )
  start, stop = hull(meet.swapaxes(1, 2))

  def whole(*shape):
    return pl.BlockSpec(
      (None, None, *shape), lambda g, b, n, i, *_: (b, g * heads + n, 0, 0)
    )

  def tile(width):
    return pl.BlockSpec(
      (None, None, keys, width), lambda g, b, n, i, *_: (b, g * heads + n, i, 0)
    )

  def of_all_heads(width):
    return pl.BlockSpec((None, width, keys), lambda g, b, n, i, *_: (b, 0, i))

  places = (q_places, kv_places)
  operands = (q_nope, q_rope, k_nope, k_rope, v, *places, softmax, d_out)
  out_shape = (
    jax.ShapeDtypeStruct(q_nope.shape, out_dtype),
    jax.ShapeDtypeStruct(q_rope.shape, out_dtype),
    jax.ShapeDtypeStruct(k_nope.shape, out_dtype),
    jax.ShapeDtypeStruct((groups, b, h_rope, s), jnp.float32),
    jax.ShapeDtypeStruct(v.shape, out_dtype),
  )
  dq_nope, dq_rope, dk_nope, dk_rope, dv = pl.pallas_call(
    functools.partial(_kernel, scale=scale, queries=queries),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(groups, b, heads, s // keys),
      in_specs=[
        whole(t, h_nope),
        whole(h_rope, t),
        tile(h_nope),
        of_all_heads(h_rope),
        tile(h_v),
        pl.BlockSpec((None, 2, t), lambda g, b, n, i, *_: (b, 0, 0)),
        of_all_heads(2),
        whole(3, t),
        whole(t, h_v),
      ],
      out_specs=[
        whole(t, h_nope),
        whole(h_rope, t),
        tile(h_nope),
        pl.BlockSpec(
          (None, None, h_rope, s), lambda g, b, n, i, *_: (g, b, 0, 0)
        ),
        tile(h_v),
      ],
      scratch_shapes=[
        pltpu.VMEM((t, h_nope), jnp.float32),
        pltpu.VMEM((h_rope, t), jnp.float32),
        pltpu.VMEM((keys, h_rope), k_rope.dtype),
        pltpu.VMEM((keys, h_nope), jnp.float32),
        pltpu.VMEM((h_rope, keys), jnp.float32),
        pltpu.VMEM((keys, h_v), jnp.float32),
      ],
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
      vmem_limit_bytes=vmem_bytes,
    ),
    cost_estimate=estimate(
      b * n * pairs,
      flops=2 * (3 * h_nope + 3 * h_rope + 2 * h_v),
      bytes_accessed=bytes_of(*operands, *out_shape),
    ),
    interpret=interpretation(),
    name="mla_attention_backward",
  )(start, stop, *operands)
  return dq_nope, dq_rope, dk_nope, dk_rope.sum(axis=0), dv
