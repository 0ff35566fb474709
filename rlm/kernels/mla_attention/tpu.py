"""The TPU's kernels behind the front doors."""

import functools

import jax
import jax.numpy as jnp

from rlm.kernels.attention import attention_mask
from rlm.kernels.backend import chip
from rlm.kernels.mla_attention import tpu_backward, tpu_decode, tpu_forward
from rlm.kernels.mla_attention.caches import (
  Cache,
  Float8Latents,
  PagedLatents,
  shape_of,
)
from rlm.kernels.mla_attention.parts import join_parts
from rlm.kernels.mla_attention.tiles import TpuTiles, cut, tpu_tiles
from rlm.kernels.mla_attention.tpu_forward import LANES
from rlm.kernels.mla_attention.visits import visited_tiles

_DTYPES = (jnp.bfloat16, jnp.float32)


def attention_obstacle(
  q_nope: jax.Array,
  q_rope: jax.Array,
  k_nope: jax.Array,
  k_rope: jax.Array,
  v: jax.Array,
  selected: jax.Array | None,
) -> str | None:
  """Why `attention` cannot run these operands, or None."""
  if tpu_tiles() is None:
    return f"{chip()!r} has no row in rlm/kernels/mla_attention/tiles.py"
  if selected is not None:
    return "`selected` needs a mask of [B, T, S], which the kernel never makes"
  dtypes = {x.dtype for x in (q_nope, q_rope, k_nope, k_rope, v)}
  if len(dtypes) > 1 or dtypes.pop() not in _DTYPES:
    given = ", ".join(
      f"{x.dtype}" for x in (q_nope, q_rope, k_nope, k_rope, v)
    )
    return f"operands are {given}; it takes all bfloat16 or all float32"
  return None


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

  Heads lead the tokens in the kernels, which XLA arranges as it writes the
  projections; lengths are padded to whole tiles.
  """
  tiles = tpu_tiles()
  t, s = q_nope.shape[1], k_nope.shape[1]
  q_cut = cut(t, tiles.forward_queries, t)
  kv_cut = cut(s, tiles.forward_keys, tiles.forward_held)

  def lead(x, length, axis):  # [B, L, N, H] -> [B, N, L, H] or [B, N, H, L]
    x = _pad(x, 1, length)
    return jnp.moveaxis(x, 1, axis)

  out, lse = _flash(
    lead(q_nope, q_cut.padded, 2),
    lead(q_rope, q_cut.padded, 3),
    lead(k_nope, kv_cut.padded, 2),
    lead(k_rope, kv_cut.padded, 2),
    lead(v, kv_cut.padded, 2),
    _pad(jnp.stack([q_positions, q_segment_ids], 1), 2, q_cut.padded),
    _pad(jnp.stack([kv_positions, kv_segment_ids], 1), 2, kv_cut.padded),
    scale,
    tiles,
  )
  return out[:, :, :t].swapaxes(1, 2), lse[:, :, :t]


def _pad(x, axis, length):
  """Zeros at the end of an axis: padding tokens have segment 0."""
  if x.shape[axis] == length:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _flash(
  q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places, scale, tiles
):
  operands = (q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places)
  return _flash_fwd(*operands, scale, tiles)[0]


def _flash_fwd(*arguments):
  *operands, scale, tiles = arguments
  q_nope, k_nope = operands[0], operands[2]
  out, rest, softmax = tpu_forward.forward(
    *operands,
    scale=scale,
    q_cut=cut(q_nope.shape[2], tiles.forward_queries, q_nope.shape[2]),
    kv_cut=cut(k_nope.shape[2], tiles.forward_keys, tiles.forward_held),
    vmem_bytes=tiles.vmem_bytes,
  )
  top, total = softmax[:, :, 0], softmax[:, :, 1]
  safe = jnp.where(total > 0, total, 1.0)
  lse = jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)
  return (out, lse), (*operands, out, rest, softmax)


def _flash_bwd(scale: float, tiles: TpuTiles, residuals, cotangents):
  *residuals, out, rest, softmax = residuals
  q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places = residuals
  d_out, d_lse = cotangents
  # Of `out` rounded, where one key has all the weight, delta would not cancel
  # the gradient of that weight.
  exact = out.astype(jnp.float32) + rest
  delta = (d_out.astype(jnp.float32) * exact).sum(axis=-1) - d_lse
  top, total = softmax[:, :, 0], softmax[:, :, 1]
  seen = total > 0
  # A query without keys has no gradient, whatever is asked of its lse, -inf.
  delta = jnp.where(seen, delta, 0.0)
  inverse = jnp.where(seen, 1 / jnp.where(seen, total, 1.0), 0.0)
  softmax = jnp.stack([top, inverse, delta], axis=2)
  held = tiles.backward_held
  q_cut = cut(q_nope.shape[2], tiles.backward_queries, held)
  kv_cut = cut(k_nope.shape[2], tiles.backward_keys, held)
  queries = _Spans(q_cut, q_nope.shape[2])
  keys = _Spans(kv_cut, k_nope.shape[2])
  several = queries.count > 1 or keys.count > 1
  run = functools.partial(
    tpu_backward.backward,
    scale=scale,
    q_cut=q_cut,
    kv_cut=kv_cut,
    out_dtype=jnp.float32 if several else q_nope.dtype,
    vmem_bytes=tiles.vmem_bytes,
  )
  of_keys = (
    keys.split(k_nope, 2),
    keys.split(k_rope, 2),
    keys.split(v, 2),
    keys.split(kv_places, 2),
  )
  of_queries = (
    queries.split(q_nope, 2),
    queries.split(q_rope, 3),
    queries.split(q_places, 2),
    queries.split(softmax, 3),
    queries.split(d_out, 2),
  )

  def one(of_queries, of_keys):
    q_nope, q_rope, q_places, softmax, d_out = of_queries
    k_nope, k_rope, v, kv_places = of_keys
    dq_nope, dq_rope, *d_keys = run(
      q_nope,
      q_rope,
      k_nope,
      k_rope,
      v,
      q_places,
      kv_places,
      softmax,
      d_out,
    )
    return (dq_nope, dq_rope), tuple(d_keys)

  def all_keys(of_queries):
    """Of one span of queries: their gradient, and those of all keys."""

    def add(total, span):
      d_queries, d_keys = one(of_queries, span)
      return jax.tree.map(jnp.add, total, d_queries), d_keys

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in of_queries[:2])
    return jax.lax.scan(add, zeros, of_keys)

  if several:

    def add(total, span):
      d_queries, d_keys = all_keys(span)
      return jax.tree.map(jnp.add, total, d_keys), d_queries

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in of_keys[:3])
    d_keys, d_queries = jax.lax.scan(add, zeros, of_queries)
  else:
    first = functools.partial(jax.tree.map, lambda x: x[0])
    d_queries, d_keys = jax.tree.map(
      lambda x: x[None], one(first(of_queries), first(of_keys))
    )
  (dq_nope, dq_rope), (dk_nope, dk_rope, dv) = d_queries, d_keys
  gradients = (
    queries.join(dq_nope, 2),
    queries.join(dq_rope, 3),
    keys.join(dk_nope, 2),
    keys.join(dk_rope, 2),
    keys.join(dv, 2),
  )
  gradients = [g.astype(q_nope.dtype) for g in gradients]
  return *gradients, None, None


class _Spans:
  """A padded length as runs that VMEM holds, one after the other."""

  def __init__(self, cut, length):
    self._cut, self._length = cut, length
    self.count = cut.padded // cut.held

  def split(self, x, axis):
    """[.., length, ..] -> [runs, .., held, ..]."""
    x = _pad(x, axis, self._cut.padded)
    shape = (*x.shape[:axis], self.count, self._cut.held, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  def join(self, x, axis):
    """[runs, .., held, ..] -> [.., length, ..]."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], self._cut.padded, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, self._length, axis=axis)


_flash.defvjp(_flash_fwd, _flash_bwd)


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


# A bit of an int32 for each query that a row's tokens may be seen by.
_MOST_QUERIES = 31


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
  cache = (latents,)
  if isinstance(latents, Float8Latents):
    cache = (latents.latent, latents.scales, latents.k_rope)
  splits = tiles.decode_splits
  out, lse = tpu_decode.decode(
    q.reshape(b, t * n, -1),
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
    vmem_bytes=tiles.vmem_bytes,
  )
  out = out.reshape(b, splits, t, n, -1)
  lse = lse.reshape(b, splits, t, n).swapaxes(2, 3)
  if splits == 1:
    return out[:, 0], lse[:, 0]
  out, lse = join_parts(out.swapaxes(0, 1), lse.swapaxes(0, 1))
  return out.astype(q.dtype), lse


def _tile(tokens: int, most: int) -> int:
  """The greatest multiple of 128 that divides `tokens` and is not over `most`."""
  lanes = tokens // LANES
  return LANES * max(
    n for n in range(1, lanes + 1) if lanes % n == 0 and n * LANES <= most
  )
