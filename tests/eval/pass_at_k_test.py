import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.eval.pass_at_k import (
  bootstrap_interval,
  majority_at_k,
  pass_at_k,
  share_interval,
)


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample(n, data):
  c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
  correct = [i < c for i in range(n)]
  draws = list(itertools.combinations(correct, k))
  expected = sum(any(draw) for draw in draws) / len(draws)
  np.testing.assert_allclose(pass_at_k([n], [c], k), [expected], atol=1e-12)


def test_pass_at_1_is_the_mean_and_large_counts_do_not_overflow():
  np.testing.assert_allclose(pass_at_k(8, [0, 2, 8], 1), [0, 0.25, 1])
  exact = 1 - math.comb(9_990, 100) / math.comb(10_000, 100)
  np.testing.assert_allclose(pass_at_k([10_000], [10], 100), exact, rtol=1e-9)


def test_pass_at_k_refuses_what_it_cannot_estimate():
  with pytest.raises(ValueError, match=r"pass@8 needs .* got 4"):
    pass_at_k([8, 4], [1, 1], 8)
  with pytest.raises(ValueError, match=r"must lie within 0\.\.n"):
    pass_at_k([4], [5], 2)


def vote_by_enumeration(answers, correct, k):
  verdict = dict(zip(answers, correct, strict=True))
  total = 0.0
  draws = list(itertools.combinations(answers, k))
  for draw in draws:
    votes = [a for a in draw if a is not None]
    if not votes:
      continue
    most = max(votes.count(a) for a in votes)
    tied = {a for a in votes if votes.count(a) == most}
    total += sum(verdict[a] for a in tied) / len(tied)
  return total / len(draws)


@given(
  st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=8),
  st.sets(st.sampled_from("abcd")),
  st.data(),
)
def test_majority_is_the_share_of_won_votes(answers, right, data):
  k = data.draw(st.integers(1, len(answers)))
  correct = [a in right for a in answers]
  np.testing.assert_allclose(
    majority_at_k(answers, correct, k),
    vote_by_enumeration(answers, correct, k),
    atol=1e-12,
  )


def test_majority_by_hand():
  # All four vote: 2 of "7" (right), 1 of "8", one abstains.
  assert majority_at_k(["7", "8", "7", None], [1, 0, 1, 0], 4) == 1.0
  # Tied 2 to 2: half.
  assert majority_at_k(["7", "8", "7", "8"], [1, 0, 1, 0], 4) == 0.5
  # Nobody votes.
  assert majority_at_k([None, None], [0, 0], 2) == 0.0
  # The most frequent answer is wrong.
  assert majority_at_k(["7", "8", "8"], [1, 0, 0], 3) == 0.0


def test_majority_of_64_samples_is_quick_and_a_probability():
  rng = np.random.default_rng(0)
  answers = [str(x) for x in np.minimum(rng.integers(0, 30, 64), 25)]
  value = majority_at_k(answers, [a == "25" for a in answers], 32)
  assert 0 < value < 1


def test_majority_errors():
  with pytest.raises(ValueError, match=r"maj@3 needs 1 to 2 votes"):
    majority_at_k(["a", "b"], [0, 1], 3)
  with pytest.raises(ValueError, match=r"'a' is both correct and wrong"):
    majority_at_k(["a", "a"], [0, 1], 2)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
  # Problems with success rates Beta(2, 2), 8 samples each, mean 1/2.
  rng = np.random.default_rng(1)
  covered = 0
  for trial in range(200):
    p = rng.beta(2, 2, size=60)
    c = rng.binomial(8, p)
    interval = bootstrap_interval(c / 8, np.ones(60), resamples=300, seed=trial)
    covered += interval.low <= 0.5 <= interval.high
  assert 180 <= covered <= 199


def test_bootstrap_width_follows_problems_not_samples():
  # The same problems ten times over: 1/sqrt(10) of the width.
  rng = np.random.default_rng(2)
  few = rng.random(50)
  many = np.tile(few, 10)
  narrow, wide = (
    bootstrap_interval(x, np.ones(len(x)), resamples=2000, seed=0)
    for x in (many, few)
  )
  ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
  assert 2.7 < ratio < 3.7
  assert narrow.n == 500 and wide.n == 50


def test_ratio_is_of_sums_and_leaves_out_problems_without_denominator():
  # 3 correct of 4 well-formed; the third problem has none well-formed.
  interval = bootstrap_interval([1, 2, 0], [2, 2, 0], resamples=500, seed=3)
  assert interval.mean == 0.75 and interval.n == 2
  assert 0.5 <= interval.low <= 0.75 <= interval.high <= 1.0


def test_bootstrap_is_a_function_of_its_seed():
  x = np.random.default_rng(0).random(30)
  same = [
    bootstrap_interval(x, np.ones(30), resamples=99, seed=s) for s in (5, 5)
  ]
  assert same[0] == same[1]


def test_a_share_of_nothing_is_not_a_number():
  interval = bootstrap_interval([0, 0], [0, 0], resamples=10, seed=0)
  assert math.isnan(interval.mean) and interval.n == 0


def shares(values, denominators=None):
  ones = np.ones(len(values)) if denominators is None else denominators
  return share_interval(values, ones, resamples=200, seed=0)


@given(st.integers(1, 500))
def test_none_right_still_leaves_room(n):
  interval = shares([0.0] * n)
  assert interval.mean == interval.low == 0.0 and interval.n == n
  # At that true share, 0 of n is as rare as a tail of a 95% interval.
  np.testing.assert_allclose((1 - interval.high) ** n, 0.025, rtol=1e-6)
  mirrored = shares([1.0] * n)
  assert mirrored.high == 1.0
  np.testing.assert_allclose(mirrored.low, 1 - interval.high, atol=1e-12)


def test_all_well_formed_answers_right():
  # Only the problems with a well-formed answer carry the ratio.
  interval = shares([0.5, 1.0, 0.0], [0.5, 1.0, 0.0])
  assert (interval.mean, interval.high, interval.n) == (1.0, 1.0, 2)
  np.testing.assert_allclose(interval.low, 0.025**0.5)
  assert math.isnan(shares([0, 0], [0, 0]).low)


def test_between_the_extremes_a_share_is_bootstrapped():
  x = np.random.default_rng(0).random(30)
  ones = np.ones(30)
  assert shares(x) == bootstrap_interval(x, ones, resamples=200, seed=0)


def test_what_exceeds_its_whole_is_no_share():
  with pytest.raises(ValueError, match="must lie within 0 and what"):
    shares([25.0, 31.0])
