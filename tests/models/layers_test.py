"""Products, norms, SwiGLU and embedding, each against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.models import layers
from tests.models import reference
from tests.tiny_model import tiny_config


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_rms_norm(shape):
  x, scale = 3 * normal(*shape), normal(6, seed=1)
  y = layers.rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=0.5)
  want = reference.rms_norm(x.astype(np.float64), scale, 0.5)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_bfloat16_is_rounded_once():
  # Squares of 200 summed in bfloat16 would be wrong in the second digit.
  x = (200 * normal(3, 512)).astype(jnp.bfloat16)
  scale = normal(512, seed=1)
  y = layers.rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=1e-6)
  assert y.dtype == jnp.bfloat16
  want = reference.rms_norm(x.astype(np.float64), scale, 1e-6)
  np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8)


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient():
  def total(x):
    return layers.rms_norm(x, jnp.ones(4), eps=1e-6).sum()

  value, gradient = jax.value_and_grad(total)(jnp.zeros((2, 4)))
  assert value == 0 and np.isfinite(gradient).all()


def test_linear_is_a_product_over_the_last_axis():
  x, w = normal(2, 3, 5), normal(5, 4, seed=1)
  y = layers.linear(jnp.asarray(x), jnp.asarray(w))
  np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-6)


def test_products_take_the_dtype_of_the_activations_and_sum_in_float32():
  x = np.full((1, 4096), 1 / 8, np.float32)
  w = np.full((4096, 1), 1 / 8, np.float32)
  w[0] = 1 / 8 + 2**-12  # lost in bfloat16
  y = layers.linear(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w))
  assert y.dtype == jnp.bfloat16 and y == 64  # bfloat16 sums stop at 4
  assert layers.linear(jnp.asarray(x), jnp.asarray(w)) == 64 + 2**-15


def test_float32_products_ask_accelerators_for_float32():
  def precision(dtype):
    jaxpr = jax.make_jaxpr(layers.linear)(
      jnp.ones((2, 3), dtype), jnp.ones((3, 4))
    )
    (dot,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    return dot.params["precision"]

  assert set(precision(jnp.float32)) == {jax.lax.Precision.HIGHEST}
  assert precision(jnp.bfloat16) is None


def test_swiglu():
  x, p = normal(2, 3, 5), {}
  p["gate_proj"], p["up_proj"] = normal(5, 7, seed=1), normal(5, 7, seed=2)
  p["down_proj"] = normal(7, 5, seed=3)
  names = ("gate_proj", "up_proj", "down_proj")
  y = layers.swiglu(jnp.asarray(x), *(jnp.asarray(p[n]) for n in names))
  np.testing.assert_allclose(y, reference.swiglu(p, x), rtol=1e-5, atol=1e-5)


def test_swiglu_module_has_the_width_it_is_given():
  module = layers.SwiGLU(tiny_config(), width=6)
  x = jnp.ones((1, 16))
  p = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  assert {n: w.shape for n, w in p.items()} == {
    "gate_proj": (16, 6),
    "up_proj": (16, 6),
    "down_proj": (6, 16),
  }


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_norm_and_embedding_keep_parameters_in_param_dtype(param_dtype):
  cfg = tiny_config(param_dtype=param_dtype, dtype="bfloat16")
  norm, embedding = layers.RMSNorm(cfg), layers.Embedding(cfg)
  key, tokens = jax.random.key(0), np.array([[3, 0, 23]], np.int32)
  shapes = [
    jax.eval_shape(norm.init, key, np.ones((1, 16), np.float32)),
    jax.eval_shape(embedding.init, key, tokens),
  ]
  scale, table = jax.tree.leaves(shapes)
  assert (scale.shape, table.shape) == ((16,), (24, 16))
  assert scale.dtype == table.dtype == param_dtype
  table = normal(24, 16).astype(table.dtype)
  vectors = embedding.apply({"params": {"embedding": table}}, tokens)
  assert vectors.dtype == jnp.bfloat16
  np.testing.assert_array_equal(vectors[0], table[tokens[0]].astype("bfloat16"))
