"""Accuracy from n samples per problem, with intervals over problems.

Plain numpy, nothing of jax: the maths can be lifted into any evaluation.
Intervals answer "what if other problems of this kind had been drawn", so the
bootstrap resamples problems, never samples: the n samples of a problem are not
independent evidence.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interval:
  """An estimate with its confidence interval.

  Attributes:
    mean: the estimate on the problems at hand.
    low: lower end of the interval.
    high: upper end.
    n: number of problems that carry it.
  """

  mean: float
  low: float
  high: float
  n: int


def pass_at_k(n: np.ndarray, c: np.ndarray, k: int) -> np.ndarray:
  """Unbiased pass@k of each problem, 1 - C(n-c, k) / C(n, k); Codex eq. 1.

  The chance that k of the n samples, drawn without replacement, hold a correct
  one (Chen et al., 2107.03374).  As a product of factors at most 1, so that no
  binomial overflows.

  Args:
    n: int [P], samples per problem.
    c: int [P], correct samples among them.
    k: samples allowed.

  Returns:
    float64 [P]; pass@1 is c / n.

  Raises:
    ValueError: k is below 1 or above some n, or c is not within 0..n.
  """
  n, c = np.broadcast_arrays(np.asarray(n), np.asarray(c))
  if k < 1 or (n < k).any():
    raise ValueError(
      f"pass@{k} needs at least max(k, 1) samples per problem, got"
      f" {n.min() if n.size else 0}. Draw more samples or take a smaller k."
    )
  if (c < 0).any() or (c > n).any():
    raise ValueError(f"correct counts {c.tolist()} must lie within 0..n.")
  # C(n-c, k) / C(n, k) = prod_{i<k} (n - c - i) / (n - i), 0 once n - c < k.
  i = np.arange(k)
  factors = np.maximum(n[:, None] - c[:, None] - i, 0) / (n[:, None] - i)
  return 1.0 - factors.prod(axis=1)


def majority_at_k(
  answers: Sequence[str | None], correct: Sequence[bool], k: int
) -> float:
  """Exact chance that a majority vote of k of the n samples is correct.

  k samples are drawn without replacement and vote for their answers; the most
  frequent answer wins.  Ties: one of the tied answers wins at random, so c of
  t tied answers being correct counts c / t.  `None` (no answer: bad format or
  cut off) does not vote; k samples without any vote count 0.  Answers vote as
  strings, so a task with several correct spellings should canonicalise them.

  Counted, not resampled.  With m_j samples of answer j, the subsets of size k
  in which answer j wins with v votes, tied with s others, are

    C(m_j, v) [x^(k-v) y^s] C(m_None, .) prod_{i != j}
                            (sum_{u < v} C(m_i, u) x^u + y C(m_i, v) x^v)

  Args:
    answers: the n answers of one problem.
    correct: n verdicts; equal answers must have equal verdicts.
    k: number of votes.

  Returns:
    A probability.

  Raises:
    ValueError: k is not within 1..n, or one answer has both verdicts.
  """
  n = len(answers)
  if not 1 <= k <= n:
    raise ValueError(
      f"maj@{k} needs 1 to {n} votes, for {n} samples were drawn. Draw more"
      " samples or take a smaller k."
    )
  votes: dict[str, int] = {}
  verdict: dict[str, bool] = {}
  for answer, is_correct in zip(answers, correct, strict=True):
    if answer is None:
      continue
    votes[answer] = votes.get(answer, 0) + 1
    if verdict.setdefault(answer, bool(is_correct)) != bool(is_correct):
      raise ValueError(f"answer {answer!r} is both correct and wrong.")
  abstain = np.array(
    [math.comb(n - sum(votes.values()), u) for u in range(k + 1)]
  )
  wins = 0.0
  for answer, count in votes.items():
    if not verdict[answer]:
      continue
    others = [m for other, m in votes.items() if other != answer]
    for v in range(1, min(count, k) + 1):
      ways = _ways_to_win(others, abstain.astype(np.float64), v, k)
      shares = 1.0 / (1.0 + np.arange(len(ways)))
      wins += math.comb(count, v) * float((ways * shares).sum())
  return wins / math.comb(n, k)


def _ways_to_win(others, abstain, v, k):
  """[s] -> draws of k - v other samples where s answers tie, none leads."""
  size, most_ties = k - v, (k - v) // v
  ways = np.zeros((most_ties + 1, size + 1))  # [y^s, x^u]
  ways[0] = abstain[: size + 1]
  for m in others:
    fewer = np.array([float(math.comb(m, u)) for u in range(min(v, size + 1))])
    new = np.stack([np.convolve(row, fewer)[: size + 1] for row in ways])
    if v <= size:
      new[1:, v:] += math.comb(m, v) * ways[:-1, : size + 1 - v]
    ways = new
  return ways[:, size]


def bootstrap_interval(
  numerators: np.ndarray,
  denominators: np.ndarray,
  *,
  resamples: int,
  seed: int,
  confidence: float = 0.95,
) -> Interval:
  """sum(numerators) / sum(denominators), with a percentile bootstrap interval.

  Problems are resampled with replacement.  A mean has denominators of one; a
  ratio, such as accuracy given good format, has the well-formed count of each
  problem, and its numerator and denominator are resampled together.  Resamples
  whose denominator is zero say nothing and are left out.

  Args:
    numerators: float [P].
    denominators: float [P], non-negative.
    resamples: number of bootstrap draws, such as 2000.
    seed: of the draws; equal inputs and seed give equal intervals.
    confidence: share of the resampled estimates inside the interval.

  Returns:
    The estimate and its interval; n counts the problems whose denominator is
    positive.  All NaN when none is: a share of nothing is not 0.
  """
  numerators = np.asarray(numerators, np.float64)
  denominators = np.asarray(denominators, np.float64)
  n = int((denominators > 0).sum())
  if n == 0:
    return Interval(math.nan, math.nan, math.nan, 0)
  problems = len(numerators)
  counts = np.random.default_rng(seed).multinomial(
    problems, np.full(problems, 1.0 / problems), size=resamples
  )
  totals = counts @ denominators
  estimates = (counts @ numerators)[totals > 0] / totals[totals > 0]
  tail = (1.0 - confidence) / 2
  low, high = np.quantile(estimates, [tail, 1.0 - tail])
  mean = numerators.sum() / denominators.sum()
  return Interval(float(mean), float(low), float(high), n)


def share_interval(
  numerators: np.ndarray,
  denominators: np.ndarray,
  *,
  resamples: int,
  seed: int,
  confidence: float = 0.95,
) -> Interval:
  """`bootstrap_interval` of a share, with an exact bound where all are alike.

  Where every problem counts 0, or every one counts fully, so does every
  resample, and a bootstrap would claim certainty from a handful of problems.
  There the open side is Clopper and Pearson's (1934), for 0 of n problems

    high = 1 - ((1 - confidence) / 2)^(1/n)

  (about 3.7 / n at 95%), and its mirror for n of n.  It bounds the chance that
  a problem counts at all, and by that the mean.  For a ratio it takes the n
  problems that carry it as equal in weight.

  Args:
    numerators: float [P], each within 0 and its denominator.
    denominators: float [P], non-negative.
    resamples: see `bootstrap_interval`, likewise the rest.
    seed: of the draws.
    confidence: of the interval.

  Returns:
    The share and its interval, within [0, 1]; NaN for a share of nothing.

  Raises:
    ValueError: a numerator is not a part of its denominator.
  """
  numerators = np.asarray(numerators, np.float64)
  denominators = np.asarray(denominators, np.float64)
  if (numerators < 0).any() or (numerators > denominators + 1e-9).any():
    raise ValueError(
      f"shares {numerators.tolist()} of {denominators.tolist()} must lie"
      " within 0 and what they are shares of."
    )
  interval = bootstrap_interval(
    numerators,
    denominators,
    resamples=resamples,
    seed=seed,
    confidence=confidence,
  )
  if interval.n == 0:
    return interval
  # How far from certainty n equal outcomes leave the truth.
  away = 1.0 - ((1.0 - confidence) / 2) ** (1.0 / interval.n)
  if not numerators.any():
    return dataclasses.replace(interval, low=0.0, high=away)
  if (numerators >= denominators - 1e-9).all():
    return dataclasses.replace(interval, low=1.0 - away, high=1.0)
  return interval
