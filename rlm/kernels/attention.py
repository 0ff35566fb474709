"""What every form of attention shares: masks, softmax, heads, query chunks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlm.kernels.backend import backend
from rlm.kernels.product import einsum
from rlm.kernels.recomputed import map_recomputed

# Finite, so that a row without any key gives zeros and not NaN.
MASKED = -1e30


def attention_mask(
  q_positions: jax.Array,
  kv_positions: jax.Array,
  q_segment_ids: jax.Array,
  kv_segment_ids: jax.Array,
  selected: jax.Array | None = None,
) -> jax.Array:
  """Which keys each query may see: its own segment, up to its own position.

  Args:
    q_positions: int32 [B, T].
    kv_positions: int32 [B, S].
    q_segment_ids: int32 [B, T]; 0 is padding and sees nothing.
    kv_segment_ids: int32 [B, S].
    selected: bool [B, T, S] or None; a further restriction (sparse attention).

  Returns:
    bool [B, T, S], True = keep.
  """
  mask = q_positions[:, :, None] >= kv_positions[:, None, :]
  mask &= q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
  mask &= (q_segment_ids != 0)[:, :, None]
  return mask if selected is None else mask & selected


def masked_softmax(scores: jax.Array, mask: jax.Array):
  """Softmax over the keys that a mask keeps, and its log-sum-exp.

  Args:
    scores: float32 [B, N, T, S].
    mask: bool [B, T, S].

  Returns:
    probs float32 [B, N, T, S], all 0 for a query without keys; lse float32
    [B, N, T], -inf there.
  """
  scores = jnp.where(mask[:, None], scores, MASKED)
  top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.where(mask[:, None], jnp.exp(scores - top), 0.0)
  total = weights.sum(axis=-1, keepdims=True)
  safe = jnp.where(total > 0, total, 1.0)
  lse = jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)
  return weights / safe, lse[..., 0]


def prefers_heads(num_heads: int) -> bool:
  """Whether `attend_heads` is the fastest form here: on a CPU, few heads."""
  return backend() == "cpu" and num_heads <= 16


def attend_heads(
  heads: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
  mask: jax.Array,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """One head after the other, in straight-line code, for the CPU.

  Several times faster there than one batched product, since no axis has to be
  moved and a head's scores stay in cache. The mask is added rather than
  selected by, and the sum divides the output and not the weights.

  Args:
    heads: q [B, T, H], k [B, S, H] and v [B, S, h] of each; heads may share
      keys and values.
    mask: bool [B, T, S].
    scale: factor on the scores.

  Returns:
    out [B, T, N, h] in the dtype of the queries, zeros where a query sees no
    key; lse float32 [B, N, T], -inf there.
  """
  penalty = jnp.where(mask, 0.0, MASKED)
  outs, lses = [], []
  for q, k, v in heads:
    head = _attend_head if q.dtype == jnp.float32 else _attend_rounded_head
    out, lse = head(q, k, v, penalty, scale)
    outs.append(out.astype(q.dtype))
    lses.append(lse)
  return jnp.stack(outs, axis=2), jnp.stack(lses, axis=1)


def _weights(q, k, penalty, scale):
  """exp(scores - their maximum), the sums of these, and the maximum."""
  scores = einsum("BTH,BSH->BTS", q, k)
  scores = scores * scale + penalty
  top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  # A row without keys has top = MASKED and would give weights of 1.
  weights = jnp.exp(scores - jnp.maximum(top, MASKED / 2))
  return weights, weights.sum(axis=-1), top[..., 0]


def _attend_head(q, k, v, penalty, scale):
  weights, total, top = _weights(q, k, penalty, scale)
  return _mean(weights, total, top, v)


def _mean(weights, total, top, v):
  safe = jnp.where(total > 0, total, 1.0)
  out = einsum("BTS,BSh->BTh", weights.astype(v.dtype), v)
  lse = jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)
  return out / safe[..., None], lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_rounded_head(q, k, v, penalty, scale):
  """As `_attend_head`, for operands of 16 bits.

  Left to autodiff, the gradient of a weight is rounded to them before that of
  the sum is taken off it, which leaves noise where one key has all the weight.
  """
  return _attend_head(q, k, v, penalty, scale)


def _rounded_forward(q, k, v, penalty, scale):
  weights, total, top = _weights(q, k, penalty, scale)
  out, lse = _mean(weights, total, top, v)
  return (out, lse), (q, k, v, weights, total, out)


def _rounded_backward(scale, residuals, cotangents):
  q, k, v, weights, total, out = residuals
  d_out, d_lse = cotangents
  seen = total > 0
  probs = weights / jnp.where(seen, total, 1.0)[..., None]
  delta = jnp.where(seen, (d_out * out).sum(axis=-1) - d_lse, 0.0)
  d_out = d_out.astype(v.dtype)  # which it was before `attend_heads` cast it
  d_probs = einsum("BTh,BSh->BTS", d_out, v)
  d_scores = probs * (d_probs - delta[..., None]) * scale
  d_scores = d_scores.astype(q.dtype)
  return (
    einsum("BTS,BSH->BTH", d_scores, k).astype(q.dtype),
    einsum("BTS,BTH->BSH", d_scores, q).astype(k.dtype),
    einsum("BTS,BTh->BSh", probs.astype(v.dtype), d_out).astype(v.dtype),
    None,
  )


_attend_rounded_head.defvjp(_rounded_forward, _rounded_backward)


def by_query_chunks(
  attend: Callable[..., tuple[jax.Array, jax.Array]],
  query_chunk: int,
  keys: Any,
  queries: Any,
  q_positions: jax.Array,
  q_segment_ids: jax.Array,
  selected: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Attends for `query_chunk` queries after the other; 0 takes them whole.

  Each chunk is recomputed in the backward pass, so that no [B, N, T, S] exists.

  Args:
    attend: (keys, (queries, q_positions, q_segment_ids, selected)) -> out, lse,
      a function of nothing else.
    query_chunk: a divisor of T, or 0.
    keys: arrays [B, S, ...]: keys, values, and where they stand.
    queries: arrays [B, T, ...].
    q_positions: int32 [B, T].
    q_segment_ids: int32 [B, T].
    selected: bool [B, T, S] or None.

  Returns:
    out [B, T, N, h] and lse float32 [B, N, T], as `attend` gives for all.

  Raises:
    ValueError: `query_chunk` does not divide T.
  """
  length = q_positions.shape[1]
  parts = (queries, q_positions, q_segment_ids, selected)
  if not query_chunk or query_chunk >= length:
    return attend(keys, parts)
  if length % query_chunk:
    raise ValueError(
      f"{query_chunk=} does not divide the {length} queries. Choose a divisor,"
      " or 0 for no chunks."
    )

  def split(x):  # [B, T, ...] -> [chunks, B, chunk, ...]
    chunks = x.reshape(x.shape[0], -1, query_chunk, *x.shape[2:])
    return jnp.moveaxis(chunks, 1, 0)

  out, lse = map_recomputed(attend, keys, jax.tree.map(split, parts))
  out = jnp.moveaxis(out, 0, 1)  # [B, chunks, chunk, N, h]
  lse = jnp.moveaxis(lse, 0, 2)  # [B, N, chunks, chunk]
  return (
    out.reshape(out.shape[0], length, *out.shape[3:]),
    lse.reshape(*lse.shape[:2], length),
  )
