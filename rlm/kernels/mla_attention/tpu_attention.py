"""`mla_attention` by the kernels for TPU: whole tiles and the gradient."""

import functools

import jax
import jax.numpy as jnp

from rlm.kernels.backend import chip
from rlm.kernels.mla_attention import tpu_backward, tpu_forward
from rlm.kernels.mla_attention.rounding import restored
from rlm.kernels.mla_attention.tiles import (
  TpuTiles,
  cut,
  padded,
  tpu_tiles,
)

_DTYPES = (jnp.bfloat16, jnp.float32)


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
  if tpu_tiles() is None:
    return f"{chip()!r} has no row in rlm/kernels/mla_attention/tiles.py"
  if selected is not None:
    return "`selected` needs a mask of [B, T, S], which the kernel never makes"
  dtypes = {x.dtype for x in (q_nope, q_rope, k_nope, k_rope, v)}
  if len(dtypes) > 1 or dtypes.pop() not in _DTYPES:
    given = ", ".join(f"{x.dtype}" for x in (q_nope, q_rope, k_nope, k_rope, v))
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
  assert tiles is not None  # else `attention_obstacle` had one
  t, s = q_nope.shape[1], k_nope.shape[1]
  q_cut = _q_cut(t, tiles)
  kv_cut = cut(s, tiles.forward_keys, _held(tiles.forward_held, k_nope))

  def lead(x, length, axis):  # [B, L, N, H] -> [B, N, L, H] or [B, N, H, L]
    x = padded(x, 1, length)
    return jnp.moveaxis(x, 1, axis)

  out, lse = _flash(
    lead(q_nope, q_cut.padded, 2),
    lead(q_rope, q_cut.padded, 3),
    lead(k_nope, kv_cut.padded, 2),
    lead(k_rope, kv_cut.padded, 2),
    lead(v, kv_cut.padded, 2),
    padded(jnp.stack([q_positions, q_segment_ids], 1), 2, q_cut.padded),
    padded(jnp.stack([kv_positions, kv_segment_ids], 1), 2, kv_cut.padded),
    scale,
    tiles,
  )
  return out[:, :, :t].swapaxes(1, 2), lse[:, :, :t]


def _held(tokens: int, x: jax.Array) -> int:
  """Tokens that VMEM holds: half as many in float32."""
  return tokens * 2 // x.dtype.itemsize


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _flash(
  q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places, scale, tiles
):
  operands = (q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places)
  out, softmax = _forward(operands, scale, tiles, keep_lost=False)
  return out, _log_sum_exp(softmax)


def _q_cut(length, tiles):
  return cut(length, tiles.forward_queries, length)


def _forward(operands, scale, tiles, *, keep_lost):
  q_nope, k_nope = operands[0], operands[2]
  return tpu_forward.forward(
    *operands,
    scale=scale,
    q_cut=_q_cut(q_nope.shape[2], tiles),
    kv_cut=cut(
      k_nope.shape[2], tiles.forward_keys, _held(tiles.forward_held, k_nope)
    ),
    vmem_bytes=tiles.vmem_bytes,
    keep_lost=keep_lost,
  )


def _log_sum_exp(softmax):
  top, total = softmax[:, :, 0], softmax[:, :, 1]
  seen = total > 0
  return jnp.where(seen, jnp.log(jnp.where(seen, total, 1.0)) + top, -jnp.inf)


def _flash_fwd(*arguments):
  *operands, scale, tiles = arguments
  rounded = operands[0].dtype == jnp.bfloat16
  out, softmax, *lost = _forward(operands, scale, tiles, keep_lost=rounded)
  return (out, _log_sum_exp(softmax)), (*operands, out, lost, softmax)


def _flash_bwd(scale: float, tiles: TpuTiles, residuals, cotangents):
  *operands, out, lost, softmax = residuals
  q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places = operands
  d_out, d_lse = cotangents
  for each in lost:
    out = restored(out, each, _q_cut(out.shape[2], tiles).tile)
  delta = (d_out.astype(jnp.float32) * out).sum(axis=-1) - d_lse
  top, total = softmax[:, :, 0], softmax[:, :, 1]
  seen = total > 0
  # A query without keys has no gradient, whatever is asked of its lse, -inf.
  delta = jnp.where(seen, delta, 0.0)
  inverse = jnp.where(seen, 1 / jnp.where(seen, total, 1.0), 0.0)
  softmax = jnp.stack([top, inverse, delta], axis=2)

  held = _held(tiles.backward_held, q_nope)
  queries = _Spans(q_nope.shape[2], tiles.backward_queries, held)
  keys = _Spans(k_nope.shape[2], tiles.backward_keys, held)
  one_call = queries.count == keys.count == 1
  run = functools.partial(
    tpu_backward.backward,
    scale=scale,
    q_cut=queries.cut,
    kv_cut=keys.cut,
    # Sums over several calls are rounded once, at their end.
    out_dtype=q_nope.dtype if one_call else jnp.float32,
    vmem_bytes=tiles.vmem_bytes,
    pairs=tpu_forward.pairs_seen(q_nope.shape[2], k_nope.shape[2])
    // (queries.count * keys.count),
  )
  of_queries = (
    queries.split(q_nope, 2),
    queries.split(q_rope, 3),
    queries.split(q_places, 2),
    queries.split(softmax, 3),
    queries.split(d_out, 2),
  )
  of_keys = (
    keys.split(k_nope, 2),
    keys.split(k_rope, 2),
    keys.split(v, 2),
    keys.split(kv_places, 2),
  )
  by_spans = _in_one_call if one_call else _in_many_calls
  (dq_nope, dq_rope), (dk_nope, dk_rope, dv) = by_spans(
    run, of_queries, of_keys
  )
  gradients = (
    queries.join(dq_nope, 2),
    queries.join(dq_rope, 3),
    keys.join(dk_nope, 2),
    keys.join(dk_rope, 2),
    keys.join(dv, 2),
  )
  return *(g.astype(q_nope.dtype) for g in gradients), None, None


def _of_spans(run, of_queries, of_keys):
  """Gradients of a span of queries and of one of keys, to each other alone."""
  q_nope, q_rope, q_places, softmax, d_out = of_queries
  k_nope, k_rope, v, kv_places = of_keys
  operands = (q_nope, q_rope, k_nope, k_rope, v, q_places, kv_places)
  dq_nope, dq_rope, dk_nope, dk_rope, dv = run(*operands, softmax, d_out)
  return (dq_nope, dq_rope), (dk_nope, dk_rope, dv)


def _in_one_call(run, of_queries, of_keys):
  first = functools.partial(jax.tree.map, lambda x: x[0])
  gradients = _of_spans(run, first(of_queries), first(of_keys))
  return jax.tree.map(lambda x: x[None], gradients)


def _in_many_calls(run, of_queries, of_keys):
  """Every span of queries with every one of keys, in order; sums float32."""

  def zeros(arrays, axis_of_spans):
    return tuple(
      jnp.zeros(x.shape[axis_of_spans:], jnp.float32) for x in arrays
    )

  def of_query_span(d_keys, queries):
    def of_key_span(d_queries, keys):
      more, d_keys = _of_spans(run, queries, keys)
      return jax.tree.map(jnp.add, d_queries, more), d_keys

    start = zeros(of_queries[:2], 1)
    d_queries, more = jax.lax.scan(of_key_span, start, of_keys)
    finished = tuple(x.astype(queries[0].dtype) for x in d_queries)
    return jax.tree.map(jnp.add, d_keys, more), finished

  start = zeros(of_keys[:3], 0)
  d_keys, d_queries = jax.lax.scan(of_query_span, start, of_queries)
  return d_queries, d_keys


class _Spans:
  """A length as runs of tokens that VMEM holds, padded to whole ones."""

  def __init__(self, length: int, tile: int, held: int):
    self._length, self.cut = length, cut(length, tile, held)
    self.count = self.cut.padded // self.cut.held

  def split(self, x: jax.Array, axis: int) -> jax.Array:
    """[.., length, ..] -> [runs, .., held, ..]."""
    x = padded(x, axis, self.cut.padded)
    shape = (*x.shape[:axis], self.count, self.cut.held, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  def join(self, x: jax.Array, axis: int) -> jax.Array:
    """[runs, .., held, ..] -> [.., length, ..]."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], self.cut.padded, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, self._length, axis=axis)


_flash.defvjp(_flash_fwd, _flash_bwd)
