"""Which checkpoints of a run stay; imports no jax."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class KeepBest:
  """The checkpoint that stays beside the newest.

  Attributes:
    metric: name in metrics.jsonl, of the step after which it was saved.
    mode: whether the smallest or the largest value is the best.
  """

  metric: str
  mode: Literal["min", "max"]

  def is_better(self, value: float, than: float) -> bool:
    """Whether a value beats another; an equal one does not."""
    return value < than if self.mode == "min" else value > than
