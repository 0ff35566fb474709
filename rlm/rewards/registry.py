"""Named rewards and their weighted sum.

Rewards are rules only, as in R1: whether the answer is right and whether the
response has the format. Each one's own value is kept, so that each one's
mean can be logged.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from rlm.config import did_you_mean
from rlm.rewards.answers import PARSERS, Response
from rlm.tasks.base import Problem, Task

# (task, problem, response, finished) -> reward before its weight.
RewardFn = Callable[[Task, Problem, Response, bool], float]


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
  """The verdict on one response.

  Attributes:
    total: weighted sum of the rewards; what RL maximises.
    rewards: each reward before its weight, by name.
    correct: the answer is right, in a finished, well-formed response.
    well_formed: has its format and ended by itself, not cut off.
    steps_correct: every step of the thinking is right. False too where the
      task cannot check steps (`Task.has_worked_solutions`).
    answer: what was answered; "" if not well formed.
  """

  total: float
  rewards: dict[str, float]
  correct: bool
  well_formed: bool
  steps_correct: bool
  answer: str


def accuracy(
  task: Task, problem: Problem, response: Response, finished: bool
) -> float:
  """1 for a right answer; 0 for a wrong, ill-formed or truncated one."""
  if not (finished and response.well_formed):
    return 0.0
  return float(task.verify(problem, response.answer))


def well_formed(
  task: Task, problem: Problem, response: Response, finished: bool
) -> float:
  """1 for the right format, ended by EOS; 0 otherwise."""
  return float(finished and response.well_formed)


REWARDS: dict[str, RewardFn] = {"accuracy": accuracy, "format": well_formed}


class Scorer:
  """Scores responses to the problems of one task.

  Example:
    scorer = Scorer(task, {"accuracy": 1.0, "format": 0.1})
    scored = scorer.score(problem, text, finished=True)
  """

  def __init__(
    self,
    task: Task,
    weights: Mapping[str, float],
    *,
    answer_format: str = "tags",
  ):
    """Checks the weights.

    Args:
      task: verifies the answers.
      weights: weight of each reward by name, a config section. Rewards that
        are not named are not computed.
      answer_format: where a response has its answer; a key of `PARSERS`.

    Raises:
      ValueError: an unknown name, or weights that are negative, not finite
        or all zero.
    """
    if not weights:
      raise ValueError(
        "rewards is empty, but RL needs at least one. Name some of"
        f" {', '.join(REWARDS)} with their weights."
      )
    for name, weight in weights.items():
      if name not in REWARDS:
        raise ValueError(
          f"rewards: unknown reward {name!r}{did_you_mean(name, REWARDS)}"
          f" The rewards are {', '.join(REWARDS)}."
        )
      if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(
          f"rewards.{name} is {weight}, but a weight must be finite and not"
          " negative."
        )
    if not any(weights.values()):
      raise ValueError(
        "rewards are all weighted 0, so nothing could be learned. Give at"
        " least one a positive weight."
      )
    self._task = task
    self._parse = PARSERS[answer_format]
    self._weights = {name: float(w) for name, w in weights.items()}

  def score(self, problem: Problem, text: str, finished: bool) -> Scored:
    """Scores one response.

    Args:
      problem: what was asked, of this scorer's task.
      text: the response from `<think>` on, without EOS.
      finished: whether the completion ended by EOS. False means that it ran
        out of tokens: then it earns nothing, even if the text so far has the
        whole format, because the model would have gone on.
    """
    response = self._parse(text)
    rewards = {
      name: REWARDS[name](self._task, problem, response, finished)
      for name in self._weights
    }
    counts = finished and response.well_formed
    return Scored(
      total=sum(self._weights[name] * r for name, r in rewards.items()),
      rewards=rewards,
      correct=accuracy(self._task, problem, response, finished) > 0,
      well_formed=counts,
      steps_correct=counts
      and self._task.check_steps(problem, response.thinking),
      answer=response.answer,
    )
