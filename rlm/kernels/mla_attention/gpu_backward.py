"""Expanded latent attention on Hopper, backward: two kernels, no atomics.

Both make the scores and their weights anew from the log-sum-exp, and ds, the
gradient of the scores, each for the sums that it owns; so every sum has one
order and a step repeats bit for bit. As in the forward kernel a block has two
warpgroups that compute and one that fetches tiles ahead; a tile whose keys are
all seen is not masked.

`dq`: a block has one head and 128 queries, and goes over tiles of keys.

`dk`: a block has 128 keys and `dk_heads` heads, one after the other, and goes
over tiles of queries; scores lie on their side, so that what is added up over
queries is a left operand from registers. The gradient to the rope key is over
all heads. It stays in registers for the heads of a block and leaves as float32,
one partial sum for each group of heads, which XLA adds. Per key that writes and
reads 4 R N / dk_heads bytes, 8 + 8 KiB for 128 heads by 4, beside 64 KiB that
the other two gradients write. One head a block would make that 32 + 32 KiB; all
heads in one would leave S / 128 blocks, too few to fill the chip.

With H = h = 128, R = 64, `dq` by tiles of 64 keys in three stages, `dk` by
tiles of 32 queries in six:

| what | `dq` | `dk` |
|---|---|---|
| SMEM: what a block keeps; gradients leave through it | 81 KiB | 81 KiB |
| SMEM: tiles on their way or in use | 122 KiB | 123 KiB |
| registers of a thread: gradients, float32 | 64 + 32 | 64 + 64 + 32 |
| registers: scores and the gradients of weights | 32 + 32 | 16 + 16 |

A thread can have 240 registers if the warpgroup that fetches keeps 24. Larger
tiles do not fit: by ptxas 12.9, `dk` with 64 queries a tile keeps the gradient
to the rope key in memory and makes each product wait for the one before, and
`dq` with 128 keys moves half a KiB a thread to memory and back.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rlm.kernels.backend import interpretation
from rlm.kernels.mla_attention.gpu_forward import (
  LOG2_E,
  drain,
  masked_places,
  seen,
  visits,
)
from rlm.kernels.mla_attention.gpu_products import (
  COMPUTING,
  ROWS,
  multiply,
  multiply_turned,
  spare_memory,
)
from rlm.kernels.mla_attention.tiles import GpuTiles


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


def _dq_kernel(
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


def _dk_kernel(
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


def heads_of_a_block(heads: int, most: int) -> int:
  """The greatest divisor of `heads` that is at most `most`."""
  return next(n for n in range(min(heads, most), 0, -1) if heads % n == 0)


def backward(
  q_nope: jax.Array,
  q_rope: jax.Array,
  k_nope: jax.Array,
  k_rope: jax.Array,
  v: jax.Array,
  q_places: jax.Array,
  kv_places: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  d_out: jax.Array,
  *,
  scale: float,
  tiles: GpuTiles,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients of attention of whole tiles.

  Args:
    q_nope: [B, T, N, H]; T is a multiple of COMPUTING * ROWS and of
      `tiles.dk_queries`.
    q_rope: [B, T, N, R].
    k_nope: [B, S, N, H]; S is a multiple of COMPUTING * ROWS and of
      `tiles.dq_keys`.
    k_rope: [B, S, R].
    v: [B, S, N, h].
    q_places: int32 [B, 2, T]: positions, segment ids.
    kv_places: int32 [B, 2, S].
    lse: float32 [B, N, T], finite.
    delta: float32 [B, N, T]: what the gradient of each weight is lessened by,
      the sum of out * d_out less the gradient of lse; finite.
    d_out: [B, T, N, h], the gradient of out, in the dtype of `q_nope`.
    scale: factor on the scores.
    tiles: of this chip.

  Returns:
    dq_nope, dq_rope, dk_nope, dk_rope and dv, shaped as what they belong to, in
    its dtype but dk_rope, which is float32.
  """
  b, t, n, h_nope = q_nope.shape
  s, h_rope, h_v, dtype = (
    k_nope.shape[1],
    q_rope.shape[3],
    v.shape[3],
    q_nope.dtype,
  )
  q_places, kv_places = masked_places(q_places, kv_places)
  operands = (
    q_nope,
    q_rope,
    k_nope,
    k_rope,
    v,
    q_places,
    kv_places,
    d_out,
    jnp.stack([lse * LOG2_E, delta], axis=2),
  )
  block, widths = COMPUTING * ROWS, (h_nope, h_rope, h_v)
  make = functools.partial(
    plgpu.kernel,
    num_threads=COMPUTING + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpretation(),
  )

  def operand(count, tokens, width, added_up):
    """Scratch in rows of as many numbers as one product adds up, up to 64."""
    row = min(added_up, 64)
    swizzle = plgpu.SwizzleTransform(row * dtype.itemsize)
    transforms = (plgpu.TilingTransform((8, row)), swizzle)
    return plgpu.SMEM((count, tokens, width), dtype, transforms=transforms)

  def of_queries(count, tokens, added_up):
    return {
      "q_nope": operand(count, tokens, h_nope, added_up),
      "q_rope": operand(count, tokens, h_rope, added_up),
      "q_places": plgpu.SMEM((count, 2, tokens), jnp.int32),
      "d_out": operand(count, tokens, h_v, added_up),
      "sums": plgpu.SMEM((count, 2, tokens), jnp.float32),
      "q_ready": plgpu.Barrier(num_arrivals=5, num_barriers=count),
    }

  def of_keys(count, tokens, added_up):
    return {
      "k_nope": operand(count, tokens, h_nope, added_up),
      "k_rope": operand(count, tokens, h_rope, added_up),
      "kv_places": plgpu.SMEM((count, 2, tokens), jnp.int32),
      "v": operand(count, tokens, h_v, added_up),
    }

  def done(count):
    return plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=count)

  keys, stages = tiles.dq_keys, tiles.dq_stages
  dq_nope, dq_rope = make(
    functools.partial(_dq_kernel, scale=scale),
    out_type=[
      jax.ShapeDtypeStruct(q_nope.shape, dtype),
      jax.ShapeDtypeStruct(q_rope.shape, dtype),
    ],
    grid=(b, n, t // block),
    grid_names=("row", "head", "queries"),
    scratch_types={
      **of_queries(COMPUTING, ROWS, keys),
      **of_keys(stages, keys, keys),
      "k_ready": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
      "k_done": done(stages),
      "spare": spare_memory(keys, widths, dtype),
    },
    kernel_name="mla_attention_dq",
  )(visits(q_places, kv_places, block, keys), *operands)

  queries, stages = tiles.dk_queries, tiles.dk_stages
  heads = heads_of_a_block(n, tiles.dk_heads)
  both = plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTING)
  dk_nope, dk_rope, dv = make(
    functools.partial(_dk_kernel, scale=scale, heads=heads),
    out_type=[
      jax.ShapeDtypeStruct(k_nope.shape, dtype),
      jax.ShapeDtypeStruct((n // heads, *k_rope.shape), jnp.float32),
      jax.ShapeDtypeStruct(v.shape, dtype),
    ],
    grid=(b, n // heads, s // block),
    grid_names=("row", "heads", "keys"),
    scratch_types={
      **of_keys(COMPUTING, ROWS, queries),
      **of_queries(stages, queries, queries),
      "kv_ready": both,
      "shared_ready": both,
      "q_done": done(stages),
      "spare": spare_memory(queries, widths, dtype),
    },
    kernel_name="mla_attention_dk",
  )(visits(q_places, kv_places, queries, block, by_keys=True), *operands)
  return dq_nope, dq_rope, dk_nope, dk_rope.sum(axis=0), dv
