"""Learning rate and batch size as functions of the step, from explicit counts.

A schedule is a row of phases.  DeepSeek-V3's (section 4.2):

  phases = (
    dict(shape="linear", steps=2_000, factor=1.0),  # warm-up from 0
    dict(shape="constant", steps=..., factor=1.0),
    dict(shape="cosine", steps=..., factor=0.1),
    dict(shape="constant", steps=..., factor=0.1),
    dict(shape="constant", steps=..., factor=7.3e-6 / 2.2e-4),
  )
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlm.optim.config import ScheduleConfig


def make_schedule(
  cfg: ScheduleConfig | float,
) -> Callable[[jax.Array], jax.Array]:
  """The value, float32, as a function of the step.

  A ramp of n steps gives its first step 1/n of the way and its last step the
  whole of it: no step is spent at a learning rate of zero.

  Args:
    cfg: the phases; or a number that holds for ever.

  Returns:
    A function of int32 [], traced or not.
  """
  if not isinstance(cfg, ScheduleConfig):
    return lambda step: jnp.float32(cfg)
  steps = [phase.steps for phase in cfg.phases]
  starts = np.cumsum([0, *steps[:-1]])
  before = [0.0, *(phase.factor for phase in cfg.phases[:-1])]

  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step)
    factor = jnp.float32(cfg.phases[-1].factor)
    # Backwards, so that the phase that holds the step has the last word.
    for phase, start, first in reversed(
      list(zip(cfg.phases, starts, before, strict=True))
    ):
      done = jnp.clip((step - start + 1) / phase.steps, 0.0, 1.0)
      if phase.shape == "cosine":
        done = (1 - jnp.cos(jnp.pi * done)) / 2
      elif phase.shape == "constant":
        done = jnp.ones_like(done)
      value = first + (phase.factor - first) * done
      factor = jnp.where(step < start + phase.steps, value, factor)
    return cfg.peak * factor

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
