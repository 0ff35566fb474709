"""Both forms as XLA runs them best: no kernels, any platform."""

import jax
import jax.numpy as jnp

from rlm.kernels.attention import (
  attend_heads,
  attention_mask,
  by_query_chunks,
  masked_softmax,
  prefers_heads,
)
from rlm.kernels.mla_attention.caches import Cache, plain
from rlm.kernels.mla_attention.reference import mla_attention_reference
from rlm.kernels.product import exact_sums


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


def mla_attention_xla(
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
  query_chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Expanded latent attention; arguments of `mla_attention`.

  A few heads on a CPU go one after the other, else all in one product.
  `query_chunk` queries are handled at once, and recomputed in the backward
  pass, so that no [B, N, T, S] exists.
  """
  by_head = prefers_heads(q_nope.shape[2])

  def attend(keys, part):
    (q_nope, q_rope), q_positions, q_segment_ids, selected = part
    k_nope, k_rope, v, kv_positions, kv_segment_ids = keys
    operands = (q_nope, q_rope, k_nope, k_rope, v)
    places = (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
    if by_head:
      mask = attention_mask(*places, selected)
      return _attend_by_head(*operands, mask, scale)
    return mla_attention_reference(*operands, *places, selected, scale=scale)

  return by_query_chunks(
    attend,
    query_chunk,
    (k_nope, k_rope, v, kv_positions, kv_segment_ids),
    (q_nope, q_rope),
    q_positions,
    q_segment_ids,
    selected,
  )


def mla_decode_xla(
  q: jax.Array,
  kv: Cache,
  q_positions: jax.Array,
  kv_positions: jax.Array,
  q_segment_ids: jax.Array,
  kv_segment_ids: jax.Array,
  selected: jax.Array | None = None,
  *,
  kv_lora_rank: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Attention over the latent cache; arguments of `mla_decode`."""
  b, t, n, _ = q.shape
  cache = plain(kv, q.dtype)
  mask = attention_mask(
    q_positions, kv_positions, q_segment_ids, kv_segment_ids, selected
  )
  # The query leads and heads are rows: einsum would put the cache first, whose
  # product the CPU forms ten times slower.
  rows = q.swapaxes(1, 2).reshape(b, n * t, -1)
  scores = jnp.matmul(rows, cache, **exact_sums(q.dtype))
  scores = scores.reshape(b, n, t, -1)
  probs, lse = masked_softmax(scores * scale, mask)
  # Over the rotated rows too: cutting them off first would copy the cache. And
  # the cache on the left, where the CPU takes a third less time in float32.
  out = jax.lax.dot_general(
    cache,
    probs.astype(q.dtype).reshape(b, n * t, -1),
    (((2,), (2,)), ((0,), (0,))),
    **exact_sums(q.dtype),
  )
  out = out[:, :kv_lora_rank].swapaxes(1, 2).reshape(b, n, t, -1)
  return out.swapaxes(1, 2).astype(q.dtype), lse
