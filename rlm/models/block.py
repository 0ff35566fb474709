"""One pre-norm layer: attention, then a dense or a routed feed-forward."""

from flax import linen as nn

from rlm.models.config import ModelConfig
from rlm.models.layers import RMSNorm, SwiGLU
from rlm.models.mla import MLA
from rlm.models.moe import MoE


class Block(nn.Module):
  """x += Attn(RMSNorm(x)); x += FFN(RMSNorm(x)).

  Attributes:
    cfg: the model's sizes.
    routed: experts instead of the dense feed-forward.
  """

  cfg: ModelConfig
  routed: bool

  def setup(self):
    c = self.cfg
    self.attn_norm = RMSNorm(c)
    self.attn = MLA(c)
    self.ffn_norm = RMSNorm(c)
    self.ffn = MoE(c) if self.routed else SwiGLU(c, c.intermediate_size)

  def _feed_forward(self, x, segment_ids, expert_ids):
    h = self.ffn_norm(x)
    if not self.routed:
      return x + self.ffn(h), None
    out, routing = self.ffn(h, segment_ids, expert_ids)
    return x + out, routing

  def __call__(self, x, rotations, positions, segment_ids, expert_ids):
    """Expanded form: x [B, T, D] -> x, (LayerCache, Routing or None)."""
    out, cache = self.attn(self.attn_norm(x), rotations, positions, segment_ids)
    x, routing = self._feed_forward(x + out, segment_ids, expert_ids)
    return x, (cache, routing)

  def decode(self, x, rotations, layer, lengths, segment_ids):
    """Absorbed form: x [B, 1, D] -> x, (entry, Routing or None)."""
    out, layer = self.attn.decode(self.attn_norm(x), rotations, layer, lengths)
    x, routing = self._feed_forward(x + out, segment_ids, None)
    return x, (layer, routing)
