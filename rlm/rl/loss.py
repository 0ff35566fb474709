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

from rlm.losses import Aux, LossFn, token_logprobs
from rlm.models.moe import Routing
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
  )
  rows = tokens.shape[0]

  def align(x):
    return jnp.pad(x.reshape(rows, -1), [(0, 0), (1, 0)])

  return align(logprobs), align(entropy), routing


def make_rl_loss(
  model: Transformer,
  objective: Objective,
  *,
  temperature: float,
  replay_routes: bool,
) -> LossFn:
  """The loss of `objective` as a LossFn for `rlm.train.make_train_step`.

  `old_logprobs` of the batch are the trainer's own, computed before the first
  update of the rollout.  Leave them out when the rollout has one minibatch:
  the policy has not moved yet, so they equal stop_gradient(logprobs), and a
  forward pass is saved; ratios are then exactly 1 and nothing is clipped.
  `ref_logprobs` may be left out where kl_weight is 0.

  Nothing of the MTP modules is touched; see `freeze` for their optimizer.

  Args:
    model: the Transformer.
    objective: a row of the table.
    temperature: as sampled.
    replay_routes: False lets the trainer route anew (an ablation).

  Returns:
    LossFn over minibatches of `rlm.rl.selection.make_minibatch`.  Metrics are
    those of `policy_loss`, and entropy (token mean, nats), sampler_diff/mean
    and sampler_diff/max: |old_logprobs - sampler_logprobs| in nats.
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
      old_logprobs = batch["old_logprobs"]
    else:
      old_logprobs = jax.lax.stop_gradient(logprobs)
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
    diff = jnp.where(mask, jnp.abs(old_logprobs - batch["sampler_logprobs"]), 0)
    metrics |= {
      "entropy": (metric_weights * jnp.where(mask, entropy, 0.0)).sum(),
      "sampler_diff/mean": (metric_weights * diff).sum(),
      "sampler_diff/max": diff.max(),
    }
    metrics = jax.lax.stop_gradient(metrics)
    return loss, Aux(metrics, routing.expert_load, None)

  return loss_fn


def make_logprobs(
  model: Transformer, *, temperature: float, replay_routes: bool
) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
  """Log-probs of a batch cut into microbatches, for old policy or reference.

  Returns:
    (variables, batch) -> float32 [M, b, T], from arrays [M, b, ...] of
    `rlm.train.split_microbatches`; 0 outside the completions.  Jit it.
  """

  def logprobs_of(variables, batch):
    def one(microbatch):
      logprobs, _, _ = completion_logprobs(
        model,
        variables,
        microbatch,
        temperature=temperature,
        replay_routes=replay_routes,
      )
      return jnp.where(microbatch["loss_mask"], logprobs, 0.0)

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
