"""`mla_decode`: absorbed latent attention, over the latent cache."""

import jax

from rlm.kernels.mla_attention import gpu, tpu
from rlm.kernels.mla_attention.caches import Cache
from rlm.kernels.mla_attention.choice import choose
from rlm.kernels.mla_attention.reference import mla_decode_reference
from rlm.kernels.mla_attention.xla import mla_decode_xla


def mla_decode(
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
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Absorbed latent attention: multi-query attention over the latent cache.

  A kernel reads a latent once, as key and as value, and reads no tile of the
  cache that no query of its row sees. Kernels have no gradient: decoding needs
  none.

  Args:
    q: [B, T, N, C + R]: queries carried into latent space by W^UK, then the
      rotated part; several tokens a row where T > 1.
    kv: the cache, with room for S tokens a row: [B, C + R, S], normalised
      latents over the rotated key; or Float8Latents, or PagedLatents.
    q_positions: int32 [B, T].
    kv_positions: int32 [B, S].
    q_segment_ids: int32 [B, T]; 0 is padding, which sees nothing.
    kv_segment_ids: int32 [B, S]; 0 beyond what a row holds.
    selected: bool [B, T, S] or None; a further restriction.
    kv_lora_rank: C.
    scale: factor on the scores, YaRN's correction included.
    implementation: "reference" (plain jnp), "xla", "tpu" or "gpu" (kernels); or
      None for the platform's kernel where it runs these operands, else "xla".

  Returns:
    out [B, T, N, C] in the dtype of `q`, a mean of latents that W^UV turns
    into values; lse float32 [B, N, T].

  Raises:
    ValueError: an unknown implementation.
    NotImplementedError: a named kernel cannot run these operands here.
  """
  places = (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
  kernels = {"tpu": tpu, "gpu": gpu}
  name = choose(
    "mla_decode",
    implementation,
    lambda kernel: kernels[kernel].decode_obstacle(q, kv, kv_lora_rank),
  )
  if name == "reference":
    run = mla_decode_reference
  elif name == "xla":
    run = mla_decode_xla
  else:
    run = kernels[name].decode
  return run(q, kv, *places, selected, kv_lora_rank=kv_lora_rank, scale=scale)
