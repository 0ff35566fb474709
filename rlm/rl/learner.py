"""From the minibatches of a rollout to a new policy, and what that reports."""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from rlm.models.layout import Layout
from rlm.optim.schedule import Schedule
from rlm.parallel.config import ROWS
from rlm.parallel.sharding import batch_specs
from rlm.rl.config import SelectionConfig
from rlm.rl.diagnostics import make_diagnostics
from rlm.rl.loss import make_logprobs, make_rl_loss, sampler_metrics
from rlm.rl.metrics import combine_updates
from rlm.rl.objectives import Objective, k3
from rlm.train import TrainState, make_train_step, split_microbatches

Minibatch = dict[str, np.ndarray]


class Learner:
  """The compiled parts of an update, each of one shape.

  Args:
    layout: the model on the mesh of the updates; no `context`, since a token's
      log-prob stands beside the token after it.
    objective: a row of the table.
    selection: sizes of minibatches and microbatches.
    tx: optimizer at unit learning rate; see `rlm.rl.loss.freeze`.
    schedule: update -> learning rate.
    temperature: as sampled.
    replay_routes: train along the sampler's expert routes.
    bias_update_rate: of the expert bias.
    skip_nonfinite: see `rlm.train.make_train_step`.
  """

  def __init__(
    self,
    layout: Layout,
    objective: Objective,
    selection: SelectionConfig,
    *,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    temperature: float,
    replay_routes: bool,
    bias_update_rate: float,
    skip_nonfinite: bool,
  ):
    selection.check_mesh(layout.cfg)
    model = layout.model
    self._objective, self._selection = objective, selection
    self._schedule = schedule
    self._bias_update_rate = np.float32(bias_update_rate)
    self._train_step = jax.jit(
      make_train_step(
        make_rl_loss(
          model,
          objective,
          temperature=temperature,
          replay_routes=replay_routes,
        ),
        tx,
        num_microbatches=selection.num_microbatches,
        ema_decay=None,
        skip_nonfinite=skip_nonfinite,
        layout=layout,
      ),
      donate_argnums=0,
    )

    def divided(f, out_spec):
      def on_devices(variables, batch):
        specs = (layout.specs(variables), batch_specs(batch, leading=1))
        return layout.map(f, specs, out_spec)(variables, batch)

      return jax.jit(on_devices)

    by_row = P(None, ROWS)
    self._logprobs = divided(
      make_logprobs(
        model, temperature=temperature, replay_routes=replay_routes
      ),
      by_row,
    )
    self._sampler_metrics = jax.jit(sampler_metrics)
    self._diagnose = divided(
      make_diagnostics(model, temperature=temperature), P()
    )

  def _split(self, batch: Minibatch) -> Minibatch:
    return split_microbatches(
      batch,
      microbatch_rows=self._selection.microbatch_rows,
      num_microbatches=self._selection.num_microbatches,
    )

  def update(
    self,
    policy: TrainState,
    reference: Any,
    minibatches: list[Minibatch],
    key: jax.Array,
  ) -> tuple[TrainState, dict[str, Any]]:
    """One update per minibatch, once each (one epoch), in order.

    Log-probs of the policy that sampled and of the reference are computed for
    all minibatches before the first update.

    Args:
      policy: donated.
      reference: variables; read where the objective has a KL.
      minibatches: of `rlm.rl.selection.make_minibatch`; [] changes nothing.
      key: of this step.

    Returns:
      The new policy, and metrics over all updates on the host; {} for none.
    """
    batches: list[dict[str, Any]] = [self._split(b) for b in minibatches]
    first = int(policy.step)  # its rollout is on the host: nothing to wait for
    for batch in batches:
      if self._selection.num_minibatches > 1:
        old = self._logprobs(policy.variables, batch)
        batch["old_logprobs"], batch["old_flips"] = old
      if self._objective.kl_weight > 0:
        batch["ref_logprobs"], _ = self._logprobs(reference, batch)
    updates = []
    for i, batch in enumerate(batches):
      batch["learning_rate"] = self._schedule(first + i)
      batch["bias_update_rate"] = self._bias_update_rate
      policy, metrics = self._train_step(
        policy, batch, jax.random.fold_in(key, i)
      )
      updates.append(metrics)
    return policy, combine_updates(jax.device_get(updates))

  def compare(
    self, variables: Any, minibatch: Minibatch
  ) -> dict[str, jax.Array]:
    """`sampler_metrics` of rows that no update learns from.

    Args:
      variables: of the policy that sampled the minibatch.
      minibatch: any rows of the rollout.
    """
    batch = self._split(minibatch)
    return self._sampler_metrics(batch, *self._logprobs(variables, batch))

  def diagnose(
    self, variables: Any, reference: Any, minibatch: Minibatch
  ) -> dict[str, jax.Array]:
    """What costs forward passes of its own; see `make_diagnostics`.

    Args:
      variables: of the policy that sampled the minibatch.
      reference: variables, or None; where the loss has no KL that would
        report it, adds `kl`, the token mean of k3.
      minibatch: any rows of the rollout.
    """
    batch = self._split(minibatch)
    metrics = self._diagnose(variables, batch)
    if reference is not None and self._objective.kl_weight == 0:
      policy_logprobs, _ = self._logprobs(variables, batch)
      log_ratio = self._logprobs(reference, batch)[0] - policy_logprobs
      metrics["kl"] = (batch["metric_weights"] * k3(log_ratio)).sum()
    return metrics
