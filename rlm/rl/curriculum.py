"""A curriculum that raises difficulty as success passes a threshold.

The state is a plain dict of JSON values, so that a checkpoint can hold it;
functions take it and return a new one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlm.tasks.draws import Draws

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
  """Config section of the curriculum.

  Attributes:
    levels: all levels that RL may draw, ascending.
    start_level: the hardest level at the start; easier ones are drawn too.
    threshold: smoothed success at the top level that raises it, in (0, 1].
      1 still raises, when every completion succeeds.
    smoothing: weight of the past in the smoothed success, in [0, 1); 0
      takes the last step alone.
    min_steps: steps at a top level before it can be left, at least 1.
    top_share: share of a batch drawn at the top level, in (0, 1]; the rest
      is spread over the easier ones.
  """

  levels: tuple[int, ...]
  start_level: int
  threshold: float
  smoothing: float
  min_steps: int
  top_share: float

  def __post_init__(self):
    levels = list(self.levels)
    if not levels or levels != sorted(set(levels)):
      raise ValueError(
        f"levels is {self.levels}, but must be one or more different levels"
        " in ascending order, such as (2, 3, 4)."
      )
    if self.start_level not in levels:
      raise ValueError(
        f"start_level is {self.start_level}, but must be one of"
        f" levels={self.levels}."
      )
    if not 0 < self.threshold <= 1:
      raise ValueError(
        f"threshold is {self.threshold}, but must lie in (0, 1]: the success"
        " rate that raises the level, such as 0.7."
      )
    if not 0 <= self.smoothing < 1:
      raise ValueError(
        f"smoothing is {self.smoothing}, but must lie in [0, 1): the weight"
        " of the past, such as 0.8."
      )
    if self.min_steps < 1:
      raise ValueError(
        f"min_steps is {self.min_steps}, but must be at least 1."
      )
    if not 0 < self.top_share <= 1:
      raise ValueError(
        f"top_share is {self.top_share}, but must lie in (0, 1]: the share"
        " of a batch drawn at the top level, such as 0.5."
      )


def initial_state(cfg: CurriculumConfig) -> State:
  """The state before the first step.

  Returns:
    top_level: the hardest level being drawn.
    steps_at_top: updates since it became so.
    success: smoothed success of each of cfg.levels, None where not seen.
  """
  return {
    "top_level": cfg.start_level,
    "steps_at_top": 0,
    "success": [None] * len(cfg.levels),
  }


def levels_for_step(
  cfg: CurriculumConfig, state: State, seed: int, step: int, n: int
) -> list[int]:
  """Draws the levels of a batch of prompts; the same for the same arguments.

  The number at the top level is exact, top_share * n rounded and at least 1;
  the easier levels share the rest as evenly as it goes, those left over
  falling on random ones. The order is random.

  Args:
    cfg: the curriculum.
    state: as `initial_state` or `update` gave it.
    seed: the run's seed.
    step: the RL step.
    n: number of prompts, at least 1.
  """
  top = state["top_level"]
  easier = [level for level in cfg.levels if level < top]
  num_top = max(1, round(cfg.top_share * n)) if easier else n
  draws = Draws("curriculum", seed, step)
  each, left_over = divmod(n - num_top, max(1, len(easier)))
  rest = easier * each + draws.shuffled(easier)[:left_over]
  return draws.shuffled([top] * num_top + rest)


def update(
  cfg: CurriculumConfig, state: State, successes: Mapping[int, float]
) -> State:
  """Takes in one step's success and perhaps raises the top level, by one.

  Args:
    cfg: the curriculum.
    state: the state before; left as it is.
    successes: mean success of the completions at each level drawn, in
      [0, 1].

  Returns:
    The new state.

  Raises:
    ValueError: a level that the curriculum lacks, or no success rate.
  """
  smoothed = list(state["success"])
  for level, success in successes.items():
    if level not in cfg.levels:
      raise ValueError(
        f"success at level {level} was reported, but the curriculum has"
        f" levels {cfg.levels}."
      )
    if not 0 <= success <= 1:
      raise ValueError(
        f"success at level {level} is {success}, but must lie in [0, 1]."
      )
    i = cfg.levels.index(level)
    past = success if smoothed[i] is None else smoothed[i]
    smoothed[i] = float(past + (1 - cfg.smoothing) * (success - past))
  top, steps_at_top = state["top_level"], state["steps_at_top"]
  place = cfg.levels.index(top)
  steps_at_top += 1
  reached = smoothed[place]
  if (
    reached is not None
    and reached >= cfg.threshold
    and steps_at_top >= cfg.min_steps
    and place + 1 < len(cfg.levels)
  ):
    top, steps_at_top = cfg.levels[place + 1], 0
  return {
    "top_level": top,
    "steps_at_top": steps_at_top,
    "success": smoothed,
  }
