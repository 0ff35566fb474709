"""Latent attention: the expanded form and the absorbed one.

`mla_attention` is for training and prefill, `mla_decode` for decoding over the
latent cache. Both take positions and segment ids of queries and keys, allow
T != S, and return the log-sum-exp of the scores beside the output, so that
parts of one softmax computed apart can be joined exactly.
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


def _attend_batched(q_nope, q_rope, k_nope, k_rope, v, mask, scale):
  """All heads in one batched product, the rope key never broadcast."""
  dtype = q_nope.dtype
  scores = einsum("BTNH,BSNH->BNTS", q_nope, k_nope)
  scores += einsum("BTNR,BSR->BNTS", q_rope, k_rope)
  probs, lse = masked_softmax(scores * scale, mask)
  out = einsum("BNTS,BSNh->BTNh", probs.astype(dtype), v)
  return out.astype(dtype), lse


def _attend_by_head(q_nope, q_rope, k_nope, k_rope, v, mask, scale):
  """One head after the other; see `attend_heads`."""

  def keys(n):
    return jnp.concatenate([k_nope[:, :, n], k_rope], axis=-1)

  def queries(n):
    return jnp.concatenate([q_nope[:, :, n], q_rope[:, :, n]], axis=-1)

  heads = range(q_nope.shape[2])
  return attend_heads(
    [(queries(n), keys(n), v[:, :, n]) for n in heads], mask, scale
  )


def _attend(q_nope, *args):
  """The form that this backend runs fastest; equal in value and gradient."""
  by_head = prefers_heads(q_nope.shape[2])
  return (_attend_by_head if by_head else _attend_batched)(q_nope, *args)


def mla_attention(
  q_nope: jax.Array,
  q_rope: jax.Array,
  k_nope: jax.Array,
  k_rope: jax.Array,
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
  """Expanded latent attention; V3 eq. 10.

  Args:
    q_nope: [B, T, N, H].
    q_rope: [B, T, N, R], rotated.
    k_nope: [B, S, N, H].
    k_rope: [B, S, R], rotated; one key for all heads.
    v: [B, S, N, h].
    q_positions: int32 [B, T].
    kv_positions: int32 [B, S].
    q_segment_ids: int32 [B, T]; 0 is padding.
    kv_segment_ids: int32 [B, S].
    selected: bool [B, T, S] or None.
    scale: factor on the scores, YaRN's correction included.
    query_chunk: queries handled at once, each chunk recomputed in the backward
      pass, so that no [B, N, T, S] exists; 0 takes them whole.

  Returns:
    out [B, T, N, h] in the dtype of `q_nope`, zeros where a query sees no key;
    lse float32 [B, N, T], -inf there.

  Raises:
    ValueError: `query_chunk` does not divide T.
  """

  def attend(keys, part):
    queries, q_positions, q_segment_ids, selected = part
    *keys, kv_positions, kv_segment_ids = keys
    mask = attention_mask(
      q_positions, kv_positions, q_segment_ids, kv_segment_ids, selected
    )
    return _attend(*queries, *keys, mask, scale)

  return by_query_chunks(
    attend,
    query_chunk,
    (k_nope, k_rope, v, kv_positions, kv_segment_ids),
    (q_nope, q_rope),
    q_positions,
    q_segment_ids,
    selected,
  )


def mla_decode(
  q: jax.Array,
  kv: jax.Array,
  q_positions: jax.Array,
  kv_positions: jax.Array,
  q_segment_ids: jax.Array,
  kv_segment_ids: jax.Array,
  selected: jax.Array | None = None,
  *,
  kv_lora_rank: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Absorbed latent attention: multi-query attention over the latent cache.

  Args:
    q: [B, T, N, C + R]: queries carried into latent space by W^UK, then the
      rotated part.
    kv: [B, C + R, S]: normalised latents, key and value at once, then the
      rotated key.
    q_positions: int32 [B, T].
    kv_positions: int32 [B, S].
    q_segment_ids: int32 [B, T]; 0 is padding.
    kv_segment_ids: int32 [B, S].
    selected: bool [B, T, S] or None.
    kv_lora_rank: C.
    scale: factor on the scores, YaRN's correction included.

  Returns:
    out [B, T, N, C] in the dtype of `q`, a mean of latents that W^UV turns
    into values; lse float32 [B, N, T].
  """
  b, t, n, _ = q.shape
  mask = attention_mask(
    q_positions, kv_positions, q_segment_ids, kv_segment_ids, selected
  )
  # The query leads and heads are rows: einsum would put the cache first, whose
  # product the CPU forms ten times slower.
  rows = q.swapaxes(1, 2).reshape(b, n * t, -1)
  scores = jnp.matmul(rows, kv, **exact_sums(q.dtype))
  scores = scores.reshape(b, n, t, -1)
  probs, lse = masked_softmax(scores * scale, mask)
  # Over the rotated rows too: cutting them off first would copy the cache.
  out = jax.lax.dot_general(
    probs.astype(q.dtype).reshape(b, n * t, -1),
    kv,
    (((2,), (2,)), ((0,), (0,))),
    **exact_sums(q.dtype),
  )
  out = out.reshape(b, n, t, -1)[..., :kv_lora_rank].swapaxes(1, 2)
  return out.astype(q.dtype), lse
