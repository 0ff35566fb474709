"""`mla_attention`: expanded latent attention, for training and prefill."""

import jax

from rlm.kernels.mla_attention import gpu, tpu
from rlm.kernels.mla_attention.choice import choose
from rlm.kernels.mla_attention.reference import mla_attention_reference
from rlm.kernels.mla_attention.xla import mla_attention_xla


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
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Expanded latent attention, forward and backward; V3 eq. 10.

  A query sees the keys of its own segment up to its own position. In kernels
  the rope key is neither copied for the heads nor joined to the other part.

  Args:
    q_nope: [B, T, N, H].
    q_rope: [B, T, N, R], rotated.
    k_nope: [B, S, N, H].
    k_rope: [B, S, R], rotated; one key for all heads.
    v: [B, S, N, h].
    q_positions: int32 [B, T].
    kv_positions: int32 [B, S].
    q_segment_ids: int32 [B, T]; 0 is padding, which sees nothing.
    kv_segment_ids: int32 [B, S].
    selected: bool [B, T, S] or None; a further restriction (sparse attention).
      Not in the kernels.
    scale: factor on the scores, YaRN's correction included.
    query_chunk: of "xla", queries handled at once, each chunk recomputed in the
      backward pass, so that no [B, N, T, S] exists; 0 takes them whole. Kernels
      hold one tile of scores whatever it says.
    implementation: "reference" (plain jnp), "xla", "tpu" or "gpu" (kernels); or
      None for the platform's kernel where it runs these operands, else "xla".

  Returns:
    out [B, T, N, h] in the dtype of `q_nope`, zeros where a query sees no key;
    lse float32 [B, N, T], -inf there. Both have gradients.

  Raises:
    ValueError: `query_chunk` does not divide T; an unknown implementation.
    NotImplementedError: a named kernel cannot run these operands here.
  """
  operands = (q_nope, q_rope, k_nope, k_rope, v)
  places = (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
  kernels = {"tpu": tpu, "gpu": gpu}
  name = choose(
    "mla_attention",
    implementation,
    lambda kernel: kernels[kernel].attention_obstacle(
      *operands, selected, scale
    ),
  )
  if name == "reference":
    return mla_attention_reference(*operands, *places, selected, scale=scale)
  if name == "xla":
    return mla_attention_xla(
      *operands, *places, selected, scale=scale, query_chunk=query_chunk
    )
  return kernels[name].attention(*operands, *places, scale=scale)
