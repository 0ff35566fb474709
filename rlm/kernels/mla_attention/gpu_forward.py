"""Expanded latent attention on Hopper, forward; FlashAttention-3's arrangement.

A block has one head and 128 queries (arXiv:2407.08608). Two warpgroups compute,
64 queries each; a third fetches tiles of keys and values, `stages` ahead, with
the copy engine. The two take turns: while one has the tensor cores, the other
is at its softmax. Blocks of one head follow each other, the longest first, so
that a head's keys are read from the L2 cache by all its blocks but one, and the
rope key, which all heads share, nearly always.

Where all keys of a tile are seen, no mask is made.

With H = h = 128, R = 64 and tiles of 128 keys, in two stages:

| what | bytes |
|---|---|
| SMEM: queries, both parts; the output leaves through them | 48 KiB |
| SMEM: keys, both parts, and values of a stage | 80 KiB |
| registers of a thread: scores, or what their weights give of values | 64 |
| registers: the weights as operands, the output so far | 32 + 64 |

A block reads its queries and writes its output once, and reads the keys and
values that it sees; a mask of them is two integers a key.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rlm.kernels.attention import MASKED
from rlm.kernels.backend import interpretation
from rlm.kernels.mla_attention.gpu_products import (
  COMPUTING,
  LOG2_E,
  ROWS,
  multiply,
  multiply_turned,
  spare_memory,
)
from rlm.kernels.mla_attention.tiles import GpuTiles
from rlm.kernels.mla_attention.visible import (
  hull,
  tile_bounds,
  tiles_that_meet,
)

_INT = jnp.iinfo(jnp.int32)


def masked_places(
  q_places: jax.Array, kv_places: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Places whose positions alone keep padding from being seen.

  Segments are then only compared: padding shares segment 0, but no padding
  query stands at or after a padding key.

  Args:
    q_places: int32 [B, 2, T]: positions, segment ids.
    kv_places: int32 [B, 2, S].

  Returns:
    The same, padding queries before everything and padding keys after it.
  """

  def masked(places, position):
    positions, segments = places[:, 0], places[:, 1]
    positions = jnp.where(segments == 0, position, positions)
    return jnp.stack([positions, segments], axis=1)

  return masked(q_places, _INT.min), masked(kv_places, _INT.max)


def seen(
  q_places: tuple[jax.Array, jax.Array],
  kv_places: tuple[jax.Array, jax.Array],
  shape: tuple[int, int],
  query_axis: int,
) -> jax.Array:
  """Which keys the queries see, bool `shape`; places of `masked_places`.

  Args:
    q_places: positions and segments, int32 [queries] both.
    kv_places: int32 [keys] both.
    shape: of a tile of scores.
    query_axis: the axis of `shape` that is queries; the other is keys.
  """
  q_position, q_segment = (
    lax.broadcast_in_dim(x, shape, (query_axis,)) for x in q_places
  )
  kv_position, kv_segment = (
    lax.broadcast_in_dim(x, shape, (1 - query_axis,)) for x in kv_places
  )
  return (q_segment == kv_segment) & (q_position >= kv_position)


def visits(
  q_places: jax.Array,
  kv_places: jax.Array,
  queries: int,
  keys: int,
  *,
  by_keys: bool = False,
) -> jax.Array:
  """Which tiles a tile visits, and which of them it sees whole.

  Args:
    q_places: int32 [B, 2, T] of `masked_places`; T whole tiles.
    kv_places: int32 [B, 2, S].
    queries: of a tile.
    keys: of a tile.
    by_keys: for each tile of keys the tiles of queries, not the other way
      round.

  Returns:
    int32 [B, tiles, 4]: the first tile to visit and the one after the last; the
    first that needs no mask and the one after the last such in a row.
  """
  meet = tiles_that_meet(
    tile_bounds(q_places[:, 0], q_places[:, 1], queries),
    tile_bounds(kv_places[:, 0], kv_places[:, 1], keys),
  )

  def ends(places, tile):  # int32 [B, 2, L] -> [B, tiles] four times
    tiled = places.reshape(*places.shape[:2], -1, tile)
    least, greatest = tiled.min(axis=-1), tiled.max(axis=-1)
    return least[:, 1], greatest[:, 1], least[:, 0], greatest[:, 0]

  q_low, q_high, q_first, _ = ends(q_places, queries)
  k_low, k_high, _, k_last = ends(kv_places, keys)
  whole = (q_low == q_high)[:, :, None] & (k_low == k_high)[:, None, :]
  whole &= q_low[:, :, None] == k_low[:, None, :]
  whole &= q_first[:, :, None] >= k_last[:, None, :]
  if by_keys:
    meet, whole = meet.swapaxes(1, 2), whole.swapaxes(1, 2)
  whole_start = jnp.argmax(whole, axis=-1)
  tiles = jnp.arange(whole.shape[-1])[None, None]
  # The run ends at the first tile after its start that needs a mask.
  ended = ~whole & (tiles > whole_start[..., None])
  whole_stop = jnp.where(
    ended.any(axis=-1), jnp.argmax(ended, axis=-1), whole.shape[-1]
  )
  whole_stop = jnp.where(whole.any(axis=-1), whole_stop, 0)
  ranges = (*hull(meet), whole_start, whole_stop)
  return jnp.stack([x.astype(jnp.int32) for x in ranges], axis=-1)


def drain(tiles: jax.Array, stages: int, *done) -> None:
  """Waits until the last tiles fetched are done with, one for each stage.

  Args:
    tiles: that were fetched, all but the last `stages` awaited.
    stages: of the ring that they were fetched into.
    done: barriers of each stage.
  """

  def wait(i, _):
    for barrier in done:
      plgpu.barrier_wait(barrier.at[lax.rem(i, jnp.int32(stages))])

  lax.fori_loop(jnp.maximum(tiles - stages, 0), tiles, wait, None)


def _kernel(
  visits_ref,  # int32 [B, query tiles, 4]
  q_nope_ref,  # [B, T, N, H]
  q_rope_ref,  # [B, T, N, R]
  k_nope_ref,  # [B, S, N, H]
  k_rope_ref,  # [B, S, R]
  v_ref,  # [B, S, N, h]
  q_places_ref,  # int32 [B, 2, T]: positions, segments
  kv_places_ref,  # int32 [B, 2, S]
  out_ref,  # [B, T, N, h]
  lse_ref,  # float32 [B, N, T]
  *,
  scale: float,
  q_nope,  # SMEM [COMPUTING, ROWS, H]
  q_rope,
  q_places,
  k_nope,  # SMEM [stages, keys, H]
  k_rope,
  kv_places,
  v,
  lse,  # SMEM float32 [COMPUTING, ROWS]
  q_ready,  # barriers: of each computing warpgroup
  k_ready,  # of each stage
  v_ready,
  k_done,
  v_done,
  turn,
  spare,
  out=None,  # SMEM [COMPUTING, ROWS, h], where q_nope has another width
):
  row, head = lax.axis_index("row"), lax.axis_index("head")
  # The last queries see the most keys under a causal mask: they start first.
  tile = visits_ref.shape[1] - 1 - lax.axis_index("queries")
  group = lax.axis_index("warpgroup")
  stages, keys = k_nope.shape[:2]
  start, stop, whole_start, whole_stop = (
    visits_ref[row, tile, i] for i in range(4)
  )

  def change_turns():
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)

  @pl.when(group < COMPUTING)
  def _compute():
    plgpu.set_max_registers(232, action="increase")
    mine = pl.ds((tile * COMPUTING + group) * ROWS, ROWS)
    ready = q_ready.at[group]
    plgpu.copy_gmem_to_smem(
      q_nope_ref.at[row, mine, head], q_nope.at[group], ready
    )
    plgpu.copy_gmem_to_smem(
      q_rope_ref.at[row, mine, head], q_rope.at[group], ready
    )
    plgpu.copy_gmem_to_smem(
      q_places_ref.at[row, :, mine], q_places.at[group], ready
    )
    plgpu.barrier_wait(ready)
    pl.when(group == 1)(change_turns)

    def visit(i, carry):
      top, total, sums = carry
      slot = lax.rem(i, jnp.int32(stages))
      plgpu.barrier_wait(k_ready.at[slot])

      def multiply_keys(acc_ref):
        for q, k in ((q_nope, k_nope), (q_rope, k_rope)):
          multiply_turned(acc_ref, q.at[group], k.at[slot], spare, group)
        change_turns()
        return acc_ref[...]

      scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, keys)))

      def mask(scores):
        here = (q_places[group, 0], q_places[group, 1])
        there = (kv_places[slot, 0], kv_places[slot, 1])
        plgpu.commit_smem()  # read before the copy engine writes there again
        keep = seen(here, there, scores.shape, query_axis=0)
        return jnp.where(keep, scores, -jnp.inf)

      whole = (start + i >= whole_start) & (start + i < whole_stop)
      scores = lax.cond(whole, lambda scores: scores, mask, scores)
      plgpu.barrier_arrive(k_done.at[slot])
      # `top` is of the scaled scores, in bits: exp2 of one multiply-add.
      bits = scale * LOG2_E
      old_top, top = top, jnp.maximum(top, scores.max(axis=1) * bits)
      weights = jnp.exp2(
        scores * bits - lax.broadcast_in_dim(top, scores.shape, (0,))
      )
      shrink = jnp.exp2(old_top - top)
      total = shrink * total + weights.sum(axis=1)
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(v_ready.at[slot])
      plgpu.barrier_wait(turn)

      def multiply_values(acc_ref):
        multiply(acc_ref, weights.astype(v.dtype), v.at[slot], spare, group)
        return acc_ref[...]

      more = pl.run_scoped(multiply_values, plgpu.ACC((ROWS, v.shape[2])))
      plgpu.barrier_arrive(v_done.at[slot])
      sums = lax.broadcast_in_dim(shrink, sums.shape, (0,)) * sums + more
      return top, total, sums

    top, total, sums = lax.fori_loop(
      0,
      stop - start,
      visit,
      (
        # Finite, so that a masked score has weight 0 before any key is seen.
        jnp.full((ROWS,), MASKED, jnp.float32),
        jnp.zeros((ROWS,), jnp.float32),
        jnp.zeros((ROWS, v.shape[2]), jnp.float32),
      ),
    )
    pl.when(group == 0)(change_turns)
    safe = jnp.where(total > 0, total, 1.0)
    sums *= lax.broadcast_in_dim(1 / safe, sums.shape, (0,))
    leaving = (q_nope if out is None else out).at[group]
    leaving[...] = sums.astype(out_ref.dtype)
    lse[group] = jnp.where(total > 0, (top + jnp.log2(safe)) / LOG2_E, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(leaving, out_ref.at[row, mine, head])
    plgpu.copy_smem_to_gmem(lse.at[group], lse_ref.at[row, head, mine])
    plgpu.wait_smem_to_gmem(0)

  @pl.when(group == COMPUTING)
  def _fetch():
    plgpu.set_max_registers(40, action="decrease")

    def fetch(i, _):
      slot = lax.rem(i, jnp.int32(stages))
      here = pl.ds((start + i) * keys, keys)
      used = i >= stages

      @pl.when(used)
      def _wait_for_keys():
        plgpu.barrier_wait(k_done.at[slot])

      ready = k_ready.at[slot]
      plgpu.copy_gmem_to_smem(
        k_nope_ref.at[row, here, head], k_nope.at[slot], ready
      )
      plgpu.copy_gmem_to_smem(k_rope_ref.at[row, here], k_rope.at[slot], ready)
      plgpu.copy_gmem_to_smem(
        kv_places_ref.at[row, :, here], kv_places.at[slot], ready
      )

      @pl.when(used)
      def _wait_for_values():
        plgpu.barrier_wait(v_done.at[slot])

      plgpu.copy_gmem_to_smem(
        v_ref.at[row, here, head], v.at[slot], v_ready.at[slot]
      )

    lax.fori_loop(0, stop - start, fetch, None)
    drain(stop - start, stages, k_done, v_done)


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
  tiles: GpuTiles,
) -> tuple[jax.Array, jax.Array]:
  """Attention of whole tiles.

  Args:
    q_nope: [B, T, N, H], T a multiple of COMPUTING * ROWS.
    q_rope: [B, T, N, R].
    k_nope: [B, S, N, H], S a multiple of `tiles.forward_keys`.
    k_rope: [B, S, R].
    v: [B, S, N, h].
    q_places: int32 [B, 2, T]: positions, segment ids.
    kv_places: int32 [B, 2, S].
    scale: factor on the scores, positive.
    tiles: of this chip.

  Returns:
    out [B, T, N, h] in the dtype of `q_nope`; lse float32 [B, N, T].
  """
  b, t, n, h_nope = q_nope.shape
  h_rope, h_v, dtype = q_rope.shape[3], v.shape[3], q_nope.dtype
  queries, keys, stages = (
    COMPUTING * ROWS,
    tiles.forward_keys,
    tiles.forward_stages,
  )
  q_places, kv_places = masked_places(q_places, kv_places)
  own = (COMPUTING, ROWS)
  scratch: dict[str, Any] = {
    "q_nope": plgpu.SMEM((*own, h_nope), dtype),
    "q_rope": plgpu.SMEM((*own, h_rope), dtype),
    "q_places": plgpu.SMEM((COMPUTING, 2, ROWS), jnp.int32),
    "k_nope": plgpu.SMEM((stages, keys, h_nope), dtype),
    "k_rope": plgpu.SMEM((stages, keys, h_rope), dtype),
    "kv_places": plgpu.SMEM((stages, 2, keys), jnp.int32),
    "v": plgpu.SMEM((stages, keys, h_v), dtype),
    "lse": plgpu.SMEM(own, jnp.float32),
    "q_ready": plgpu.Barrier(num_arrivals=3, num_barriers=COMPUTING),
    "k_ready": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    "v_ready": plgpu.Barrier(num_barriers=stages),
    "k_done": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
    "v_done": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
    "turn": plgpu.Barrier(num_arrivals=COMPUTING),
    "spare": spare_memory(keys, (h_nope, h_rope), dtype),
  }
  if h_nope != h_v:
    scratch["out"] = plgpu.SMEM((*own, h_v), dtype)
  return plgpu.kernel(
    functools.partial(_kernel, scale=scale),
    out_type=[
      jax.ShapeDtypeStruct((b, t, n, h_v), dtype),
      jax.ShapeDtypeStruct((b, n, t), jnp.float32),
    ],
    grid=(b, n, t // queries),
    grid_names=("row", "head", "queries"),
    num_threads=COMPUTING + 1,
    thread_name="warpgroup",
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpretation(),
    kernel_name="mla_attention_forward",
  )(
    visits(q_places, kv_places, queries, keys),
    q_nope,
    q_rope,
    k_nope,
    k_rope,
    v,
    q_places,
    kv_places,
  )
