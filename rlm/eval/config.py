"""The section of a config that says what is evaluated; jax-free."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What is asked, how often, and how it is summed up.

  Attributes:
    seed: of the problems and of the sampling.
    levels: levels to ask.
    levels_trained: levels of the headline: those that RL draws. The overall
      figures are over these of `levels`, the same after every stage, so that
      stages compare. Which other levels some stage saw, its config says.
    problems_per_level: distinct held-out problems of each level.
    samples_per_problem: n.
    ks: the k of pass@k and maj@k, each at most n.
    bootstrap_resamples: draws behind an interval; 2000 settles two digits.
    traces_per_level: problems of each level whose samples are written down.
    samples_per_trace: how many samples of each of those.
  """

  seed: int
  levels: tuple[int, ...]
  levels_trained: tuple[int, ...]
  problems_per_level: int
  samples_per_problem: int
  ks: tuple[int, ...]
  bootstrap_resamples: int
  traces_per_level: int
  samples_per_trace: int

  def __post_init__(self):
    if not set(self.levels) & set(self.levels_trained):
      raise ValueError(
        f"levels={self.levels} and levels_trained={self.levels_trained} have"
        " none in common, so there is no headline. Evaluate a level that RL"
        " draws."
      )
    if len(set(self.levels)) != len(self.levels):
      raise ValueError(f"levels={self.levels} names a level twice.")
    for name in (
      "problems_per_level",
      "samples_per_problem",
      "bootstrap_resamples",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
    if not self.ks or not 1 <= min(self.ks) <= max(self.ks):
      raise ValueError(f"ks={self.ks} must hold numbers of 1 or more.")
    if max(self.ks) > self.samples_per_problem:
      raise ValueError(
        f"pass@{max(self.ks)} needs at least {max(self.ks)} samples per"
        f" problem, got samples_per_problem={self.samples_per_problem}."
      )
    if not 0 <= self.traces_per_level <= self.problems_per_level:
      raise ValueError(
        f"traces_per_level={self.traces_per_level} must lie within 0 and"
        f" problems_per_level={self.problems_per_level}."
      )
    if not 0 <= self.samples_per_trace <= self.samples_per_problem:
      raise ValueError(
        f"samples_per_trace={self.samples_per_trace} must lie within 0 and"
        f" samples_per_problem={self.samples_per_problem}."
      )
