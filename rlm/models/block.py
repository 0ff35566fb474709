"""One pre-norm layer: attention, then a dense or a routed feed-forward."""

import jax.numpy as jnp
from flax import linen as nn

from rlm.models.config import ModelConfig
from rlm.models.gqa import GQA
from rlm.models.layers import RMSNorm, SwiGLU
from rlm.models.mla import MLA
from rlm.models.moe import MoE
from rlm.parallel.shard import WHOLE, Whole


class Block(nn.Module):
  """x += Attn(RMSNorm(x)); x += FFN(RMSNorm(x)).

  Attributes:
    cfg: the model's sizes.
    routed: experts instead of the dense feed-forward.
    shard: what the other devices are asked for.
  """

  cfg: ModelConfig
  routed: bool
  shard: Whole = WHOLE

  def setup(self):
    c, shard = self.cfg, self.shard
    self.attn_norm = RMSNorm(c)
    self.attn = (MLA if c.has_latent_attention else GQA)(c, shard)
    self.ffn_norm = RMSNorm(c)
    if self.routed:
      self.ffn = MoE(c, shard)
    else:
      self.ffn = SwiGLU(c, c.intermediate_size, shard)

  def _feed_forward(self, x, segment_ids, expert_ids):
    h = self.ffn_norm(x)
    if not self.routed:
      return x + self.ffn(h), None
    out, routing = self.ffn(h, segment_ids, expert_ids)
    return x + out, routing

  def __call__(
    self, x, rotations, positions, segment_ids, expert_ids, counted=None
  ):
    """Training and prefill; of latent attention, the expanded form.

    Args:
      x: [B, T, D].
      rotations: cos, sin of `rope_rotations`.
      positions: int32 [B, T].
      segment_ids: int32 [B, T]; 0 is padding.
      expert_ids: int32 [B, T, K] to replay routes, or None.
      counted: bool [B, T], tokens in the statistics of the routing; None for
        all but padding.

    Returns:
      x, and a pair: the layer's cache entries [B, W, T] (see TokenCache),
      and Routing, None without experts.
    """
    out, layer = self.attn(self.attn_norm(x), rotations, positions, segment_ids)
    if counted is not None:
      segment_ids = jnp.where(counted, segment_ids, 0)
    x, routing = self._feed_forward(x + out, segment_ids, expert_ids)
    return x, (layer, routing)

  def decode(self, x, rotations, layer, lengths, segment_ids):
    """One token over the cache: x [B, 1, D] -> x, (layer, Routing or None).

    layer: [B, W, S] of TokenCache, before and after; lengths: int32 [B].
    """
    out, layer = self.attn.decode(self.attn_norm(x), rotations, layer, lengths)
    x, routing = self._feed_forward(x + out, segment_ids, None)
    return x, (layer, routing)
