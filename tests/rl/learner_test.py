import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlm.rl.config import SelectionConfig
from rlm.rl.learner import Learner
from rlm.rl.objectives import OBJECTIVES
from rlm.train import TrainState, init_state
from tests.rl.loss_test import make_batch
from tests.tiny_model import tiny_model

TX = optax.sgd(1.0)
# What the learner computes itself.
COMPUTED = ("old_logprobs", "old_flips", "ref_logprobs")


def minibatch(name, seed):
  batch = make_batch(OBJECTIVES[name], seed=seed)
  return {k: v for k, v in batch.items() if k not in COMPUTED}


@functools.cache
def learner(name, num_minibatches, microbatch_rows):
  model, _ = tiny_model()
  return Learner(
    model,
    OBJECTIVES[name],
    SelectionConfig(
      "all", 6 * num_minibatches, num_minibatches, microbatch_rows
    ),
    tx=TX,
    schedule=lambda step: 0.3,
    temperature=1.0,
    replay_routes=True,
    bias_update_rate=0.0,
    skip_nonfinite=False,
  )


def start() -> TrainState:
  """A policy that may be donated."""
  _, variables = tiny_model()
  return init_state(jax.tree.map(jnp.copy, variables), TX, ema_decay=None)


@pytest.mark.full  # the loss alone: loss_test
def test_microbatches_change_nothing_but_rounding():
  whole, in_parts = (
    learner("dapo", 1, rows).update(
      start(), None, [minibatch("dapo", 0)], jax.random.key(0)
    )
    for rows in (6, 2)
  )
  for name, value in whole[1].items():
    np.testing.assert_allclose(
      in_parts[1][name], value, rtol=1e-3, atol=1e-5, err_msg=name
    )
  moved = 0.0
  for a, b, c in zip(
    jax.tree.leaves(whole[0].variables),
    jax.tree.leaves(in_parts[0].variables),
    jax.tree.leaves(start().variables),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)
    moved = max(moved, float(jnp.abs(a - c).max()))
  assert moved > 1e-3


def test_old_and_reference_logprobs_are_of_before_the_first_update():
  # The second minibatch repeats the first: only there has the policy moved
  # from the one that sampled, and from the reference, which it was.
  batch = minibatch("grpo", 0)
  policy, metrics = learner("grpo", 2, 6).update(
    start(), start().variables, [batch, batch], jax.random.key(0)
  )
  assert int(policy.step) == 2
  once, first = learner("grpo", 2, 6).update(
    start(), start().variables, [batch], jax.random.key(0)
  )
  assert int(once.step) == 1
  np.testing.assert_allclose(first["ratio/max"], 1.0, atol=1e-5)
  np.testing.assert_allclose(first["kl"], 0.0, atol=1e-6)
  assert metrics["ratio/max"] > 1.01 and metrics["ratio/min"] < 0.99
  assert metrics["kl"] > 1e-4
  # Against the sampler, the old policy counts in both.
  for name in ("sampler_diff/mean", "route_flip_rate"):
    assert first[name] > 0
    np.testing.assert_allclose(metrics[name], first[name], rtol=1e-5)


def test_without_minibatches_nothing_happens():
  before = start()
  after, metrics = learner("dapo", 1, 6).update(
    before, None, [], jax.random.key(0)
  )
  assert after is before and metrics == {}


def test_rows_without_an_update_compare_as_they_do_within_one():
  batch = minibatch("dapo", 0)
  compared = learner("dapo", 1, 6).compare(start().variables, batch)
  _, reported = learner("dapo", 1, 6).update(
    start(), None, [batch], jax.random.key(0)
  )
  assert set(compared) == {
    *("sampler_diff/mean", "sampler_diff/max", "route_flip_rate")
  }
  for name, value in compared.items():
    np.testing.assert_allclose(value, reported[name], rtol=1e-5)


def test_diagnose_adds_the_kl_that_the_loss_lacks():
  same, moved = start().variables, start().variables
  moved["params"]["head"] *= 1.1
  batch = minibatch("dapo", 0)
  diagnose = learner("dapo", 1, 6).diagnose
  assert float(diagnose(same, same, batch)["kl"]) == 0.0
  assert float(diagnose(same, moved, batch)["kl"]) > 1e-4
  assert "kl" not in diagnose(same, None, batch)
