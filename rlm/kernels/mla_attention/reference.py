"""Both forms in plain jnp: their definition, which every other form must meet.

Operands are taken as they are, products are summed in float32 (in float64 for
operands of it), and the softmax is of those sums.
"""

import jax

from rlm.kernels.attention import attention_mask, masked_softmax
from rlm.kernels.mla_attention.caches import Cache, plain
from rlm.kernels.product import einsum


def mla_attention_reference(
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
) -> tuple[jax.Array, jax.Array]:
  """Expanded latent attention, V3 eq. 10; arguments of `mla_attention`."""
  scores = einsum("BTNH,BSNH->BNTS", q_nope, k_nope)
  scores += einsum("BTNR,BSR->BNTS", q_rope, k_rope)
  mask = attention_mask(
    q_positions, kv_positions, q_segment_ids, kv_segment_ids, selected
  )
  probs, lse = masked_softmax(scores * scale, mask)
  out = einsum("BNTS,BSNh->BTNh", probs.astype(v.dtype), v)
  return out.astype(q_nope.dtype), lse


def mla_decode_reference(
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
  cache = plain(kv, q.dtype)
  mask = attention_mask(
    q_positions, kv_positions, q_segment_ids, kv_segment_ids, selected
  )
  # As BNTS at once, jax 0.10's CPU refuses bfloat16.
  scores = einsum("BTNW,BWS->BTNS", q, cache).swapaxes(1, 2)
  probs, lse = masked_softmax(scores * scale, mask)
  latents = cache[:, :kv_lora_rank]
  out = einsum("BNTS,BCS->BTNC", probs.astype(q.dtype), latents)
  return out.astype(q.dtype), lse
