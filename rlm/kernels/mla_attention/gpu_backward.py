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
from jax.experimental.pallas import mosaic_gpu as plgpu

from rlm.kernels.backend import interpretation
from rlm.kernels.mla_attention.gpu_forward import masked_places, visits
from rlm.kernels.mla_attention.gpu_gradients import dk_kernel, dq_kernel
from rlm.kernels.mla_attention.gpu_products import (
  COMPUTING,
  LOG2_E,
  ROWS,
  spare_memory,
)
from rlm.kernels.mla_attention.tiles import GpuTiles


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
    functools.partial(dq_kernel, scale=scale),
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
    functools.partial(dk_kernel, scale=scale, heads=heads),
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
