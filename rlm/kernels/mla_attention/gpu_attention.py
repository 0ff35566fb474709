"""`mla_attention` by the kernels for Hopper: whole tiles and the gradient."""

import functools
import math

import jax
import jax.numpy as jnp

from rlm.kernels.mla_attention.gpu_backward import backward
from rlm.kernels.mla_attention.gpu_forward import forward
from rlm.kernels.mla_attention.gpu_products import (
  COMPUTING,
  ROWS,
  SMEM_BYTES,
  other_chip,
)
from rlm.kernels.mla_attention.tiles import GpuTiles, gpu_tiles, padded

_DTYPES = (jnp.bfloat16, jnp.float16)
# A row of SMEM that the copy engine swizzles: 128 bytes.
_WIDTH = 64
# Barriers, sums across a warpgroup, and the rounding up of each buffer.
_SPARE_BYTES = 8 * 1024


def attention_obstacle(
  q_nope: jax.Array,
  q_rope: jax.Array,
  k_nope: jax.Array,
  k_rope: jax.Array,
  v: jax.Array,
  selected: jax.Array | None,
  scale: float,
) -> str | None:
  """Why `attention` cannot run these operands, or None."""
  tiles = gpu_tiles()
  if tiles is None:
    return other_chip()
  if scale <= 0:
    return (
      f"{scale=}; it finds the greatest score before it scales it, which takes"
      " a positive one"
    )
  if selected is not None:
    return "`selected` needs a mask of [B, T, S], which the kernel never makes"
  operands = (q_nope, q_rope, k_nope, k_rope, v)
  dtypes = {x.dtype for x in operands}
  if len(dtypes) > 1 or dtypes.pop() not in _DTYPES:
    given = ", ".join(f"{x.dtype}" for x in operands)
    return f"operands are {given}; it takes all bfloat16 or all float16"
  h_nope, h_rope, h_v = q_nope.shape[3], q_rope.shape[3], v.shape[3]
  widths = f"H, R and h are {h_nope}, {h_rope} and {h_v}"
  if any(width == 0 or width % _WIDTH for width in (h_nope, h_rope, h_v)):
    return f"{widths}; it takes multiples of {_WIDTH}"
  most = max(_smem_bytes(h_nope, h_rope, h_v, tiles).values())
  if most > SMEM_BYTES:
    return (
      f"{widths}, whose tiles take {most} bytes of shared memory; there are"
      f" {SMEM_BYTES}"
    )
  return None


def _smem_bytes(
  h_nope: int, h_rope: int, h_v: int, tiles: GpuTiles
) -> dict[str, int]:
  """Shared memory that each kernel takes, from above."""
  both, places = 2 * (h_nope + h_rope), 8
  queries = both + places  # and out or its gradient
  keys = both + 2 * h_v + places
  block = COMPUTING * ROWS
  sums = 2 * h_v + 8
  leaving = 4 + (0 if h_nope == h_v else 2 * h_v)
  parts = {
    "forward": (queries + leaving) * block
    + keys * tiles.forward_keys * tiles.forward_stages,
    "dq": (queries + sums) * block + keys * tiles.dq_keys * tiles.dq_stages,
    "dk": keys * block + (queries + sums) * tiles.dk_queries * tiles.dk_stages,
  }
  return {name: bytes + _SPARE_BYTES for name, bytes in parts.items()}


def attention(
  q_nope: jax.Array,
  q_rope: jax.Array,
  k_nope: jax.Array,
  k_rope: jax.Array,
  v: jax.Array,
  q_positions: jax.Array,
  kv_positions: jax.Array,
  q_segment_ids: jax.Array,
  kv_segment_ids: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """`mla_attention` by kernels, forward and backward; its arguments.

  Lengths are padded to whole tiles; whole tiles are read where they lie.
  """
  tiles = gpu_tiles()
  assert tiles is not None  # else `attention_obstacle` had one
  t, s = q_nope.shape[1], k_nope.shape[1]
  block = COMPUTING * ROWS
  q_tile = math.lcm(block, tiles.dk_queries)
  kv_tile = math.lcm(block, tiles.forward_keys, tiles.dq_keys)
  of_queries = functools.partial(padded, axis=1, length=t + -t % q_tile)
  of_keys = functools.partial(padded, axis=1, length=s + -s % kv_tile)
  out, lse = _flash(
    of_queries(q_nope),
    of_queries(q_rope),
    of_keys(k_nope),
    of_keys(k_rope),
    of_keys(v),
    jnp.stack([of_queries(q_positions), of_queries(q_segment_ids)], axis=1),
    jnp.stack([of_keys(kv_positions), of_keys(kv_segment_ids)], axis=1),
    scale,
    tiles,
  )
  return out[:, :t], lse[:, :, :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _flash(
  q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places, scale, tiles
):
  operands = (q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places)
  return forward(*operands, scale=scale, tiles=tiles)


def _flash_fwd(*arguments):
  out, lse = _flash(*arguments)
  return (out, lse), (*arguments[:7], out, lse)


def _flash_bwd(scale, tiles, residuals, cotangents):
  q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places, out, lse = residuals
  d_out, d_lse = cotangents
  delta = (d_out.astype(jnp.float32) * out).sum(axis=-1)  # [B, T, N]
  delta = delta.swapaxes(1, 2) - d_lse
  # A query without keys has no gradient, whatever is asked of its lse, -inf.
  blind = jnp.isneginf(lse)
  lse, delta = (jnp.where(blind, 0.0, x) for x in (lse, delta))
  dq_nope, dq_rope, dk_nope, dk_rope, dv = backward(
    q_nope,
    q_rope,
    k_nope,
    k_rope,
    v,
    q_places,
    kv_places,
    lse,
    delta,
    d_out,
    scale=scale,
    tiles=tiles,
  )
  dk_rope = dk_rope.astype(k_rope.dtype)
  return dq_nope, dq_rope, dk_nope, dk_rope, dv, None, None


_flash.defvjp(_flash_fwd, _flash_bwd)
