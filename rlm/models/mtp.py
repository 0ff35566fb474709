"""Multi-token prediction: one more block per further token (V3 eq. 21-23)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlm.models.block import Block
from rlm.models.config import ModelConfig
from rlm.models.layers import RMSNorm, linear, normal_init, parameter
from rlm.parallel.shard import WHOLE, Whole


class MTPModule(nn.Module):
  """h'_i = M [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i)], then a block and a norm.

  The order inside M is that of the released weights (eh_proj), embedding
  first; the paper prints the other one. The norm at the end is the module's
  own, not the model's final norm. h_i is the state after that final norm, or
  after the norm of the module before.
  """

  cfg: ModelConfig
  shard: Whole = WHOLE

  @nn.compact
  def __call__(
    self, hidden, embedded, rotations, positions, segment_ids, counted
  ):
    """One depth further.

    Args:
      hidden: [B, T, D].
      embedded: [B, T, D], of the token that each position reads.
      rotations: cos, sin of `rope_rotations`.
      positions: int32 [B, T].
      segment_ids: int32 [B, T].
      counted: bool [B, T] of `reads_own_segment`.

    Returns:
      [B, T, D], and Routing (None without experts).
    """
    c = self.cfg
    shape = (2 * c.hidden_size, c.hidden_size)
    proj = parameter(self, "proj", normal_init(c), shape)
    joined = jnp.concatenate(
      [
        RMSNorm(c, name="embedding_norm")(embedded),
        RMSNorm(c, name="hidden_norm")(hidden),
      ],
      axis=-1,
    )
    x = linear(joined, proj)
    block = Block(c, not c.is_dense, self.shard, name="block")
    x, (_, routing) = block(x, rotations, positions, segment_ids, None, counted)
    return RMSNorm(c, name="norm")(x), routing


def next_inputs(tokens: jax.Array, depth: int) -> jax.Array:
  """Tokens that module k reads at each position, t_{i+1+k} for k = 0..D-1.

  Args:
    tokens: int32 [B, T].
    depth: D.

  Returns:
    int32 [D, B, T]. The last 1 + k positions wrap round to the row's start;
    they predict past its end, where no target is.
  """
  return jnp.stack([jnp.roll(tokens, -1 - k, axis=1) for k in range(depth)])


def reads_own_segment(segment_ids: jax.Array, depth: int) -> jax.Array:
  """Where the input of module k belongs to the position that reads it.

  Elsewhere a state predicts nothing, so that its routes must not count.

  Args:
    segment_ids: int32 [B, T]; 0 is padding.
    depth: D.

  Returns:
    bool [D, B, T], False in padding and where `next_inputs` wraps round.
  """
  length = segment_ids.shape[1]
  place = jnp.arange(length, dtype=jnp.int32)[None, None]
  ahead = 1 + jnp.arange(depth, dtype=jnp.int32)[:, None, None]
  own = next_inputs(segment_ids, depth) == segment_ids[None]
  return own & (segment_ids != 0)[None] & (place + ahead < length)
