"""Grouped-query attention: N query heads share M key and value heads.

Query head n reads key head n // (N / M). Both functions take positions and
segment ids of queries and keys, allow T != S, and return the log-sum-exp of
the scores beside the output, as those of `mla_attention` do.
"""

import jax
import jax.numpy as jnp

from rlm.kernels.attention import (
  attend_heads,
  attention_mask,
  by_query_chunks,
  masked_softmax,
  prefers_heads,
)
from rlm.kernels.product import einsum, exact_sums


def _attend_batched(q, k, v, mask, scale):
  """All heads in one batched product, no key head repeated."""
  b, t, n, width = q.shape
  # M key heads, J query heads of each.
  grouped = q.reshape(b, t, k.shape[2], -1, width)
  scores = einsum("BTMJH,BSMH->BMJTS", grouped, k)
  probs, lse = masked_softmax(scores.reshape(b, n, t, -1) * scale, mask)
  probs = probs.astype(q.dtype).reshape(b, k.shape[2], -1, *probs.shape[2:])
  out = einsum("BMJTS,BSMH->BTMJH", probs, v)
  return out.astype(q.dtype).reshape(q.shape), lse


def _attend_by_head(q, k, v, mask, scale):
  """One head after the other; see `attend_heads`."""
  shared = q.shape[2] // k.shape[2]
  heads = [
    (q[:, :, n], k[:, :, n // shared], v[:, :, n // shared])
    for n in range(q.shape[2])
  ]
  return attend_heads(heads, mask, scale)


def gqa_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_positions: jax.Array,
  kv_positions: jax.Array,
  q_segment_ids: jax.Array,
  kv_segment_ids: jax.Array,
  selected: jax.Array | None = None,
  *,
  scale: float,
  query_chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Grouped-query attention for training and prefill (arXiv:2305.13245).

  Args:
    q: [B, T, N, H], rotated.
    k: [B, S, M, H], rotated.
    v: [B, S, M, H].
    q_positions: int32 [B, T].
    kv_positions: int32 [B, S].
    q_segment_ids: int32 [B, T]; 0 is padding.
    kv_segment_ids: int32 [B, S].
    selected: bool [B, T, S] or None; a further restriction.
    scale: factor on the scores.
    query_chunk: queries handled at once, each chunk recomputed in the backward
      pass, so that no [B, N, T, S] exists; 0 takes them whole.

  Returns:
    out [B, T, N, H] in the dtype of `q`, zeros where a query sees no key; lse
    float32 [B, N, T], -inf there.

  Raises:
    ValueError: `query_chunk` does not divide T.
  """
  form = _attend_by_head if prefers_heads(q.shape[2]) else _attend_batched

  def attend(keys, part):
    q, q_positions, q_segment_ids, selected = part
    k, v, kv_positions, kv_segment_ids = keys
    mask = attention_mask(
      q_positions, kv_positions, q_segment_ids, kv_segment_ids, selected
    )
    return form(q, k, v, mask, scale)

  return by_query_chunks(
    attend,
    query_chunk,
    (k, v, kv_positions, kv_segment_ids),
    q,
    q_positions,
    q_segment_ids,
    selected,
  )


def gqa_decode(
  q: jax.Array,
  kv: jax.Array,
  q_positions: jax.Array,
  kv_positions: jax.Array,
  q_segment_ids: jax.Array,
  kv_segment_ids: jax.Array,
  selected: jax.Array | None = None,
  *,
  num_key_value_heads: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Grouped-query attention over the cache.

  Args:
    q: [B, T, N, H], rotated.
    kv: [B, 2 * M * H, S]: rotated keys of all heads, then the values.
    q_positions: int32 [B, T].
    kv_positions: int32 [B, S].
    q_segment_ids: int32 [B, T]; 0 is padding.
    kv_segment_ids: int32 [B, S].
    selected: bool [B, T, S] or None.
    num_key_value_heads: M.
    scale: factor on the scores.

  Returns:
    out [B, T, N, H] in the dtype of `q`; lse float32 [B, N, T].
  """
  b, t, n, width = q.shape
  m = num_key_value_heads
  mask = attention_mask(
    q_positions, kv_positions, q_segment_ids, kv_segment_ids, selected
  )
  k, v = jnp.split(kv.reshape(b, 2 * m, width, -1), 2, axis=1)
  # Rows of a key head: its query heads, each with its T queries. Queries lead,
  # as in `mla_decode`.
  rows = q.swapaxes(1, 2).reshape(b, m, -1, width)
  scores = jnp.matmul(rows, k, **exact_sums(q.dtype)).reshape(b, n, t, -1)
  probs, lse = masked_softmax(scores * scale, mask)
  out = jax.lax.dot_general(
    probs.astype(q.dtype).reshape(b, m, -1, kv.shape[-1]),
    v,
    (((3,), (3,)), ((0, 1), (0, 1))),
    **exact_sums(q.dtype),
  )
  return out.reshape(b, n, t, width).swapaxes(1, 2).astype(q.dtype), lse
