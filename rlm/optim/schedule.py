"""Learning rate and batch size as functions of the step, from explicit counts.

They are computed on the host and handed to the compiled step as data: another
schedule, or another stage, is the same program.

A schedule is a row of phases.  DeepSeek-V3's (section 4.2):

  phases = (
    dict(shape="linear", steps=2_000, factor=1.0),  # warm-up from 0
    dict(shape="constant", steps=..., factor=1.0),
    dict(shape="cosine", steps=..., factor=0.1),
    dict(shape="constant", steps=..., factor=0.1),
    dict(shape="constant", steps=..., factor=7.3e-6 / 2.2e-4),
  )
"""

import bisect
import itertools
import math
from collections.abc import Callable

import numpy as np

from rlm.optim.config import ScheduleConfig

Schedule = Callable[[int], np.float32]


def make_schedule(cfg: ScheduleConfig | float) -> Schedule:
  """The value, float32, as a function of the step.

  A ramp of n steps gives its first step 1/n of the way and its last step the
  whole of it: no step is spent at a learning rate of zero.

  Args:
    cfg: the phases; or a number that holds for ever.

  Returns:
    A function of the step, from 0.
  """
  if not isinstance(cfg, ScheduleConfig):
    return lambda step: np.float32(cfg)
  ends = list(itertools.accumulate(phase.steps for phase in cfg.phases))
  before = [0.0, *(phase.factor for phase in cfg.phases)]

  def schedule(step: int) -> np.float32:
    i = bisect.bisect_right(ends, step)
    if i == len(ends):
      return np.float32(cfg.peak * before[-1])
    phase, first = cfg.phases[i], before[i]
    done = 1 - (ends[i] - step - 1) / phase.steps
    if phase.shape == "cosine":
      done = (1 - math.cos(math.pi * done)) / 2
    elif phase.shape == "constant":
      done = 1.0
    return np.float32(cfg.peak * (first + (phase.factor - first) * done))

  return schedule


def batch_rows(
  step: int, *, first_rows: int, last_rows: int, ramp_steps: int, multiple: int
) -> int:
  """Rows of a step under a linear batch ramp; V3 section 4.2.

  V3 ramps over tokens, 3072 to 15360 sequences within 469B; here the ramp is
  over steps, so that a step's rows follow from its number alone.

  Args:
    step: from 0.
    first_rows: rows of step 0.
    last_rows: rows from step `ramp_steps` on.
    ramp_steps: length of the ramp; 0 for none.
    multiple: rows are rounded down to a multiple of this.

  Returns:
    Rows, a multiple of `multiple`.

  Raises:
    ValueError: an end of the ramp is not a positive multiple of `multiple`.
  """
  if first_rows % multiple or last_rows % multiple or first_rows < 1:
    raise ValueError(
      f"a batch of {first_rows} to {last_rows} rows does not split into"
      f" microbatches of {multiple}. Make both multiples of it."
    )
  if step >= ramp_steps:
    return last_rows
  rows = first_rows + (last_rows - first_rows) * step // ramp_steps
  return rows // multiple * multiple
