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
from tests.tiny_model import lay, tiny_model

TX = optax.sgd(1.0)
# What the learner computes itself.
COMPUTED = ("old_logprobs", "old_flips", "ref_logprobs")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """All that runs here is tiny."""
  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def minibatch(name, seed, **sizes):
  batch = make_batch(OBJECTIVES[name], seed=seed, **sizes)
  return {k: v for k, v in batch.items() if k not in COMPUTED}


@functools.cache
def learner(name, num_minibatches, microbatch_rows, rows=6, **mesh):
  model, _ = tiny_model()
  return Learner(
    lay(model, **mesh),
    OBJECTIVES[name],
    SelectionConfig(
      "all", rows * num_minibatches, num_minibatches, microbatch_rows
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


@pytest.mark.full
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


def assert_same_update(one, other, batches):
  """Within 1e-5 of parameters, about 1e-4 of the largest change."""
  found = []
  for each in (one, other):
    policy, metrics = each.update(
      start(), start().variables, batches, jax.random.key(0)
    )
    found.append((policy, metrics))
  (alone, expected), (divided, got) = jax.device_get(found)
  assert_same_metrics(got, expected)
  moved = 0.0
  for a, b, before in zip(
    *map(jax.tree.leaves, (alone, divided, start())), strict=True
  ):
    np.testing.assert_allclose(b, a, atol=1e-5)
    moved = max(moved, float(np.abs(a - before).max()) if a.ndim else 0)
  assert moved > 0.05


def assert_same_metrics(got, expected):
  assert got.keys() == expected.keys() and got
  for name, value in expected.items():
    np.testing.assert_allclose(
      got[name], value, rtol=1e-4, atol=1e-6, err_msg=name
    )


MESH = dict(data=2, fsdp=2, expert=2)


@pytest.mark.full  # a run of experiments.rl on a mesh: rl_test
def test_an_update_on_a_mesh_is_that_of_one_device():
  """With log-probs of a reference, which are computed on the mesh too."""
  assert_same_update(
    learner("grpo", 1, 8, rows=8),
    learner("grpo", 1, 8, rows=8, **MESH),
    [minibatch("grpo", 0, extra_rows=2)],
  )


@pytest.mark.full
@pytest.mark.parametrize("mesh", [MESH, dict(fsdp=2, tensor=2)], ids=str)
def test_minibatches_and_measurements_on_a_mesh(mesh):
  batches = [minibatch("grpo", seed, extra_rows=2) for seed in (0, 1)]
  one = learner("grpo", 2, 8, rows=8)
  other = learner("grpo", 2, 8, rows=8, **mesh)
  assert_same_update(one, other, batches)
  moved = start().variables
  moved["params"]["head"] *= 1.1
  measured, divided = (
    {
      **each.diagnose(start().variables, moved, batches[0]),
      **each.compare(start().variables, batches[0]),
    }
    for each in (one, other)
  )
  assert "mtp_acceptance" in measured
  assert_same_metrics(divided, measured)


def test_rows_divided_among_devices_are_refused():
  with pytest.raises(
    ValueError, match=r"mesh\.context=2: RL scores each .* mesh\.fsdp to 2"
  ):
    learner("grpo", 1, 8, rows=8, context=2)
