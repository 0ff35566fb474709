"""Multi-head latent attention, expanded and absorbed (V3 eq. 1-11).

Weights are packed as published: q_b and kv_b are head-major, the part without
positions first; kv_a holds the latent's rows first, then the RoPE key's.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from rlm.kernels import mla_attention as kernel
from rlm.kernels.recomputed import map_recomputed
from rlm.models.cache import write_entry
from rlm.models.config import ModelConfig
from rlm.models.layers import (
  ATTENTION_OUTPUT,
  RMSNorm,
  dot,
  linear,
  normal_init,
  parameter,
)
from rlm.models.quantized import operand
from rlm.models.rope import apply_rope, softmax_scale
from rlm.parallel.shard import WHOLE, Whole


class MLA(nn.Module):
  """Latent attention with low-rank queries, or plain ones if q_lora_rank=None.

  `__call__` is the expanded form, `decode` the absorbed form of the same
  weights: W^UK moves into the query and W^UV behind the sum over tokens.
  """

  cfg: ModelConfig
  shard: Whole = WHOLE

  def setup(self):
    c, init = self.cfg, normal_init(self.cfg)
    n, d = c.num_attention_heads, c.hidden_size
    qk_head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
    if c.q_lora_rank is None:
      self.q_proj = parameter(self, "q_proj", init, (d, n * qk_head_dim))
    else:
      self.q_a = parameter(self, "q_a", init, (d, c.q_lora_rank))
      self.q_norm = RMSNorm(c)
      shape = (c.q_lora_rank, n * qk_head_dim)
      self.q_b = parameter(self, "q_b", init, shape)
    shape = (d, c.kv_lora_rank + c.qk_rope_head_dim)
    self.kv_a = parameter(self, "kv_a", init, shape)
    self.kv_norm = RMSNorm(c)
    shape = (c.kv_lora_rank, n * (c.qk_nope_head_dim + c.v_head_dim))
    self.kv_b = parameter(self, "kv_b", init, shape)
    self.out_proj = parameter(self, "out_proj", init, (n * c.v_head_dim, d))

  def query_latent(self, x: jax.Array) -> jax.Array:
    """c^Q, normalised; [B, T, D] -> [B, T, Q]."""
    return self.q_norm(linear(x, self.q_a))

  def _query_input(self, x):
    """What the queries are a product of, and its matrix [., N * (H + R)]."""
    if self.cfg.q_lora_rank is None:
      return self.shard.enter_tensor(x), self.q_proj
    return self.shard.enter_tensor(self.query_latent(x)), self.q_b

  def _queries(self, x, matrix, rotations):
    """q_nope [B, T, N, H], rotated q_rope [B, T, N, R] of `_query_input`."""
    c = self.cfg
    q = linear(x, matrix)
    q = q.reshape(*x.shape[:2], -1, c.qk_nope_head_dim + c.qk_rope_head_dim)
    q_nope, q_rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
    return q_nope, apply_rope(q_rope, *rotations)

  def _latents(self, x, rotations):
    """Normalised kv_latent [B, T, C] and rotated k_rope [B, T, R]."""
    kv = linear(x, self.kv_a)
    kv_latent, k_rope = jnp.split(kv, [self.cfg.kv_lora_rank], axis=-1)
    return self.kv_norm(kv_latent), apply_rope(k_rope, *rotations)

  def _kv_up(self, x):
    """W^UK [C, N, H] and W^UV [C, N, h] of the packed kv_b, as x's operands."""
    c = self.cfg
    kv_b = operand(self.kv_b, x)
    width = c.qk_nope_head_dim + c.v_head_dim
    kv_b = kv_b.reshape(c.kv_lora_rank, -1, width)
    return jnp.split(kv_b, [c.qk_nope_head_dim], axis=-1)

  def _out(self, heads):
    out = linear(heads.reshape(*heads.shape[:2], -1), self.out_proj)
    return self.shard.leave_tensor(out)

  @property
  def _scale(self) -> float:
    c = self.cfg
    qk_head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
    return softmax_scale(qk_head_dim, c.rope_scaling)

  def __call__(self, x, rotations, positions, segment_ids):
    """Expanded form.

    Args:
      x: cfg.dtype [B, T, D].
      rotations: cos, sin of `rope_rotations`.
      positions: int32 [B, T].
      segment_ids: int32 [B, T]; 0 is padding.

    Returns:
      out [B, T, D] and the layer's cache [B, C + R, T] of these tokens.
    """
    c, shard = self.cfg, self.shard
    latent, q_matrix = self._query_input(x)
    entries = jnp.concatenate(self._latents(x, rotations), axis=-1)
    matrices = (q_matrix, self.kv_b)
    rows = (
      latent,
      rotations,
      # What the other parts of a row need of this one: C + R numbers a token.
      shard.whole_rows(shard.enter_tensor(entries)),
      positions,
      shard.whole_rows(positions),
      segment_ids,
      shard.whole_rows(segment_ids),
    )
    if 0 < c.attention_chunk < x.shape[1] and x.shape[0] > 1:
      out = map_recomputed(
        lambda matrices, row: self._heads(matrices, row)[0],
        matrices,
        jax.tree.map(lambda leaf: leaf[:, None], rows),
      )
    else:
      out = self._heads(matrices, rows)
    out = checkpoint_name(out, ATTENTION_OUTPUT)
    return self._out(out), entries.swapaxes(1, 2)

  def _heads(self, matrices, rows):
    """[B, T, N, h], of `rows` of `__call__`."""
    c = self.cfg
    q_matrix, kv_b = matrices
    latent, rotations, entries, *places = rows
    q_nope, q_rope = self._queries(latent, q_matrix, rotations)
    kv_latent, k_rope = jnp.split(entries, [c.kv_lora_rank], axis=-1)
    kv = linear(kv_latent, kv_b)
    width = c.qk_nope_head_dim + c.v_head_dim
    kv = kv.reshape(*kv_latent.shape[:2], -1, width)
    k_nope, v = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)
    out, _ = kernel.mla_attention(
      q_nope,
      q_rope,
      k_nope,
      k_rope,
      v,
      *places,
      scale=self._scale,
      query_chunk=c.attention_chunk,
    )
    return out

  def decode(self, x, rotations, layer, lengths):
    """Absorbed form of one new token a row.

    Args:
      x: cfg.dtype [B, 1, D].
      rotations: cos, sin at position `lengths`.
      layer: [B, C + R, S] of TokenCache.
      lengths: int32 [B], entries of the cache in use.

    Returns:
      out [B, 1, D] and the layer's cache with the token added.
    """
    latent, q_matrix = self._query_input(x)
    q_nope, q_rope = self._queries(latent, q_matrix, rotations)
    # Devices of a tensor group hold the cache alike, and read it differently.
    entry = jnp.concatenate(self._latents(x, rotations), axis=-1)
    layer = write_entry(layer, entry[:, 0], lengths)
    k_up, v_up = self._kv_up(x)
    q_latent = dot("BTNH,CNH->BTNC", q_nope, k_up)
    slots = jnp.arange(layer.shape[-1], dtype=jnp.int32)[None]
    position = lengths[:, None]
    held = (slots <= position).astype(jnp.int32)
    latent, _ = kernel.mla_decode(
      jnp.concatenate([q_latent, q_rope], axis=-1),
      layer,
      position,
      jnp.broadcast_to(slots, held.shape),
      jnp.ones_like(position),
      held,
      kv_lora_rank=self.cfg.kv_lora_rank,
      scale=self._scale,
    )
    heads = dot("BTNC,CNh->BTNh", latent, v_up)
    return self._out(heads), layer
