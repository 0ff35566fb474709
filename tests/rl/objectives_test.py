"""Objectives against float64 numpy written from the papers' equations."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.rl.config import ObjectiveConfig
from rlm.rl.objectives import (
  LOG_RATIO_CAP,
  OBJECTIVES,
  k3,
  make_objective,
  policy_loss,
  token_weights,
)

MAX_LENGTH = 6


def make_batch(seed, rows=6, length=8, spread=0.5):
  """Log-probs, advantages and a ragged mask; row 0 has no token at all."""
  rng = np.random.default_rng(seed)
  logprobs = -rng.exponential(1.0, (rows, length))
  mask = np.zeros((rows, length), bool)
  for i in range(1, rows):
    start = rng.integers(1, 3)
    mask[i, start : start + rng.integers(1, MAX_LENGTH)] = True
  batch = {
    "logprobs": logprobs,
    "old_logprobs": logprobs + spread * rng.normal(size=logprobs.shape),
    "ref_logprobs": logprobs + spread * rng.normal(size=logprobs.shape),
    "advantages": rng.normal(size=rows),
    "mask": mask,
  }
  return jax.tree.map(
    lambda x: x if x.dtype == bool else x.astype(np.float32), batch
  )


def weigh(objective, mask):
  mask = jnp.asarray(mask)
  return {
    "weights": token_weights(
      objective.aggregation, mask, constant_length=MAX_LENGTH
    ),
    "metric_weights": token_weights(
      "token_mean", mask, constant_length=MAX_LENGTH
    ),
  }


def loss_of(objective, batch, weights):
  return policy_loss(
    objective,
    batch["logprobs"],
    batch["old_logprobs"],
    batch["ref_logprobs"] if objective.kl_weight else None,
    batch["advantages"],
    batch["mask"],
    weights["weights"],
    weights["metric_weights"],
  )


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(objective, batch, weights):
  return jax.value_and_grad(
    lambda lp: loss_of(objective, batch | {"logprobs": lp}, weights),
    has_aux=True,
  )(batch["logprobs"])


def reference_objective(name, logprobs, batch):
  """The J of the paper that the row is named after, to be maximised."""
  outputs = [i for i in range(len(logprobs)) if batch["mask"][i].any()]
  terms = []  # one list of per-token terms, or one number, per output
  for i in outputs:
    a = float(batch["advantages"][i])
    pi = logprobs[i][batch["mask"][i]]
    old = batch["old_logprobs"][i][batch["mask"][i]].astype(np.float64)
    ref = batch["ref_logprobs"][i][batch["mask"][i]].astype(np.float64)
    if name == "grpo_r1":  # R1 eq. 1-2: probabilities of whole outputs
      ratio = math.exp(pi.sum()) / math.exp(old.sum())
      ref_over_pi = math.exp(ref.sum()) / math.exp(pi.sum())
      kl = ref_over_pi - math.log(ref_over_pi) - 1
      clipped = min(max(ratio, 1 - 10), 1 + 10)
      terms.append(min(ratio * a, clipped * a) - 0.001 * kl)
      continue
    low, high = (0.8, 1.28) if name == "dapo" else (0.8, 1.2)
    beta = 0.04 if name == "grpo" else 0.0
    row = []
    for t in range(len(pi)):
      ratio = math.exp(pi[t]) / math.exp(old[t])
      ref_over_pi = math.exp(ref[t]) / math.exp(pi[t])
      kl = ref_over_pi - math.log(ref_over_pi) - 1
      clipped = min(max(ratio, low), high)
      row.append(min(ratio * a, clipped * a) - beta * kl)
    terms.append(row)
  if name == "grpo_r1":
    return sum(terms) / len(outputs)
  if name == "grpo":  # 1/G sum_i 1/|o_i| sum_t
    return sum(sum(row) / len(row) for row in terms) / len(outputs)
  if name == "dr_grpo":  # 1/G sum_i sum_t, over a constant length
    return sum(sum(row) for row in terms) / len(outputs) / MAX_LENGTH
  if name == "dapo":  # 1 / sum_i |o_i| sum_i sum_t
    return sum(sum(row) for row in terms) / sum(len(row) for row in terms)
  raise AssertionError(name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_against_the_paper(name, seed):
  objective = OBJECTIVES[name]
  batch = make_batch(seed)
  weights = weigh(objective, batch["mask"])
  (loss, _), grad = loss_and_grad(objective, batch, weights)
  exact = batch["logprobs"].astype(np.float64)
  np.testing.assert_allclose(
    loss, -reference_objective(name, exact, batch), rtol=2e-5, atol=1e-6
  )
  step = 1e-6
  for i, t in np.ndindex(*exact.shape):
    nudge = np.zeros_like(exact)
    nudge[i, t] = step
    slope = (
      reference_objective(name, exact + nudge, batch)
      - reference_objective(name, exact - nudge, batch)
    ) / (2 * step)
    np.testing.assert_allclose(grad[i, t], -slope, rtol=1e-4, atol=2e-6)


def test_published_numbers():
  published = {
    "grpo": ("group_std", "token", 0.2, 0.2, "sequence_mean", "k3", 0.04),
    "grpo_r1": ("group_std", "sequence", 10, 10, "sequence_mean", "k3", 1e-3),
    "dr_grpo": ("group_mean", "token", 0.2, 0.2, "constant_length", "k3", 0),
    "dapo": ("group_std", "token", 0.2, 0.28, "token_mean", "k3", 0),
  }
  assert {k: dataclasses.astuple(v) for k, v in OBJECTIVES.items()} == published


def test_clipping_by_hand():
  # Ratios 2, 0.5, 2, 0.5 with A = 1, 1, -1, -1; clip 0.2 / 0.28.  min() keeps
  # 1.28, 0.5, -2, -0.8: rows 0 and 3 are clipped and lose their gradient.
  ratio = jnp.array([2.0, 0.5, 2.0, 0.5])
  mask = jnp.ones((4, 1), bool)
  quarter = jnp.full((4, 1), 0.25)

  def loss_fn(logprobs):
    return policy_loss(
      OBJECTIVES["dapo"],
      logprobs,
      jnp.zeros((4, 1)),
      None,
      jnp.array([1.0, 1.0, -1.0, -1.0]),
      mask,
      quarter,
      quarter,
    )

  (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(
    jnp.log(ratio)[:, None]
  )
  np.testing.assert_allclose(loss, -(1.28 + 0.5 - 2 - 0.8) / 4, rtol=1e-6)
  np.testing.assert_allclose(
    grad[:, 0], [0, -0.5 / 4, 2 / 4, 0], rtol=1e-6, atol=1e-8
  )
  np.testing.assert_allclose(metrics["clip_fraction/high"], 0.25)
  np.testing.assert_allclose(metrics["clip_fraction/low"], 0.25)
  np.testing.assert_allclose(metrics["ratio/max"], 2.0, rtol=1e-6)
  np.testing.assert_allclose(metrics["ratio/min"], 0.5, rtol=1e-6)
  assert "kl" not in metrics


@pytest.mark.parametrize("name", OBJECTIVES)
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name):
  # The first minibatch of a rollout: old_logprobs are logprobs.
  objective = dataclasses.replace(OBJECTIVES[name], kl_weight=0.0)
  batch = make_batch(7)
  batch["old_logprobs"] = batch["logprobs"]
  weights = weigh(objective, batch["mask"])
  grad = jax.grad(
    lambda lp: loss_of(objective, batch | {"logprobs": lp}, weights)[0]
  )(jnp.asarray(batch["logprobs"]))

  def reinforce(lp):  # -sum w A log pi
    w = weights["weights"]
    if objective.ratio_level == "sequence":  # each token of its whole output
      w = w.sum(axis=1, keepdims=True) * batch["mask"]
    return -(w * batch["advantages"][:, None] * lp).sum()

  expected = jax.grad(reinforce)(jnp.asarray(batch["logprobs"]))
  chex.assert_trees_all_close(grad, expected, rtol=1e-6)
  assert float(jnp.abs(grad).max()) > 0


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(sorted(OBJECTIVES)), st.data())
def test_neither_microbatches_nor_padding_change_loss_or_gradient(
  seed, name, data
):
  objective = OBJECTIVES[name]
  batch = make_batch(seed)
  whole = weigh(objective, batch["mask"])
  (loss, metrics), grad = loss_and_grad(objective, batch, whole)

  # The same outputs in wider rows, among empty rows, in another order, in
  # microbatches: the weights are still those of the global batch.
  rows, length = batch["mask"].shape
  extra_rows = data.draw(st.sampled_from([0, 2]))
  extra_length = data.draw(st.sampled_from([0, 3]))
  order = data.draw(st.permutations(range(rows + extra_rows)))
  pieces = data.draw(st.sampled_from([1, 2]))

  def widen(x):
    pad = [(0, extra_rows)] + [(0, extra_length)] * (x.ndim - 1)
    # Anything may stand in the padding.
    fill = False if x.dtype == bool else np.float32(-123.0)
    return np.pad(x, pad, constant_values=fill)[list(order)]

  wide = {key: widen(value) for key, value in batch.items()}
  weights = weigh(objective, wide["mask"])
  total, parts, grads = 0.0, [], []
  for piece in np.split(np.arange(len(order)), pieces):
    cut = lambda tree: jax.tree.map(lambda x: x[piece], tree)  # noqa: B023, E731
    (value, metric), g = loss_and_grad(objective, cut(wide), cut(weights))
    total += value
    parts.append(metric)
    grads.append(g)
  np.testing.assert_allclose(total, loss, rtol=1e-5, atol=1e-6)
  undo = np.argsort(order)
  got = np.concatenate(grads)[undo][:rows]
  np.testing.assert_allclose(got[:, :length], grad, rtol=1e-4, atol=1e-7)
  np.testing.assert_array_equal(got[:, length:], 0.0)
  for key in metrics:
    reduce = (
      max if key.endswith("/max") else min if key.endswith("/min") else sum
    )
    np.testing.assert_allclose(
      reduce(float(m[key]) for m in parts), metrics[key], rtol=1e-5, atol=1e-6
    )


def test_weights_by_hand():
  mask = jnp.array([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)

  def weight(name):
    return np.asarray(token_weights(name, mask, constant_length=5))

  np.testing.assert_allclose(
    weight("sequence_mean"),
    [[0, 1 / 6, 1 / 6, 1 / 6], [0, 1 / 2, 0, 0], [0, 0, 0, 0]],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    weight("token_mean"), np.asarray(mask) / 4, rtol=1e-6
  )
  np.testing.assert_allclose(
    weight("constant_length"), np.asarray(mask) / (2 * 5), rtol=1e-6
  )
  nothing = token_weights(
    "token_mean", jnp.zeros((2, 3), bool), constant_length=5
  )
  np.testing.assert_array_equal(nothing, 0.0)
  with pytest.raises(ValueError, match="unknown aggregation='mean'"):
    token_weights("mean", mask, constant_length=5)


@given(st.floats(-1e4, 1e4, width=32))
def test_k3_is_never_negative_and_finite(log_ratio):
  value, slope = jax.value_and_grad(k3)(jnp.float32(log_ratio))
  assert float(value) >= 0
  assert np.isfinite(value) and np.isfinite(slope)
  if 1e-3 < abs(log_ratio) < LOG_RATIO_CAP:
    exact = math.exp(log_ratio) - log_ratio - 1
    np.testing.assert_allclose(value, exact, rtol=1e-3)


def test_k3_of_equal_policies_is_zero_with_zero_slope():
  value, slope = jax.value_and_grad(k3)(jnp.float32(0.0))
  assert float(value) == 0.0 and float(slope) == 0.0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("shift", [2.0, -2.0])
def test_log_ratios_of_a_thousand_nats_stay_finite(advantage, shift):
  # 500 tokens, each 2 nats likelier (or less likely) than before: exp of the
  # sum overflows float32, in the ratio or in the KL.
  mask = jnp.ones((1, 500), bool)
  weights = jnp.full((1, 500), 1 / 500)

  def loss_fn(logprobs):
    return policy_loss(
      OBJECTIVES["grpo_r1"],
      logprobs,
      jnp.full((1, 500), -3.0),
      jnp.full((1, 500), -3.0),
      jnp.array([advantage]),
      mask,
      weights,
      weights,
    )[0]

  loss, grad = jax.value_and_grad(loss_fn)(jnp.full((1, 500), -3.0 + shift))
  assert np.isfinite(loss) and np.isfinite(grad).all()
  # What gradient is left must not push further away from the reference.
  assert shift * float(grad.sum()) >= 0 or advantage > 0


def test_config_takes_the_row_and_its_changes():
  row = ObjectiveConfig("dapo", 1e-4, None, None, None)
  assert make_objective(row) == OBJECTIVES["dapo"]
  changed = ObjectiveConfig("dapo", 1e-4, None, 0.4, 0.01)
  assert make_objective(changed) == dataclasses.replace(
    OBJECTIVES["dapo"], clip_high=0.4, kl_weight=0.01
  )


def test_a_kl_without_reference_is_refused():
  batch = make_batch(0) | {"ref_logprobs": None}
  objective = OBJECTIVES["grpo"]
  weights = weigh(objective, batch["mask"])
  with pytest.raises(ValueError, match=r"kl_weight=0.04 needs reference"):
    loss_of(objective, batch, weights)
