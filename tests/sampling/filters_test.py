import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlm.sampling import filters

logits_rows = hnp.arrays(
  np.float32,
  (3, 11),
  # Multiples of 1/4: ties are common, and no two sums are nearly equal.
  elements=st.integers(-24, 24).map(lambda i: i / 4),
)
keep_top_k = jax.jit(filters.keep_top_k, static_argnums=1)
keep_top_p = jax.jit(filters.keep_top_p, static_argnums=1)


def kept(filtered):
  return np.isfinite(np.asarray(filtered))


def reference_top_k(logits, k):
  threshold = np.sort(logits, axis=-1)[:, ::-1][:, min(k, logits.shape[1]) - 1]
  return logits >= threshold[:, None]


def reference_top_p(logits, p):
  """By sorting: the likeliest tokens until p is reached, and ties."""
  keep = np.zeros(logits.shape, bool)
  for row, values in enumerate(logits.astype(np.float64)):
    probs = np.exp(values - values.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    count = 1 + np.sum(np.cumsum(probs[order]) < p)
    keep[row] = values >= values[order[min(count, len(values)) - 1]]
  return keep


def test_top_k_by_hand():
  logits = jnp.array([[1.0, 3.0, 2.0, -1.0], [0.0, -2.0, -3.0, -1.0]])
  expected = [[False, True, True, False], [True, False, False, True]]
  np.testing.assert_array_equal(kept(keep_top_k(logits, 2)), expected)


def test_top_k_keeps_ties_and_never_a_removed_token():
  logits = jnp.array(
    [[2.0, 1.0, 1.0, 0.0], [5.0, -jnp.inf, -jnp.inf, -jnp.inf]]
  )
  expected = [[True, True, True, False], [True, False, False, False]]
  np.testing.assert_array_equal(kept(keep_top_k(logits, 2)), expected)


@given(logits_rows, st.integers(1, 13))
def test_top_k_is_that_of_a_sort(logits, k):
  got = keep_top_k(jnp.asarray(logits), k)
  expected = reference_top_k(logits, k)
  np.testing.assert_array_equal(kept(got), expected)
  np.testing.assert_array_equal(np.asarray(got)[expected], logits[expected])


def test_top_p_by_hand():
  probs = jnp.array([[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.125, 0.25]])
  logits = jnp.log(probs)
  for p, expected in {
    0.1: [[1, 0, 0, 0], [0, 1, 0, 0]],
    0.45: [[1, 0, 0, 0], [0, 1, 0, 0]],
    0.6: [[1, 1, 0, 0], [0, 1, 0, 1]],  # the token that crosses p is kept
    0.8: [[1, 1, 1, 1], [1, 1, 1, 1]],  # ties of the last one kept too
  }.items():
    np.testing.assert_array_equal(kept(keep_top_p(logits, p)), expected)


@given(logits_rows, st.integers(1, 97).map(lambda i: i / 97.3))
def test_top_p_is_that_of_a_sort(logits, p):
  got = keep_top_p(jnp.asarray(logits), p)
  np.testing.assert_array_equal(kept(got), reference_top_p(logits, p))


def test_top_p_of_almost_one_survives_rounding():
  logits = jax.random.normal(jax.random.key(0), (4, 320)) * 5
  logits = logits.at[:, 300:].set(-jnp.inf)
  got = keep_top_p(logits, 1 - 1e-7)
  assert kept(got).any(axis=1).all()
  assert not kept(got)[:, 300:].any()


def test_filters_apply_in_order():
  # Top-k first: of the two kept, the first has .73 of the mass, not .63.
  logits = jnp.log(jnp.array([[0.63, 0.23, 0.07, 0.07]]))
  both = filters.filter_logits(logits, temperature=1.0, top_k=2, top_p=0.7)
  np.testing.assert_array_equal(kept(both), [[True, False, False, False]])
  only_p = filters.filter_logits(logits, temperature=1.0, top_k=0, top_p=0.7)
  np.testing.assert_array_equal(kept(only_p), [[True, True, False, False]])
  # Temperature first: at T = 1/2 the probabilities are squared.
  cold = filters.filter_logits(logits, temperature=0.5, top_k=0, top_p=0.7)
  np.testing.assert_array_equal(kept(cold), [[True, False, False, False]])


def test_filters_off_leave_the_tempered_logits():
  logits = jax.random.normal(jax.random.key(0), (2, 7))
  got = filters.filter_logits(logits, temperature=0.7, top_k=0, top_p=1.0)
  np.testing.assert_allclose(got, np.asarray(logits) / 0.7, rtol=1e-6)
