"""R1's findings over several seeds of the recipe, each with its verdict.

A seed is one whole run: its pretraining, its problems, its sampling.  Stages of
one seed share what came before them, so they are compared seed by seed, and
the interval is over seeds: it answers "what if the recipe were run again",
where the bootstrap over problems answers "what if other problems were asked".
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from rlm.eval.pass_at_k import Interval

# An evaluation's summary: measure -> {"mean", "low", "high", "n"}, and
# "levels": level -> the same.
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement that one stage's measure exceeds another's.

  Attributes:
    name: its key.
    statement: what is claimed, as a sentence.
    measure: of an evaluation.
    stage: whose measure should be higher.
    control: than whose.
  """

  name: str
  statement: str
  measure: str
  stage: str
  control: str


def r1_claims(
  *,
  cold_start: str,
  rl: str,
  sft_control: str,
  sft_verified: str,
  distill: str,
  student_rl: str,
) -> tuple[Claim, ...]:
  """R1's findings (2501.12948v1) as claims about the stages of a recipe.

  RL raises accuracy (figure 2), responses lengthen as it goes (figure 3), and a
  small model learns more from a large one's traces than from RL of its own
  (section 4.1).  The controls are ours: R1 shows none for SFT alone.

  Args:
    cold_start: what RL started from.
    rl: RL.
    sft_control: SFT from `cold_start` on its kind of data, with the compute of
      `rl`.
    sft_verified: the same on solutions without an error.
    distill: the small model on the large one's traces.
    student_rl: RL alone on the small model.
  """
  return (
    Claim(
      "rl_raises_accuracy",
      "RL raises accuracy over what it started from.",
      "pass_at_1",
      rl,
      cold_start,
    ),
    Claim(
      "rl_beats_sft",
      "RL raises accuracy more than SFT with the same compute.",
      "pass_at_1",
      rl,
      sft_control,
    ),
    Claim(
      "rl_beats_sft_given_format",
      "So it does among well-formed answers, where no format is repaired.",
      "pass_at_1_given_format",
      rl,
      sft_control,
    ),
    Claim(
      "rl_beats_verified_sft",
      "RL, told right or wrong, does more than SFT on solutions without error.",
      "pass_at_1",
      rl,
      sft_verified,
    ),
    Claim(
      "responses_lengthen",
      "Responses lengthen in RL.",
      "response_length",
      rl,
      cold_start,
    ),
    Claim(
      "distillation_beats_rl",
      "On the small model, distillation beats RL alone.",
      "pass_at_1",
      distill,
      student_rl,
    ),
  )


def seed_interval(
  values: Sequence[float | None], *, confidence: float
) -> Interval:
  """Mean over seeds with Student's t interval, mean ± t s / sqrt(n).

  Three seeds are few, and the interval says so (t is 4.3 at 95%); a bootstrap
  of three values would be far too narrow.

  Args:
    values: one per seed; None where it was not measured.
    confidence: share of intervals, over repeated studies, that hold the truth.

  Returns:
    The mean of the measured values; low and high are NaN with fewer than two
    seeds, or when one was not measured: an interval that leaves a seed out
    would claim too much.  n counts the measured ones.
  """
  known = np.array([v for v in values if v is not None], np.float64)
  n = len(known)
  if n == 0:
    return Interval(math.nan, math.nan, math.nan, 0)
  mean = float(known.mean())
  if n < 2 or n < len(values):
    return Interval(mean, math.nan, math.nan, n)
  t = float(stdtrit(n - 1, (1 + confidence) / 2))
  half = t * float(known.std(ddof=1)) / math.sqrt(n)
  return Interval(mean, mean - half, mean + half, n)


def verdict(difference: Interval) -> str:
  """What the interval of a difference says of the claim that it is positive.

  Returns:
    "holds" where the whole interval is above zero, "reversed" where it is
    below, else "undecided".
  """
  if difference.low > 0:
    return "holds"
  return "reversed" if difference.high < 0 else "undecided"


def compare(
  evaluations: Mapping[int, Mapping[str, Record]],
  claims: Sequence[Claim],
  *,
  confidence: float,
) -> dict[str, Any]:
  """Every stage and every claim, seed by seed and over the seeds.

  Args:
    evaluations: seed -> stage -> summary of its held-out evaluation; the same
      stages for every seed, those of the claims among them.
    claims: what to test.
    confidence: of the intervals over seeds.

  Returns:
    JSON data, with None where a figure is undefined:
      seeds, confidence;
      stages: stage -> measure -> {"mean", "low", "high", "n"} over seeds and
        "by_seed", each seed's own record; under "levels" the same by level;
      claims: the fields of `Claim`; the stage's measure minus the control's as
        {"mean", "low", "high", "n"} over seeds and "by_seed", seed -> number;
        and the verdict.

  Raises:
    ValueError: no seed, or one that lacks a stage of another.
  """
  seeds = sorted(evaluations)
  if not seeds:
    raise ValueError("no seed to compare. Name at least one.")
  stages = list(evaluations[seeds[0]])
  for seed in seeds:
    if set(evaluations[seed]) != set(stages):
      raise ValueError(
        f"seed {seed} has evaluations of {', '.join(evaluations[seed])}, seed"
        f" {seeds[0]} of {', '.join(stages)}. Compare runs of one recipe."
      )
  over = {
    stage: _stage(
      {seed: evaluations[seed][stage] for seed in seeds}, confidence
    )
    for stage in stages
  }
  return {
    "seeds": seeds,
    "confidence": confidence,
    "stages": over,
    "claims": [
      _claim(claim, evaluations, seeds, confidence) for claim in claims
    ],
  }


def _stage(by_seed: Mapping[int, Record], confidence: float) -> dict[str, Any]:
  """One stage's measures over seeds, overall and by level."""
  first = next(iter(by_seed.values()))
  measures: dict[str, Any] = {
    name: _plain(
      seed_interval(
        [_mean(record, name) for record in by_seed.values()],
        confidence=confidence,
      )
    )
    | {"by_seed": {str(seed): record[name] for seed, record in by_seed.items()}}
    for name, value in first.items()
    if isinstance(value, Mapping) and "mean" in value
  }
  if "levels" in first:
    measures["levels"] = {
      level: _stage(
        {seed: record["levels"][level] for seed, record in by_seed.items()},
        confidence,
      )
      for level in first["levels"]
    }
  return measures


def _claim(
  claim: Claim,
  evaluations: Mapping[int, Mapping[str, Record]],
  seeds: Sequence[int],
  confidence: float,
) -> dict[str, Any]:
  """A claim's paired differences and what they say."""
  differences: list[float | None] = []
  for seed in seeds:
    a, b = (
      _mean(evaluations[seed][stage], claim.measure)
      for stage in (claim.stage, claim.control)
    )
    differences.append(None if a is None or b is None else a - b)
  interval = seed_interval(differences, confidence=confidence)
  return {
    **dataclasses.asdict(claim),
    **_plain(interval),
    "by_seed": dict(zip(map(str, seeds), differences, strict=True)),
    "verdict": verdict(interval),
  }


def _mean(record: Record, measure: str) -> float | None:
  """A measure's mean; None where it is undefined, as accuracy of no answer."""
  return record[measure]["mean"]


def _plain(interval: Interval) -> dict[str, Any]:
  """The interval as JSON data."""
  return {
    name: None if isinstance(value, float) and math.isnan(value) else value
    for name, value in dataclasses.asdict(interval).items()
  }
