"""Intervals over seeds and verdicts, by hand and by property."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.eval.comparison import compare, r1_claims, seed_interval, verdict
from rlm.eval.pass_at_k import Interval

CLAIMS = r1_claims(
  cold_start="cold_start",
  rl="rl",
  sft_control="sft_control",
  sft_verified="sft_verified",
  distill="distill",
  student_rl="student_rl",
)


def measure(mean):
  return {"mean": mean, "low": mean, "high": mean, "n": 40}


def record(accuracy, *, given_format=0.5, length=30.0, levels=()):
  return {
    "stage": "s",
    "n_problems": 40,
    "pass_at_1": measure(accuracy),
    "pass_at_1_given_format": {"mean": None, "low": None, "high": None, "n": 0}
    if given_format is None
    else measure(given_format),
    "response_length": measure(length),
    "levels": {k: {"pass_at_1": measure(v)} for k, v in levels},
  }


def seed(cold, rl, control, distill, student):
  """One seed's evaluations, from pass@1 of each stage."""
  return {
    "cold_start": record(cold),
    "rl": record(rl, given_format=0.9, length=34.0),
    "sft_control": record(control),
    "sft_verified": record(control),
    "distill": record(distill),
    "student_rl": record(student),
  }


def test_the_interval_over_seeds_by_hand():
  # t(0.975, 2) = 4.302653; s = 0.1; half = 4.302653 * 0.1 / sqrt(3).
  found = seed_interval([0.1, 0.2, 0.3], confidence=0.95)
  np.testing.assert_allclose(
    [found.mean, found.low, found.high],
    [0.2, 0.2 - 0.2484138, 0.2 + 0.2484138],
    rtol=1e-6,
  )
  assert found.n == 3
  # t(0.975, 1) = 12.7062; s = 0.1 sqrt(2).
  found = seed_interval([0.3, 0.1], confidence=0.95)
  np.testing.assert_allclose(found.high - found.mean, 1.27062, rtol=1e-5)
  # t(0.9, 4) = 1.533206; values 1..5, s = 1.5811388.
  found = seed_interval([5.0, 3, 1, 2, 4], confidence=0.8)
  np.testing.assert_allclose(
    found.high - found.mean, 1.533206 * 1.5811388 / 5**0.5, rtol=1e-6
  )


def test_an_interval_needs_two_seeds_and_every_one_of_them():
  one = seed_interval([0.4], confidence=0.95)
  assert (one.mean, one.n) == (0.4, 1) and math.isnan(one.low)
  gap = seed_interval([0.4, None, 0.6], confidence=0.95)
  assert (gap.mean, gap.n) == (0.5, 2) and math.isnan(gap.high)
  none = seed_interval([None, None], confidence=0.95)
  assert none.n == 0 and math.isnan(none.mean)
  same = seed_interval([0.4, 0.4], confidence=0.95)
  assert same == Interval(0.4, 0.4, 0.4, 2)


@given(
  st.lists(st.floats(-1, 1), min_size=2, max_size=8),
  st.floats(-1, 1),
  st.floats(0.5, 0.99),
)
def test_intervals_shift_mirror_and_widen(values, shift, confidence):
  found = seed_interval(values, confidence=confidence)
  moved = seed_interval([v + shift for v in values], confidence=confidence)
  mirrored = seed_interval([-v for v in values], confidence=confidence)
  wider = seed_interval(values, confidence=(1 + confidence) / 2)
  tolerance = dict(atol=1e-9)
  np.testing.assert_allclose(moved.low, found.low + shift, **tolerance)
  np.testing.assert_allclose(mirrored.high, -found.low, **tolerance)
  assert wider.low <= found.low <= found.mean <= found.high <= wider.high
  flipped = {"holds": "reversed", "reversed": "holds"}
  assert verdict(mirrored) == flipped.get(verdict(found), "undecided")


def test_verdicts():
  assert verdict(Interval(0.2, 0.1, 0.3, 3)) == "holds"
  assert verdict(Interval(0.2, -0.1, 0.5, 3)) == "undecided"
  assert verdict(Interval(-0.2, -0.3, -0.1, 3)) == "reversed"
  assert verdict(Interval(0.0, 0.0, 0.0, 2)) == "undecided"
  assert verdict(Interval(0.9, math.nan, math.nan, 1)) == "undecided"


def test_claims_are_paired_by_seed_and_say_what_came_out():
  # Seeds differ by 0.4 in level, but RL's lead is 0.40, 0.45, 0.50 in each:
  # paired, t = 4.302653, s = 0.05, half = 0.1242069.
  found = compare(
    {
      0: seed(0.1, 0.50, 0.10, 0.4, 0.6),
      1: seed(0.3, 0.75, 0.30, 0.5, 0.6),
      2: seed(0.5, 1.00, 0.50, 0.5, 0.7),
    },
    CLAIMS,
    confidence=0.95,
  )
  json.dumps(found, allow_nan=False)
  assert found["seeds"] == [0, 1, 2]
  claims = {claim["name"]: claim for claim in found["claims"]}
  beats = claims["rl_beats_sft"]
  assert list(beats["by_seed"]) == ["0", "1", "2"]
  np.testing.assert_allclose(list(beats["by_seed"].values()), [0.4, 0.45, 0.5])
  np.testing.assert_allclose(
    [beats["mean"], beats["low"], beats["high"]],
    [0.45, 0.45 - 0.1242069, 0.45 + 0.1242069],
    rtol=1e-6,
  )
  assert beats["verdict"] == "holds"
  assert claims["rl_beats_sft_given_format"]["verdict"] == "holds"
  assert claims["responses_lengthen"]["mean"] == 4.0
  # Distillation: -0.2, -0.1, -0.2. s = 0.0577350, half = 0.1434218.
  loses = claims["distillation_beats_rl"]
  np.testing.assert_allclose(loses["high"], -1 / 6 + 0.1434218, rtol=1e-5)
  assert loses["verdict"] == "reversed"
  # Over seeds, each of them kept.
  rl = found["stages"]["rl"]["pass_at_1"]
  assert rl["mean"] == 0.75 and rl["n"] == 3
  assert [r["mean"] for r in rl["by_seed"].values()] == [0.5, 0.75, 1.0]


def test_a_measure_that_one_seed_lacks_decides_nothing():
  lacking = seed(0.1, 0.6, 0.1, 0.5, 0.2)
  lacking["sft_control"] = record(0.1, given_format=None)
  found = compare(
    {0: seed(0.1, 0.6, 0.1, 0.5, 0.2), 4: lacking, 7: lacking},
    CLAIMS,
    confidence=0.95,
  )
  claim = found["claims"][2]
  assert claim["name"] == "rl_beats_sft_given_format"
  assert claim["by_seed"] == {"0": 0.4, "4": None, "7": None}
  assert (claim["mean"], claim["low"], claim["n"]) == (0.4, None, 1)
  assert claim["verdict"] == "undecided"


def test_levels_are_compared_too():
  levels = (("2", 0.9), ("3", 0.5))
  evaluations = {
    s: seed(0, 0, 0, 0, 0) | {"rl": record(0.7 + s / 10, levels=levels)}
    for s in (0, 1)
  }
  found = compare(evaluations, CLAIMS, confidence=0.95)
  by_level = found["stages"]["rl"]["levels"]
  assert by_level["3"]["pass_at_1"]["mean"] == 0.5
  assert list(by_level) == ["2", "3"]
  assert "levels" not in by_level["2"]


def test_one_seed_is_shown_and_decides_nothing():
  found = compare({3: seed(0.1, 0.9, 0.1, 0.9, 0.1)}, CLAIMS, confidence=0.95)
  assert {claim["verdict"] for claim in found["claims"]} == {"undecided"}
  assert found["claims"][0]["by_seed"] == {"3": 0.8}


def test_runs_of_different_recipes_are_not_compared():
  whole = seed(0, 0, 0, 0, 0)
  part = {k: v for k, v in whole.items() if k != "distill"}
  with pytest.raises(ValueError, match=r"seed 1 has evaluations of cold_start"):
    compare({0: whole, 1: part}, CLAIMS, confidence=0.95)
  with pytest.raises(ValueError, match="no seed to compare"):
    compare({}, CLAIMS, confidence=0.95)
