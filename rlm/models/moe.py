"""DeepSeekMoE: routing, balance, and the layer of experts.

Sources: V3 eq. 12-20 and its released gate. The maths is functions over
arrays; `MoE` at the end owns the parameters.
"""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from rlm.models.config import ModelConfig
from rlm.models.experts import routed_experts
from rlm.models.layers import SwiGLU, linear, normal_init, parameter
from rlm.parallel.expert import exchanged
from rlm.parallel.shard import WHOLE, Whole


@flax.struct.dataclass
class Routing:
  """Where tokens went. Stacked over layers it leads with an axis L.

  Attributes:
    expert_ids: int32 [B, T, K], the experts of each token, best first.
    expert_load: float32 [E], tokens sent to each expert, padding excluded.
    balance_loss: float32 [B], the sequence-wise loss of each row, without
      alpha (V3 eq. 17-20); 0 for a row without tokens.
    flips: bool [B, T], tokens that the router would send to other experts than
      the replayed ones, from a state that the layers below reached by replayed
      routes; False in padding, and all False where routes are chosen.
    dropped: float32 [], choices of an expert that found no room, which only a
      capacity limits (`rlm.parallel.expert`).

  On a mesh all of it is of this device's tokens, and a row that is divided
  among devices has its balance loss divided among them.
  """

  expert_ids: jax.Array
  expert_load: jax.Array
  balance_loss: jax.Array
  flips: jax.Array
  dropped: jax.Array


def expert_scores(logits: jax.Array, scoring_func: str) -> jax.Array:
  """Affinities s of float32 logits [..., E]; V3 eq. 15, V2 eq. 22."""
  if scoring_func == "sigmoid":
    return jax.nn.sigmoid(logits)
  return jax.nn.softmax(logits, axis=-1)


def select_experts(
  scores: jax.Array, expert_bias: jax.Array, cfg: ModelConfig
) -> jax.Array:
  """The K experts of each token.

  Args:
    scores: float32 [..., E].
    expert_bias: float32 [E]; enters the choice of `noaux_tc` alone.
    cfg: n_group, topk_group, topk_method, num_experts_per_tok.

  Returns:
    int32 [..., K], by falling score. Experts of the groups not kept are masked
    with -inf, so that a negative biased score never loses to them.
  """
  choice = jax.lax.stop_gradient(scores)
  if cfg.topk_method == "noaux_tc":
    choice += expert_bias.reshape((1,) * (scores.ndim - 1) + (-1,))
  if cfg.topk_method != "greedy" and cfg.n_group > 1:
    groups = choice.reshape(*choice.shape[:-1], cfg.n_group, -1)
    if cfg.topk_method == "noaux_tc":
      group_scores = jax.lax.top_k(groups, 2)[0].sum(axis=-1)
    else:
      group_scores = groups.max(axis=-1)
    kept = jax.lax.top_k(group_scores, cfg.topk_group)[1]
    keep = jax.nn.one_hot(kept, cfg.n_group, dtype=jnp.bool_).any(axis=-2)
    groups = jnp.where(keep[..., None], groups, -jnp.inf)
    choice = groups.reshape(choice.shape)
  return jax.lax.top_k(choice, cfg.num_experts_per_tok)[1].astype(jnp.int32)


def route(
  logits: jax.Array,
  expert_bias: jax.Array,
  cfg: ModelConfig,
  expert_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses experts and weighs them; V3 eq. 12-16.

  The gates are the unbiased scores of the chosen experts, gathered and never
  recovered from the biased ones, which would lose them to cancellation.

  Args:
    logits: float32 [B, T, E].
    expert_bias: float32 [E].
    cfg: the gate's settings.
    expert_ids: int32 [B, T, K] to replay routes, or None to choose.

  Returns:
    expert_ids int32 [B, T, K]; gates float32 [B, T, K]; scores float32
    [B, T, E].
  """
  scores = expert_scores(logits, cfg.scoring_func)
  if expert_ids is None:
    expert_ids = select_experts(scores, expert_bias, cfg)
  gates = jnp.take_along_axis(scores, expert_ids, axis=-1)
  if cfg.norm_topk_prob:
    gates /= gates.sum(axis=-1, keepdims=True) + 1e-20  # as released
  return expert_ids, gates * cfg.routed_scaling_factor, scores


def route_flips(chosen: jax.Array, replayed: jax.Array) -> jax.Array:
  """Whether two choices differ as sets; int32 [..., K] twice -> bool [...]."""
  # Neither holds an expert twice, so that one inclusion is equality.
  found = (chosen[..., :, None] == replayed[..., None, :]).any(axis=-1)
  return ~found.all(axis=-1)


def count_experts(expert_ids: jax.Array, n_experts: int) -> jax.Array:
  """Which experts each token chose: int32 [..., K] -> float32 [..., E]."""
  return jax.nn.one_hot(expert_ids, n_experts, dtype=jnp.float32).sum(axis=-2)


def sequence_balance_loss(
  scores: jax.Array,
  mask: jax.Array,
  num_experts_per_tok: int,
  sum_row: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
  """The sequence-wise balance loss of each row, without alpha; V3 eq. 17-20.

  f_i counts the top K of the unbiased scores, as printed, not the biased and
  grouped choice. The gradient flows through P_i alone.

  Args:
    scores: float32 [B, T, E].
    mask: bool [B, T], True for tokens; T of the equation counts these.
    num_experts_per_tok: K.
    sum_row: completes a sum over T where a row is divided among devices.

  Returns:
    float32 [B]; 1 under perfect balance, 0 for a row without tokens.
  """
  n_experts = scores.shape[-1]
  weight = mask.astype(jnp.float32)[..., None]
  tokens = jnp.maximum(sum_row(weight.sum(axis=1)), 1.0)  # [B, 1]
  top = jax.lax.top_k(jax.lax.stop_gradient(scores), num_experts_per_tok)[1]
  chosen = sum_row((count_experts(top, n_experts) * weight).sum(axis=1))
  expert_load = chosen * n_experts / (num_experts_per_tok * tokens)
  # As in the gates: sigmoids that all underflow have no sum to divide by.
  share = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
  router_prob = sum_row((share * weight).sum(axis=1)) / tokens
  return (expert_load * router_prob).sum(axis=-1)


def update_expert_bias(
  expert_bias: jax.Array, expert_load: jax.Array, rate: jax.Array | float
) -> jax.Array:
  """Aux-loss-free balance: b_i += rate * sign(mean(c) - c_i); V3 2.1.2.

  Args:
    expert_bias: float32 [..., E].
    expert_load: float32 [..., E], tokens c_i over the whole global batch.
    rate: gamma.

  Returns:
    float32 [..., E].
  """
  mean = expert_load.mean(axis=-1, keepdims=True)
  return expert_bias + rate * jnp.sign(mean - expert_load)


class MoE(nn.Module):
  """Router, routed experts and the ungated shared expert; V3 eq. 12."""

  cfg: ModelConfig
  shard: Whole = WHOLE

  @nn.compact
  def __call__(self, x, segment_ids, replayed=None):
    """Output and Routing.

    Args:
      x: [B, T, D].
      segment_ids: int32 [B, T]; 0 leaves a token out of the statistics.
      replayed: int32 [B, T, K], the experts to use, or None to choose.
    """
    c, shard = self.cfg, self.shard
    init = normal_init(c)
    d, e, f = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    router = parameter(self, "router", init, (d, e))
    expert_bias = self.variable(
      "router", "expert_bias", jnp.zeros, (e,), jnp.float32
    )
    weights = (
      parameter(self, "gate_proj", init, (e, d, f)),
      parameter(self, "up_proj", init, (e, d, f)),
      parameter(self, "down_proj", init, (e, f, d)),
    )
    # The gate is float32 whatever the model's dtype (sheet 2.4).
    logits = linear(x.astype(jnp.float32), router)
    expert_ids, gates, scores = route(logits, expert_bias.value, c, replayed)
    k = c.num_experts_per_tok
    out, dropped = self._experts(
      shard.enter_tensor(x).reshape(-1, d),
      shard.enter_tensor(gates).reshape(-1, k),
      expert_ids.reshape(-1, k),
      weights,
    )
    out = shard.leave_tensor(out).reshape(x.shape)
    if c.n_shared_experts:
      out += SwiGLU(c, c.n_shared_experts * f, shard, name="shared")(x)
    mask = segment_ids != 0
    chosen = count_experts(expert_ids, e) * mask[..., None]
    flips = jnp.zeros_like(mask)
    if replayed is not None:  # XLA drops it where nobody asks
      free = select_experts(scores, expert_bias.value, c)
      flips = route_flips(free, replayed) & mask
    routing = Routing(
      expert_ids=expert_ids,
      expert_load=chosen.sum(axis=(0, 1)),
      balance_loss=sequence_balance_loss(scores, mask, k, shard.sum_row)
      / shard.context,
      flips=flips,
      dropped=dropped,
    )
    return out, routing

  def _experts(self, x, gates, expert_ids, weights):
    """[n, D] of the routed experts, wherever they are, and what was dropped."""
    exchange = self.shard.exchange
    if not exchange.levels:
      return routed_experts(x, gates, expert_ids, weights), jnp.float32(0)
    chunk = min(exchange.chunk or x.shape[0], x.shape[0])

    def run(weights, rows, row_gates, local_ids):
      return routed_experts(
        rows, row_gates, local_ids, weights, rows=chunk * gates.shape[1]
      )

    return exchanged(
      exchange, run, weights, x, gates, expert_ids, self.cfg.n_routed_experts
    )
