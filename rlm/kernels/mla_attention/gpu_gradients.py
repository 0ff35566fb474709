"""What a block of `gpu_backward` does: gradients to queries, and to keys."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rlm.kernels.mla_attention.gpu_forward import drain, seen
from rlm.kernels.mla_attention.gpu_products import (
  COMPUTING,
  LOG2_E,
  ROWS,
  multiply,
  multiply_turned,
)


def _gradient_of_scores(
  products,
  whole,
  mask,
  lse,
  delta,
  *,
  query_axis,
  scale,
  spare,
  group,
):
  """The weights of a tile and the gradient of its scores, less the scale.

  Args:
    products: left and right operands in SMEM, of the scores two pairs, of the
      gradient of the weights one.
    whole: bool, whether no mask is needed.
    mask: () -> bool `shape`.
    lse: () -> float32 [queries], in bits.
    delta: () -> float32 [queries], what each gradient of a weight is lessened
      by.
    query_axis: that of the tile, 0 where queries are on the left.
    scale: factor on the scores.
    spare: of `spare_memory`.
    group: this warpgroup.

  Returns:
    weights and gradient, in the dtype of the operands.
  """
  left, right = products[0]
  shape, dtype = (left.shape[0], right.shape[0]), left.dtype

  def attend(scores_ref, d_weights_ref):
    accs = (scores_ref, scores_ref, d_weights_ref)
    for acc, (left, right) in zip(accs, products, strict=True):
      multiply_turned(acc, left, right, spare, group)
    # The exponentials are made while the last product still runs.
    scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
    scores = lax.cond(
      whole,
      lambda scores: scores,
      lambda scores: jnp.where(mask(), scores, -jnp.inf),
      scores,
    )
    spread = functools.partial(
      lax.broadcast_in_dim, shape=shape, broadcast_dimensions=(query_axis,)
    )
    weights = jnp.exp2(scores * (scale * LOG2_E) - spread(lse()))
    d_scores = weights * (d_weights_ref[...] - spread(delta()))
    return weights.astype(dtype), d_scores.astype(dtype)

  return pl.run_scoped(attend, plgpu.ACC(shape), plgpu.ACC(shape))


def dq_kernel(
  visits_ref,  # int32 [B, query tiles, 4]
  q_nope_ref,  # [B, T, N, H]
  q_rope_ref,  # [B, T, N, R]
  k_nope_ref,  # [B, S, N, H]
  k_rope_ref,  # [B, S, R]
  v_ref,  # [B, S, N, h]
  q_places_ref,  # int32 [B, 2, T]
  kv_places_ref,  # int32 [B, 2, S]
  d_out_ref,  # [B, T, N, h]
  sums_ref,  # float32 [B, N, 2, T]: lse in bits, delta
  dq_nope_ref,  # [B, T, N, H]
  dq_rope_ref,  # [B, T, N, R]
  *,
  scale: float,
  q_nope,  # SMEM [COMPUTING, ROWS, H]
  q_rope,
  q_places,
  d_out,
  sums,
  k_nope,  # SMEM [stages, keys, H]
  k_rope,
  v,
  kv_places,
  q_ready,  # barriers: of each computing warpgroup
  k_ready,  # of each stage
  k_done,
  spare,
):
  """A block of one head and 128 queries, over tiles of keys."""
  row, head = lax.axis_index("row"), lax.axis_index("head")
  tile = visits_ref.shape[1] - 1 - lax.axis_index("queries")
  group = lax.axis_index("warpgroup")
  stages, keys = k_nope.shape[:2]
  start, stop, whole_start, whole_stop = (
    visits_ref[row, tile, i] for i in range(4)
  )

  @pl.when(group < COMPUTING)
  def _compute():
    plgpu.set_max_registers(240, action="increase")
    mine = pl.ds((tile * COMPUTING + group) * ROWS, ROWS)
    for source, target in (
      (q_nope_ref.at[row, mine, head], q_nope),
      (q_rope_ref.at[row, mine, head], q_rope),
      (q_places_ref.at[row, :, mine], q_places),
      (d_out_ref.at[row, mine, head], d_out),
      (sums_ref.at[row, head, :, mine], sums),
    ):
      plgpu.copy_gmem_to_smem(source, target.at[group], q_ready.at[group])
    plgpu.barrier_wait(q_ready.at[group])
    lse, delta = sums[group, 0], sums[group, 1]

    def add_up(dq_nope_acc, dq_rope_acc):
      def visit(i, _):
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(k_ready.at[slot])

        def mask():
          here = (q_places[group, 0], q_places[group, 1])
          there = (kv_places[slot, 0], kv_places[slot, 1])
          plgpu.commit_smem()  # read before the copy engine writes there again
          return seen(here, there, (ROWS, keys), query_axis=0)

        _, d_scores = _gradient_of_scores(
          (
            (q_nope.at[group], k_nope.at[slot]),
            (q_rope.at[group], k_rope.at[slot]),
            (d_out.at[group], v.at[slot]),
          ),
          (start + i >= whole_start) & (start + i < whole_stop),
          mask,
          lambda: lse,
          lambda: delta,
          query_axis=0,
          scale=scale,
          spare=spare,
          group=group,
        )
        multiply(dq_nope_acc, d_scores, k_nope.at[slot], spare, group)
        multiply(dq_rope_acc, d_scores, k_rope.at[slot], spare, group)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(k_done.at[slot])

      lax.fori_loop(0, stop - start, visit, None)
      return dq_nope_acc[...], dq_rope_acc[...]

    dq_nope, dq_rope = pl.run_scoped(
      add_up,
      plgpu.ACC((ROWS, q_nope.shape[2])),
      plgpu.ACC((ROWS, q_rope.shape[2])),
    )
    q_nope[group] = (dq_nope * scale).astype(q_nope.dtype)
    q_rope[group] = (dq_rope * scale).astype(q_rope.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_nope.at[group], dq_nope_ref.at[row, mine, head])
    plgpu.copy_smem_to_gmem(q_rope.at[group], dq_rope_ref.at[row, mine, head])
    plgpu.wait_smem_to_gmem(0)

  @pl.when(group == COMPUTING)
  def _fetch():
    plgpu.set_max_registers(24, action="decrease")

    def fetch(i, _):
      slot = lax.rem(i, jnp.int32(stages))
      here = pl.ds((start + i) * keys, keys)

      @pl.when(i >= stages)
      def _wait():
        plgpu.barrier_wait(k_done.at[slot])

      for source, target in (
        (k_nope_ref.at[row, here, head], k_nope),
        (k_rope_ref.at[row, here], k_rope),
        (kv_places_ref.at[row, :, here], kv_places),
        (v_ref.at[row, here, head], v),
      ):
        plgpu.copy_gmem_to_smem(source, target.at[slot], k_ready.at[slot])

    lax.fori_loop(0, stop - start, fetch, None)
    drain(stop - start, stages, k_done)


def dk_kernel(
  visits_ref,  # int32 [B, key tiles, 4]
  q_nope_ref,  # [B, T, N, H]
  q_rope_ref,  # [B, T, N, R]
  k_nope_ref,  # [B, S, N, H]
  k_rope_ref,  # [B, S, R]
  v_ref,  # [B, S, N, h]
  q_places_ref,  # int32 [B, 2, T]
  kv_places_ref,  # int32 [B, 2, S]
  d_out_ref,  # [B, T, N, h]
  sums_ref,  # float32 [B, N, 2, T]: lse in bits, delta
  dk_nope_ref,  # [B, S, N, H]
  dk_rope_ref,  # float32 [N / heads, B, S, R]
  dv_ref,  # [B, S, N, h]
  *,
  scale: float,
  heads: int,
  k_nope,  # SMEM [COMPUTING, ROWS, H]
  k_rope,
  v,
  kv_places,
  q_nope,  # SMEM [stages, queries, H]
  q_rope,
  q_places,
  d_out,
  sums,
  kv_ready,  # barriers: of each computing warpgroup, for each head
  shared_ready,  # and for all heads
  q_ready,  # of each stage
  q_done,
  spare,
):
  """A block of 128 keys and a few heads, over tiles of queries."""
  row, heads_group = lax.axis_index("row"), lax.axis_index("heads")
  tile = lax.axis_index("keys")
  group = lax.axis_index("warpgroup")
  stages, queries = q_nope.shape[:2]
  start, stop, whole_start, whole_stop = (
    visits_ref[row, tile, i] for i in range(4)
  )
  count = stop - start

  @pl.when(group < COMPUTING)
  def _compute():
    plgpu.set_max_registers(240, action="increase")
    mine = pl.ds((tile * COMPUTING + group) * ROWS, ROWS)
    shared = shared_ready.at[group]
    plgpu.copy_gmem_to_smem(k_rope_ref.at[row, mine], k_rope.at[group], shared)
    plgpu.copy_gmem_to_smem(
      kv_places_ref.at[row, :, mine], kv_places.at[group], shared
    )
    plgpu.barrier_wait(shared)

    def add_up_heads(dk_rope_acc):
      def of_head(nth, _):
        head = heads_group * heads + nth
        ready = kv_ready.at[group]
        plgpu.copy_gmem_to_smem(
          k_nope_ref.at[row, mine, head], k_nope.at[group], ready
        )
        plgpu.copy_gmem_to_smem(v_ref.at[row, mine, head], v.at[group], ready)
        plgpu.barrier_wait(ready)

        def add_up(dk_nope_acc, dv_acc):
          def visit(i, _):
            slot = lax.rem(nth * count + i, jnp.int32(stages))
            plgpu.barrier_wait(q_ready.at[slot])

            def mask():
              here = (q_places[slot, 0], q_places[slot, 1])
              there = (kv_places[group, 0], kv_places[group, 1])
              return seen(here, there, (ROWS, queries), query_axis=1)

            weights, d_scores = _gradient_of_scores(
              (
                (k_nope.at[group], q_nope.at[slot]),
                (k_rope.at[group], q_rope.at[slot]),
                (v.at[group], d_out.at[slot]),
              ),
              (start + i >= whole_start) & (start + i < whole_stop),
              mask,
              lambda: sums[slot, 0],
              lambda: sums[slot, 1],
              query_axis=1,
              scale=scale,
              spare=spare,
              group=group,
            )
            multiply(dv_acc, weights, d_out.at[slot], spare, group)
            multiply(dk_nope_acc, d_scores, q_nope.at[slot], spare, group)
            multiply(dk_rope_acc, d_scores, q_rope.at[slot], spare, group)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # `sums` read before they are written again
            plgpu.barrier_arrive(q_done.at[slot])

          lax.fori_loop(0, count, visit, None)
          return dk_nope_acc[...], dv_acc[...]

        dk_nope, dv = pl.run_scoped(
          add_up,
          plgpu.ACC((ROWS, k_nope.shape[2])),
          plgpu.ACC((ROWS, v.shape[2])),
        )
        k_nope[group] = (dk_nope * scale).astype(k_nope.dtype)
        v[group] = dv.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          k_nope.at[group], dk_nope_ref.at[row, mine, head]
        )
        plgpu.copy_smem_to_gmem(v.at[group], dv_ref.at[row, mine, head])
        # The next head's keys and values come where these leave from.
        plgpu.wait_smem_to_gmem(0)

      lax.fori_loop(0, heads, of_head, None)
      return dk_rope_acc[...]

    dk_rope = pl.run_scoped(add_up_heads, plgpu.ACC((ROWS, k_rope.shape[2])))
    dk_rope_ref[heads_group, row, mine] = dk_rope * scale

  @pl.when(group == COMPUTING)
  def _fetch():
    plgpu.set_max_registers(24, action="decrease")

    def of_head(nth, _):
      head = heads_group * heads + nth

      def fetch(i, _):
        nth_tile = nth * count + i
        slot = lax.rem(nth_tile, jnp.int32(stages))
        here = pl.ds((start + i) * queries, queries)

        @pl.when(nth_tile >= stages)
        def _wait():
          plgpu.barrier_wait(q_done.at[slot])

        for source, target in (
          (q_nope_ref.at[row, here, head], q_nope),
          (q_rope_ref.at[row, here, head], q_rope),
          (q_places_ref.at[row, :, here], q_places),
          (d_out_ref.at[row, here, head], d_out),
          (sums_ref.at[row, head, :, here], sums),
        ):
          plgpu.copy_gmem_to_smem(source, target.at[slot], q_ready.at[slot])

      lax.fori_loop(0, count, fetch, None)

    lax.fori_loop(0, heads, of_head, None)
    drain(heads * count, stages, q_done)
