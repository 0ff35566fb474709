"""Grouped-query attention, as the distilled Qwen and Llama students have it.

Its RoPE turns pairs half a head apart. Weights are packed as published, head
by head.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from rlm.kernels import gqa_attention as kernel
from rlm.models.cache import write_entry
from rlm.models.config import ModelConfig
from rlm.models.layers import (
  ATTENTION_OUTPUT,
  RMSNorm,
  linear,
  normal_init,
  parameter,
)
from rlm.models.rope import apply_half_rope
from rlm.parallel.shard import WHOLE, Whole


class GQA(nn.Module):
  """N query heads over M key and value heads (arXiv:2305.13245).

  With biases on q, k and v if cfg.qkv_bias (Qwen2), and with each head's q and
  k normalised before RoPE if cfg.qk_norm (Qwen3).
  """

  cfg: ModelConfig
  shard: Whole = WHOLE

  def setup(self):
    c, init = self.cfg, normal_init(self.cfg)
    d, h = c.hidden_size, c.head_dim
    n, m = c.num_attention_heads, c.num_key_value_heads
    self.q_proj = parameter(self, "q_proj", init, (d, n * h))
    self.k_proj = parameter(self, "k_proj", init, (d, m * h))
    self.v_proj = parameter(self, "v_proj", init, (d, m * h))
    self.out_proj = parameter(self, "out_proj", init, (n * h, d))
    if c.qkv_bias:
      zeros = nn.initializers.zeros
      self.q_bias = parameter(self, "q_bias", zeros, (n * h,))
      self.k_bias = parameter(self, "k_bias", zeros, (m * h,))
      self.v_bias = parameter(self, "v_bias", zeros, (m * h,))
    if c.qk_norm:
      self.q_norm = RMSNorm(c, self.shard.enter_tensor)
      self.k_norm = RMSNorm(c, self.shard.enter_tensor)

  def _heads(self, x, rotations):
    """Rotated q [B, T, N, H] and k [B, T, M, H], and v [B, T, M, H]."""
    c = self.cfg
    x = self.shard.enter_tensor(x)
    q, k, v = (linear(x, w) for w in (self.q_proj, self.k_proj, self.v_proj))
    if c.qkv_bias:
      q, k, v = (
        y + bias.astype(y.dtype)[None, None]
        for y, bias in (
          (q, self.q_bias),
          (k, self.k_bias),
          (v, self.v_bias),
        )
      )
    q, k, v = (y.reshape(*x.shape[:2], -1, c.head_dim) for y in (q, k, v))
    if c.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    return apply_half_rope(q, *rotations), apply_half_rope(k, *rotations), v

  def _out(self, heads):
    out = linear(heads.reshape(*heads.shape[:2], -1), self.out_proj)
    return self.shard.leave_tensor(out)

  @property
  def _scale(self) -> float:
    """YaRN's magnitude is on cos and sin alone; DeepSeek's m^2 is not here."""
    return self.cfg.head_dim**-0.5

  def __call__(self, x, rotations, positions, segment_ids):
    """Training and prefill.

    Args:
      x: cfg.dtype [B, T, D].
      rotations: cos, sin of `rope_rotations`.
      positions: int32 [B, T].
      segment_ids: int32 [B, T]; 0 is padding.

    Returns:
      out [B, T, D] and the layer's cache [B, 2 M H, T] of these tokens.
    """
    q, k, v = self._heads(x, rotations)
    whole_rows = self.shard.whole_rows
    out, _ = kernel.gqa_attention(
      q,
      whole_rows(k),
      whole_rows(v),
      positions,
      whole_rows(positions),
      segment_ids,
      whole_rows(segment_ids),
      scale=self._scale,
      query_chunk=self.cfg.attention_chunk,
    )
    out = checkpoint_name(out, ATTENTION_OUTPUT)
    return self._out(out), _entries(k, v).swapaxes(1, 2)

  def decode(self, x, rotations, layer, lengths):
    """One new token a row over the cache.

    Args:
      x: cfg.dtype [B, 1, D].
      rotations: cos, sin at position `lengths`.
      layer: [B, 2 M H, S] of TokenCache.
      lengths: int32 [B], entries of the cache in use.

    Returns:
      out [B, 1, D] and the layer's cache with the token added.
    """
    q, k, v = self._heads(x, rotations)
    layer = write_entry(layer, _entries(k, v)[:, 0], lengths)
    slots = jnp.arange(layer.shape[-1], dtype=jnp.int32)[None]
    position = lengths[:, None]
    held = (slots <= position).astype(jnp.int32)
    out, _ = kernel.gqa_decode(
      q,
      layer,
      position,
      jnp.broadcast_to(slots, held.shape),
      jnp.ones_like(position),
      held,
      num_key_value_heads=layer.shape[1] // (2 * self.cfg.head_dim),
      scale=self._scale,
    )
    return self._out(out), layer


def _entries(k, v):
  """[B, T, 2 M H] of [B, T, M, H] twice: what the cache keeps of a token."""
  return jnp.concatenate([k, v], axis=2).reshape(*k.shape[:2], -1)
