"""Attention as others offer it: what our latent attention is measured against.

Each takes q [B, T, N, W], k [B, S, K, W], v [B, S, K, h] with K = N heads, or
one for all, and returns [B, T, N, h]; it raises where it does not apply. None
knows of a key in two parts, so the expanded form joins them before
(`joined_keys`), at its own cost; so does whoever uses these in a model.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlm.kernels.backend import backend

Rival = Callable[..., jax.Array]


def joined_keys(
  q_nope: jax.Array, q_rope: jax.Array, k_nope: jax.Array, k_rope: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Queries and keys [B, T, N, H + R]: the rope key copied for each head."""
  shape = (*k_nope.shape[:3], k_rope.shape[-1])
  k_rope = jnp.broadcast_to(k_rope[:, :, None], shape)
  q = jnp.concatenate([q_nope, q_rope], axis=-1)
  return q, jnp.concatenate([k_nope, k_rope], axis=-1)


def _jax_nn(implementation: str) -> Rival:
  """It wants values as wide as keys: zeros are added, and cut off again."""

  def attend(q, k, v, *, scale, causal):
    width = v.shape[-1]
    missing = k.shape[-1] - width
    if missing:
      v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, missing)))
    out = jax.nn.dot_product_attention(
      q, k, v, scale=scale, is_causal=causal, implementation=implementation
    )
    return out[..., :width]

  return attend


def _cudnn(q, k, v, *, scale, causal):
  """As `jax.nn` calls it, but with values of their own width."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  kind = cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK
  return cudnn.dot_product_attention(q, k, v, scale=scale, mask_type=kind)


def _tokamax(q, k, v, *, scale, causal):
  try:
    import tokamax
  except ImportError as error:
    raise NotImplementedError("tokamax is not installed") from error
  return tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=causal)


def _splash(q, k, v, *, scale, causal):
  if backend() != "tpu":
    raise NotImplementedError("splash attention is a kernel for TPU")
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  t, s, n = q.shape[1], k.shape[1], q.shape[2]
  of_head = splash.CausalMask((t, s)) if causal else splash.FullMask((t, s))
  mask = splash.MultiHeadMask([of_head] * n)
  attend = splash.make_splash_mha_single_device(mask)
  by_head = [x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v)]
  return jax.vmap(attend)(*by_head).swapaxes(1, 2)


RIVALS: dict[str, Rival] = {
  "jax.nn xla": _jax_nn("xla"),
  "jax.nn cudnn": _jax_nn("cudnn"),
  "cudnn": _cudnn,
  "tokamax": _tokamax,
  "splash": _splash,
}
