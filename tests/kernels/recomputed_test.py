"""A loop over parts: values, gradients, and what their sums lose."""

import jax
import jax.numpy as jnp
import numpy as np

from rlm.kernels.recomputed import map_recomputed


def matrices(parts, dtype=jnp.float32):
  """A weight [6, 3], rows [parts, 4, 6] and ids, from one seed."""
  rng = np.random.default_rng(0)
  weight = jnp.asarray(rng.normal(size=(6, 3)), dtype)
  rows = jnp.asarray(rng.normal(size=(parts, 4, 6)), dtype)
  return weight, rows, jnp.arange(parts, dtype=jnp.int32)


def shifted(weight, part):
  rows, index = part
  return jnp.tanh(rows @ weight) + index.astype(rows.dtype)


def test_it_is_a_loop_in_value_and_gradient():
  weight, rows, ids = matrices(5)

  def looped(weight, rows):
    return map_recomputed(shifted, weight, (rows, ids))

  def straight(weight, rows):
    return jnp.stack(
      [shifted(weight, part) for part in zip(rows, ids, strict=True)]
    )

  def run(f):
    value, vjp = jax.vjp(f, weight, rows)
    return value, vjp(jnp.cos(value))

  # Sums of five products, in another order.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6),
    jax.jit(lambda: run(looped))(),
    jax.jit(lambda: run(straight))(),
  )


def test_the_gradient_of_what_is_shared_is_rounded_once():
  """Parts that add 1 each: bfloat16 would stop counting at 256."""
  parts = 1024
  weight = jnp.ones((1, 1), jnp.bfloat16)
  rows = jnp.ones((parts, 1, 1), jnp.bfloat16)

  def total(weight):
    out = map_recomputed(lambda w, x: x @ w, weight, rows)
    return out.astype(jnp.float32).sum()

  gradient = jax.jit(jax.grad(total))(weight)
  assert gradient.dtype == jnp.bfloat16
  assert float(gradient[0, 0]) == parts


def test_parts_keep_nothing_but_what_they_are_given():
  weight, rows, ids = matrices(7)

  def looped(weight, rows):
    return map_recomputed(shifted, weight, (rows, ids))

  def keeping(weight, rows):
    return jax.lax.map(lambda part: shifted(weight, part), (rows, ids))

  def kept(f):
    _, vjp = jax.vjp(f, weight, rows)
    return [leaf.shape for leaf in jax.tree.leaves(vjp)]

  assert (7, 4, 3) in kept(keeping)  # tanh's
  assert (7, 4, 3) not in kept(looped)


def test_integers_are_shared_as_they_are():
  ids = jnp.arange(4, dtype=jnp.int32)
  out = map_recomputed(lambda table, i: table[i] + 1, ids, ids[::-1])
  np.testing.assert_array_equal(out, [4, 3, 2, 1])
