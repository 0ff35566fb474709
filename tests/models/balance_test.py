"""Balance of a layer, counted by hand, and what has no experts or tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlm.models.balance import bias_metrics, load_metrics, router_metrics

LOAD = jnp.array([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 3.0, 1.0], [0.0] * 4])


def test_load_by_hand():
  metrics = jax.jit(lambda x: load_metrics("expert_load", x))(LOAD)
  expected = {
    "expert_load": [[0.25] * 4, [8 / 12, 0, 3 / 12, 1 / 12], [0] * 4],
    "expert_load/max_over_mean": [1, 8 / 3, 0],
    "expert_load/min_over_mean": [1, 0, 0],
    "expert_load/max_violation": [0, 5 / 3, 0],  # (8 - 3) / 3
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    assert metrics[name].dtype == jnp.float32


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=16))
def test_max_violation_is_the_definition_of_the_paper(counts):
  load = np.array([counts], np.float32)
  violation = load_metrics("x", jnp.asarray(load))["x/max_violation"]
  mean = load.mean()
  expected = (load.max() - mean) / mean if mean else 0.0
  np.testing.assert_allclose(violation, [expected], rtol=1e-5, atol=1e-6)


def test_bias_by_hand():
  bias = jnp.array([[0.0, 0.0], [-3.0, 1.0]])
  metrics = jax.jit(lambda x: bias_metrics("expert_bias", x))(bias)
  expected = {
    "expert_bias/mean": [0, -1],
    "expert_bias/std": [0, 2],
    "expert_bias/lowest": [0, -3],
    "expert_bias/highest": [0, 1],
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, err_msg=name)


def test_a_router_has_the_biases_of_its_layers_and_of_mtp():
  bias = jnp.arange(8.0).reshape(2, 4)
  layers = {"ffn": {"expert_bias": bias}}
  mtp = {"block": {"ffn": {"expert_bias": -bias[:1]}}}
  metrics = router_metrics({"moe_layers": layers, "mtp_modules": mtp})
  assert len(metrics) == 8
  np.testing.assert_allclose(metrics["expert_bias/highest"], [3, 7])
  np.testing.assert_allclose(metrics["mtp_expert_bias/lowest"], [-3])
  assert len(router_metrics({"moe_layers": layers})) == 4


def test_without_experts_there_is_nothing():
  assert router_metrics({}) == {}
  for none in (None, jnp.zeros((0, 0)), jnp.zeros((0, 8))):
    assert load_metrics("expert_load", none) == {}
    assert bias_metrics("expert_bias", none) == {}


def test_no_name_asks_for_a_reduction():
  """`rlm.train` reduces by the ends "/max" and "/min" of names."""
  names = load_metrics("expert_load", LOAD) | bias_metrics("expert_bias", LOAD)
  assert not [n for n in names if n.endswith(("/max", "/min"))]
