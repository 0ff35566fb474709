import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.sampling import draw, filters

draw_tokens = jax.jit(draw.draw_tokens)
# 0.999 quantiles of chi-square by degrees of freedom, for fixed keys.
CHI_SQUARE_999 = {3: 16.27, 4: 18.47, 5: 20.52, 9: 27.88}


def key_rows(count, seed=0):
  return jax.random.key_data(jax.random.split(jax.random.key(seed), count))


def uniforms_of(count, seed=0):
  index = jnp.zeros((count,), jnp.int32)
  return draw.request_uniforms(key_rows(count, seed), index)


def chi_square(tokens, probs):
  counts = np.bincount(np.asarray(tokens), minlength=len(probs))
  assert not counts[probs == 0].any()
  keep = probs > 0
  expected = probs[keep] * counts.sum()
  return float(np.sum((counts[keep] - expected) ** 2 / expected))


def test_a_draw_inverts_the_cumulative_distribution_by_hand():
  probs = jnp.array([0.125, 0.5, 0.0, 0.25, 0.125])
  uniforms = jnp.array([0.0, 0.12, 0.13, 0.62, 0.63, 0.87, 0.88, 0.9999999])
  logits = jnp.broadcast_to(jnp.log(probs), (8, 5))
  tokens, logprobs = draw_tokens(logits, uniforms)
  np.testing.assert_array_equal(tokens, [0, 0, 1, 1, 3, 3, 4, 4])
  expected = np.log(np.asarray(probs)[np.asarray(tokens)])
  np.testing.assert_allclose(logprobs, expected, atol=1e-6)


def test_the_number_of_a_token_is_that_of_its_key_and_index():
  keys = key_rows(4)
  index = jnp.array([0, 5, 5, 9], jnp.int32)
  got = draw.request_uniforms(keys, index)
  for row in range(4):
    key = jax.random.wrap_key_data(keys[row])
    expected = jax.random.uniform(jax.random.fold_in(key, int(index[row])))
    assert got[row] == expected
  swapped = draw.request_uniforms(keys[::-1], index[::-1])
  np.testing.assert_array_equal(swapped[::-1], got)


@given(
  hnp.arrays(
    np.float32,
    (3, 37),
    elements=st.one_of(st.just(-np.inf), st.floats(-60, 9, width=32)),
  ),
  hnp.arrays(
    np.float32, 3, elements=st.sampled_from([0.0, 0.3, 0.77, 1 - 2**-24])
  ),
)
def test_a_token_without_probability_is_never_drawn(logits, uniforms):
  logits[:, 0] = np.maximum(logits[:, 0], -50.0)  # at least one to draw
  tokens, logprobs = draw_tokens(logits, uniforms)
  rows = np.arange(3)
  assert np.isfinite(logits[rows, tokens]).all()
  top = logits.max(axis=1).astype(np.float64)
  norm = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
  np.testing.assert_allclose(
    logprobs, logits[rows, tokens] - norm, atol=1e-5, rtol=1e-6
  )


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p", "degrees"),
  [(1.0, 0, 1.0, 9), (0.5, 0, 1.0, 9), (1.0, 4, 1.0, 3), (1.3, 0, 0.8, 5)],
)
def test_draws_follow_the_filtered_distribution(
  temperature, top_k, top_p, degrees
):
  n = 20_000
  row = jnp.array([[0.3, -1.0, 1.0, 0.9, -0.2, 0.0, 0.8, -0.5, 0.1, -1.5]])
  filtered = filters.filter_logits(
    row, temperature=temperature, top_k=top_k, top_p=top_p
  )
  # Reference probabilities, in numpy and from the definition.
  probs = np.exp(np.asarray(row[0], np.float64) / temperature)
  probs /= probs.sum()
  order = np.argsort(-probs)
  if top_k:
    probs[order[top_k:]] = 0
  if top_p < 1:
    probs[order[1 + np.sum(np.cumsum(probs[order]) < top_p) :]] = 0
  probs /= probs.sum()
  assert np.sum(probs > 0) == degrees + 1
  tokens, _ = draw_tokens(jnp.broadcast_to(filtered, (n, 10)), uniforms_of(n))
  assert chi_square(tokens, probs) < CHI_SQUARE_999[degrees]
  wrong = np.roll(probs, 1)  # and the test can fail
  wrong = np.where(probs > 0, np.maximum(wrong, 0.01), 0)
  assert chi_square(tokens, wrong / wrong.sum()) > CHI_SQUARE_999[degrees]


def test_draws_follow_a_vocabulary_of_many_blocks():
  n, vocab = 20_000, 320
  logits = 2 * jax.random.normal(jax.random.key(1), (vocab,))
  logits = logits.at[300:].set(-jnp.inf)
  tokens, _ = draw_tokens(
    jnp.broadcast_to(logits, (n, vocab)), uniforms_of(n, seed=2)
  )
  probs = np.asarray(jax.nn.softmax(logits), np.float64)
  # Ten classes of about equal probability, spread over the whole vocabulary.
  order = np.argsort(probs)
  group = np.zeros(vocab, int)
  group[order] = np.minimum(np.cumsum(probs[order]) * 10, 9.999).astype(int)
  expected = np.bincount(group, weights=probs, minlength=10)
  assert chi_square(group[np.asarray(tokens)], expected) < CHI_SQUARE_999[9]


def test_the_likeliest_token_is_the_lowest_id_among_ties():
  logits = jnp.array([[0.0, 2.0, 2.0], [-jnp.inf, -3.0, -4.0]])
  np.testing.assert_array_equal(draw.argmax_tokens(logits), [1, 1])
