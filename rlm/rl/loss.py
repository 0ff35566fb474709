"""The RL loss over a packed minibatch, and the log-probs it needs.

The policy is evaluated exactly as it was sampled from: same temperature, and
the same expert routes, replayed from the sampler, since near-tied experts flip
under rounding and would move log-probs for no reason of learning.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlm.losses import Aux, LossFn, count_choices, token_logprobs
from rlm.models.moe import Routing, route_flips
from rlm.models.transformer import Transformer, head_kernel
from rlm.rl.objectives import Objective, policy_loss

# The MTP modules predict from states that RL keeps moving; trained along, they
# would pull on those states.  R1 keeps them for speculative decoding only.
FROZEN = ("mtp_modules",)


def completion_logprobs(
  model: Transformer,
  variables: Any,
  batch: dict[str, jax.Array],
  *,
  temperature: float,
  replay_routes: bool,
) -> tuple[jax.Array, jax.Array, Routing]:
  """Log-prob of every token given those before it, aligned with the tokens.

  Args:
    model: the Transformer.
    variables: policy's, old policy's or reference's.
    batch: as `rlm.rl.selection.make_minibatch` gives it.
    temperature: divides the logits, as in the sampler.
    replay_routes: send tokens to the experts in batch["expert_ids"].

  Returns:
    logprobs float32 [B, T], of tokens[b, t]; entropy float32 [B, T], of the
    distribution it was drawn from; both 0 at t = 0, meaningless outside the
    completion.  And the routing of the forward pass.
  """
  cfg = model.cfg
  tokens = batch["tokens"]
  expert_ids = batch["expert_ids"].swapaxes(0, 1) if replay_routes else None
  hidden, routing = model.apply(
    variables, tokens, batch["positions"], batch["segment_ids"], expert_ids
  )
  logprobs, entropy = token_logprobs(
    hidden[:, :-1].reshape(-1, hidden.shape[-1]),
    head_kernel(variables, cfg),
    tokens[:, 1:].reshape(-1),
    n_vocab_used=cfg.n_vocab_used,
    temperature=temperature,
    chunk=cfg.logits_chunk,
    shard=model.shard,
  )
  rows = tokens.shape[0]

  def align(x):
    return jnp.pad(x.reshape(rows, -1), [(0, 0), (1, 0)])

  return align(logprobs), align(entropy), routing


def flip_share(
  routing: Routing, batch: dict[str, jax.Array], *, replay_routes: bool
) -> jax.Array:
  """Share of MoE layers where each token would go to other experts.

  Under replay a layer's router is asked along the replayed path, so that every
  flip is its own and none follows from a flip below.

  Args:
    routing: of the forward pass.
    batch: with the sampler's expert_ids.
    replay_routes: whether that pass followed them.

  Returns:
    float32 [B, T].
  """
  if replay_routes:
    flips = routing.flips
  else:
    sampled = batch["expert_ids"].swapaxes(0, 1)
    flips = route_flips(routing.expert_ids, sampled)
  return flips.sum(axis=0) / jnp.float32(max(flips.shape[0], 1))


def sampler_metrics(
  batch: dict[str, jax.Array], logprobs: jax.Array, flips: jax.Array
) -> dict[str, jax.Array]:
  """How far the trainer is from the sampler, at the weights that sampled.

  Args:
    batch: as `rlm.rl.selection.make_minibatch` gives it, also in microbatches.
    logprobs: the trainer's, of the shape of batch["tokens"].
    flips: of `flip_share`, likewise.

  Returns:
    sampler_diff/mean and sampler_diff/max, the difference of the log-probs of
    completion tokens in nats; and route_flip_rate, the mean of `flips` over
    these tokens (0 for a dense model).
  """
  mask, weights = batch["loss_mask"], batch["metric_weights"]
  diff = jnp.where(mask, jnp.abs(logprobs - batch["sampler_logprobs"]), 0)
  return {
    "sampler_diff/mean": (weights * diff).sum(),
    "sampler_diff/max": diff.max(),
    "route_flip_rate": (weights * flips).sum(),
  }


def make_rl_loss(
  model: Transformer,
  objective: Objective,
  *,
  temperature: float,
  replay_routes: bool,
) -> LossFn:
  """The loss of `objective` as a LossFn for `rlm.train.make_train_step`.

  `old_logprobs` and `old_flips` of the batch are the trainer's own, computed
  before the first update of the rollout.  Leave both out when the rollout has
  one minibatch: the policy has not moved yet, so they are those of this very
  pass, and a forward pass is saved; ratios are then exactly 1 and nothing is
  clipped.  `ref_logprobs` may be left out where kl_weight is 0.

  Nothing of the MTP modules is touched; see `freeze` for their optimizer.

  Args:
    model: the Transformer.
    objective: a row of the table.
    temperature: as sampled.
    replay_routes: False lets the trainer route anew (an ablation).

  Returns:
    LossFn over minibatches of `rlm.rl.selection.make_minibatch`.  Metrics are
    those of `policy_loss` and `sampler_metrics`, and entropy (token mean, in
    nats).
  """

  def loss_fn(variables, batch, key):
    del key  # nothing here is random
    logprobs, entropy, routing = completion_logprobs(
      model,
      variables,
      batch,
      temperature=temperature,
      replay_routes=replay_routes,
    )
    mask, metric_weights = batch["loss_mask"], batch["metric_weights"]
    if "old_logprobs" in batch:
      old_logprobs, old_flips = batch["old_logprobs"], batch["old_flips"]
    else:
      old_logprobs = jax.lax.stop_gradient(logprobs)
      old_flips = flip_share(routing, batch, replay_routes=replay_routes)
    loss, metrics = policy_loss(
      objective,
      logprobs,
      old_logprobs,
      batch["ref_logprobs"] if "ref_logprobs" in batch else None,
      batch["advantages"],
      mask,
      batch["weights"],
      metric_weights,
    )
    metrics["entropy"] = (metric_weights * jnp.where(mask, entropy, 0.0)).sum()
    metrics |= sampler_metrics(batch, old_logprobs, old_flips)
    metrics = jax.lax.stop_gradient(metrics)
    choices = count_choices(routing)
    return loss, Aux(metrics, routing.expert_load, None, choices)

  return loss_fn


def make_logprobs(
  model: Transformer, *, temperature: float, replay_routes: bool
) -> Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
  """Log-probs of a batch cut into microbatches, for old policy or reference.

  Returns:
    (variables, batch) -> logprobs, 0 outside the completions, and flips of
    `flip_share`; both float32 [M, b, T], from arrays [M, b, ...] of
    `rlm.train.split_microbatches`.  Jit it.
  """

  def logprobs_of(variables, batch):
    def one(microbatch):
      logprobs, _, routing = completion_logprobs(
        model,
        variables,
        microbatch,
        temperature=temperature,
        replay_routes=replay_routes,
      )
      flips = flip_share(routing, microbatch, replay_routes=replay_routes)
      return jnp.where(microbatch["loss_mask"], logprobs, 0.0), flips

    return jax.lax.map(one, {k: v for k, v in batch.items() if k != "num_live"})

  return logprobs_of


def freeze(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` for all parameters but those of the modules in `FROZEN`.

  Their gradient is zero, but weight decay would shrink them all the same; here
  they get no update and no optimizer state.
  """

  def labels(params):
    return {
      name: jax.tree.map(
        lambda _, name=name: "frozen" if name in FROZEN else "trained", subtree
      )
      for name, subtree in params.items()
    }

  return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
