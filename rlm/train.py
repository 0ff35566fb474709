"""One training step, whatever the loss: microbatches, update, EMA, expert bias.

Pretraining, SFT, RL and distillation differ in their loss and their batches
only.  A step is a pure function `(state, batch, key) -> (state, metrics)`; the
caller jits it with `donate_argnums=0`.  What a schedule changes comes in with
the batch, so that stages of other schedules share one compiled program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from rlm.losses import Aux, Batch, LossFn
from rlm.models.balance import load_metrics, router_metrics
from rlm.models.layout import Layout
from rlm.models.quantized import refuse_quantized
from rlm.models.transformer import update_router
from rlm.parallel.sharding import batch_specs

TrainStep = Callable[
  ["TrainState", Batch, jax.Array], tuple["TrainState", dict[str, jax.Array]]
]


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: int32 [], steps taken.
    variables: Flax collections, `params` and (with experts) `router`.
    opt_state: optax state of `variables["params"]`.
    ema: float32 moving average of params, or None.
  """

  step: jax.Array
  variables: Any
  opt_state: Any
  ema: Any


def init_state(
  variables: Any,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float | None,
) -> TrainState:
  """The state before the first step; the EMA starts at the parameters.

  Args:
    variables: Flax collections of the model.
    tx: the optimizer that the step will use.
    ema_decay: None for no EMA; else the decay that the step will use.

  Raises:
    ValueError: the parameters are int8.
  """
  params = variables["params"]
  refuse_quantized(params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    variables=variables,
    opt_state=tx.init(params),
    # A copy even where the type is the same: the step donates both.
    ema=None
    if ema_decay is None
    else jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params),
  )


def split_microbatches(
  batch: dict[str, np.ndarray], *, microbatch_rows: int, num_microbatches: int
) -> dict[str, np.ndarray]:
  """Cuts a batch into microbatches, at a fixed shape for any number of rows.

  Args:
    batch: arrays that all lead with rows, [B, ...].
    microbatch_rows: b, rows of one microbatch.
    num_microbatches: M, the most that any step of the run has.

  Returns:
    Arrays [M, b, ...], zero (that is, padding) after the first B / b
    microbatches, and `num_live` int32 [] = B / b.  Scalars that are added to
    it, like this one and those of `make_train_step`, reach every microbatch as
    they are.

  Raises:
    ValueError: B is not a multiple of b, or needs more than M microbatches.
  """
  rows = len(batch["tokens"])
  num_live = rows // microbatch_rows
  if rows % microbatch_rows or not 1 <= num_live <= num_microbatches:
    raise ValueError(
      f"a batch of {rows} rows does not split into 1 to {num_microbatches}"
      f" microbatches of {microbatch_rows} rows. Make batch_size a multiple of"
      " microbatch_rows."
    )

  def split(x):
    dead = num_microbatches * microbatch_rows - rows
    padded = np.pad(x, [(0, dead)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(num_microbatches, microbatch_rows, *x.shape[1:])

  split_batch = {name: split(np.asarray(x)) for name, x in batch.items()}
  return {**split_batch, "num_live": np.int32(num_live)}


class _Reduction(NamedTuple):
  """How parts of a metric join: of two microbatches, of none, of devices."""

  join: Callable
  empty: float
  across: Callable


_SUM = _Reduction(jnp.add, 0, jax.lax.psum)
_REDUCTIONS = {
  "/max": _Reduction(jnp.maximum, -jnp.inf, jax.lax.pmax),
  "/min": _Reduction(jnp.minimum, jnp.inf, jax.lax.pmin),
}


def _reduction(name: str) -> _Reduction:
  """By the end of a metric's name."""
  return _REDUCTIONS.get(name[-4:], _SUM)


def reduce_metrics(
  a: dict[str, jax.Array], b: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Joins the metrics of two microbatches, by the end of their names."""
  return {name: _reduction(name).join(a[name], b[name]) for name in a}


def _accumulate(loss_and_grad, batch, key, num_microbatches):
  """Loss, Aux and float32 gradients over the live microbatches."""
  num_live = batch["num_live"]

  def one(i):
    microbatch = {k: x[i] if jnp.ndim(x) else x for k, x in batch.items()}
    (loss, aux), grads = loss_and_grad(microbatch, jax.random.fold_in(key, i))
    return loss, aux, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

  if num_microbatches == 1:  # no loop, and no zeros to add to
    return one(0)

  def start(path, shape):
    name = "".join(str(entry.key) for entry in path if hasattr(entry, "key"))
    return jnp.full(shape.shape, _reduction(name).empty, shape.dtype)

  def add(i, total):
    loss, aux, grads = total
    more_loss, more_aux, more_grads = one(i)
    return (
      loss + more_loss,
      Aux(
        reduce_metrics(aux.metrics, more_aux.metrics),
        *jax.tree.map(jnp.add, aux[1:], more_aux[1:]),
      ),
      jax.tree.map(jnp.add, grads, more_grads),
    )

  # From zeros rather than from the first, which would compile the model twice.
  zeros = jax.tree.map_with_path(start, jax.eval_shape(one, jnp.int32(0)))
  # A traced trip count: a growing batch is one compiled program.
  return jax.lax.fori_loop(0, num_live, add, zeros)


def _join_devices(shard, totals):
  """What `_accumulate` gave on each device, as of all their tokens."""
  loss, aux, grads = totals
  metrics = {
    name: shard.over_tokens(x, _reduction(name).across)
    for name, x in aux.metrics.items()
  }
  loss, loads = jax.tree.map(shard.sum_tokens, (loss, aux[1:]))
  return loss, Aux(metrics, *loads), shard.sum_gradients(grads)


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  num_microbatches: int,
  ema_decay: float | None,
  skip_nonfinite: bool,
  layout: Layout | None = None,
) -> TrainStep:
  """A pure training step over the microbatches of `split_microbatches`.

  Every batch also holds two float32 []: `learning_rate`, which multiplies the
  updates of `tx`, and `bias_update_rate`, gamma of V3 section 2.1.2, where 0
  freezes the expert bias.  Both follow from the number of the step, never from
  the optimizer's count, so that skipped updates leave them where the config
  puts them.

  Args:
    loss_fn: (variables, microbatch, key) -> (loss, Aux); a sum whose weights
      already hold the denominators of the whole batch.
    tx: optimizer at *unit* learning rate, as `make_optimizer` gives it.
    num_microbatches: M, the leading axis of the batches; `num_live` of them
      are used.  One compiled program serves every num_live.
    ema_decay: of the float32 average of the parameters; None for none.
    layout: the mesh whose devices share the work, on which `loss_fn` runs as
      the loss of a device's own tokens (`layout.model`).  Gradients are added
      up where a matrix is divided in every microbatch, between its copies once
      a step.  None for one device.
    skip_nonfinite: where loss or gradient is not finite, nothing changes
      either way; True still counts the step, False returns the state exactly
      as it came, for a caller that stops there.

  Returns:
    step(state, batch, key) -> (state, metrics).  Metrics hold what the loss
    reports, and loss, grad_norm (before clipping), learning_rate, nonfinite
    (0 or 1), dropped (share of the choices of an expert that a capacity left
    without one, 0 where none is asked for); with experts also expert_load
    [L, E], each expert's share of its layer, and expert_load/max_over_mean [L],
    and the same under mtp_.
  """

  def own_totals(params, rest, batch, key):
    def loss_and_grad(microbatch, microbatch_key):
      def of_params(p):
        return loss_fn({**rest, "params": p}, microbatch, microbatch_key)

      return jax.value_and_grad(of_params, has_aux=True)(params)

    return _accumulate(loss_and_grad, batch, key, num_microbatches)

  def totals(params, rest, batch, key):
    if layout is None:
      return own_totals(params, rest, batch, key)
    pieces = layout.specs(params)
    return layout.map(
      lambda *args: _join_devices(layout.shard, own_totals(*args)),
      in_specs=(pieces, layout.specs(rest), batch_specs(batch, leading=1), P()),
      out_specs=(P(), P(), pieces),
    )(params, rest, batch, key)

  def step_fn(state, batch, key):
    params = state.variables["params"]
    rest = {k: v for k, v in state.variables.items() if k != "params"}
    loss, aux, grads = totals(params, rest, batch, key)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    learning_rate = batch["learning_rate"]
    updates, opt_state = tx.update(grads, state.opt_state, params)
    updates = jax.tree.map(lambda u: learning_rate * u, updates)
    new_params = optax.apply_updates(params, updates)
    ema = state.ema
    if ema_decay is not None:
      ema = jax.tree.map(
        lambda e, p: ema_decay * e + (1 - ema_decay) * p.astype(jnp.float32),
        ema,
        new_params,
      )
    variables = {**rest, "params": new_params}
    if "router" in rest:
      variables["router"] = update_router(
        rest["router"],
        aux.expert_load,
        aux.mtp_expert_load,
        batch["bias_update_rate"],
      )
    new_state = TrainState(
      step=state.step + 1,
      variables=variables,
      opt_state=opt_state,
      ema=ema,
    )
    new_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), new_state, state
    )
    if layout is not None:  # as it came, so that the next step is this program
      new_state = jax.lax.with_sharding_constraint(
        new_state, layout.shardings(new_state)
      )
    if skip_nonfinite:
      new_state = new_state.replace(step=state.step + 1)

    metrics = {
      **aux.metrics,
      "loss": loss,
      "grad_norm": grad_norm,
      "learning_rate": learning_rate,
      "nonfinite": 1 - finite.astype(jnp.int32),
      "dropped": aux.choices[0] / jnp.maximum(aux.choices[1], 1),
      **load_metrics("expert_load", aux.expert_load),
      **load_metrics("mtp_expert_load", aux.mtp_expert_load),
      **router_metrics(new_state.variables.get("router", {})),
    }
    if layout is not None:
      metrics = jax.lax.with_sharding_constraint(metrics, layout.everywhere)
    return new_state, metrics

  return step_fn
