"""Column notation, shared by column addition and column multiplication.

Each column of the numbers has a letter, so that a small model can find a
column by its name instead of counting places. A step names the column, its
two digits, the carry that comes in, and the two-digit result:

  e89d51c71b77?  ->  b770=14 c711=09 d510=06 e890=17  ->  f1e7d6c9b4

(written without the spaces; 8577 + 9117 = 17694). The answer always has one
letter more than the problem, on top, for the last carry, be it 0.
"""

import abc
import dataclasses
import string
from typing import ClassVar

from rlm.tasks.base import (
  Problem,
  Solution,
  Task,
  TaskConfig,
  check_share,
  draw_slip,
)
from rlm.tasks.draws import Draws, RandomSource

_MIN_LEVEL = 2


@dataclasses.dataclass(frozen=True)
class ColumnConfig(TaskConfig):
  """Config section of the column families.

  Attributes:
    letters: the alphabet of column names, in order. A problem of level k
      uses k + 1 neighbours from a random place in it, so it has to have
      k + 1 letters, and the more it has the more a model must learn.
    forget_carry: share of authors who never carry.
    slip: probability that a step's result is off by one.
  """

  letters: str
  forget_carry: float
  slip: float

  def __post_init__(self):
    super().__post_init__()
    check_share("forget_carry", self.forget_carry)
    check_share("slip", self.slip)
    if (
      len(set(self.letters)) != len(self.letters)
      or not set(self.letters) <= set(string.ascii_letters)
      or len(self.letters) <= _MIN_LEVEL
    ):
      raise ValueError(
        f"letters is {self.letters!r}, but must be at least"
        f" {_MIN_LEVEL + 1} different letters from a-z and A-Z: one for each"
        " column of the hardest level and one more for the last carry."
      )


class ColumnTask(Task):
  """A column family; level = number of columns.

  Attributes:
    max_result: the largest result a step can have; slips stay below it.
  """

  config_class = ColumnConfig
  max_result: ClassVar[int]

  def __init__(self, cfg: ColumnConfig):
    super().__init__(cfg)
    self._cfg = cfg
    self.levels = tuple(range(_MIN_LEVEL, len(cfg.letters)))

  @staticmethod
  @abc.abstractmethod
  def column_pairs(problem: Problem) -> list[tuple[int, int]]:
    """The two digits of each column, lowest column first."""

  @staticmethod
  @abc.abstractmethod
  def combine(upper: int, lower: int) -> int:
    """A column's result before the carry."""

  def draw_letters(self, draws: Draws, level: int) -> str:
    """Level + 1 neighbouring letters, lowest column first."""
    letters = self._cfg.letters
    start = draws.below(len(letters) - level)
    return letters[start : start + level + 1]

  def letters_from(self, columns: str) -> str | None:
    """The letters of a problem, lowest first, if they are neighbours.

    Args:
      columns: letters of its columns, highest first, as a prompt has them.

    Returns:
      The letters and that of the last carry; None if they are no problem's.
    """
    start = self._cfg.letters.find(columns[::-1])
    letters = self._cfg.letters[start : start + len(columns) + 1]
    in_place = start >= 0 and len(letters) == len(columns) + 1
    return letters if in_place and len(columns) in self.levels else None

  def worked_solution(self, problem: Problem) -> Solution:
    """The right steps and answer; Task.worked_solution."""
    return self._solve(problem, None)

  def authored_solution(self, problem: Problem, rng: RandomSource) -> Solution:
    """By an author who may forget carries or slip; Task.authored_solution.

    A forgetful author writes every carry as 0, but the last one, which is
    the top digit of his last result. A slip is carried on.
    """
    return self._solve(problem, rng)

  def verify(self, problem: Problem, answer: str) -> bool:
    """Exact notation: every letter and every digit; Task.verify."""
    return answer.strip() == problem.answer

  def check_steps(self, problem: Problem, thinking: str) -> bool:
    """The notation leaves one right way to write the steps."""
    return thinking.strip() == self.worked_solution(problem).thinking

  def _solve(self, problem: Problem, rng: RandomSource | None) -> Solution:
    """Works the columns; by a noisy author where `rng` is given."""
    letters = problem.metadata["letters"]
    slip = self._cfg.slip
    forgets = rng is not None and rng.random() < self._cfg.forget_carry
    carry = 0
    steps, digits = [], []
    pairs = self.column_pairs(problem)
    for letter, (upper, lower) in zip(letters[:-1], pairs, strict=True):
      if forgets:
        carry = 0
      result = self.combine(upper, lower) + carry
      if rng is not None:
        slipped = result + draw_slip(rng, slip)
        # A slip that would leave the notation goes the other way.
        in_range = 0 <= slipped <= self.max_result
        result = slipped if in_range else 2 * result - slipped
      steps.append(f"{letter}{upper}{lower}{carry}={result:02d}")
      carry, digit = divmod(result, 10)
      digits.append(f"{letter}{digit}")
    digits.append(f"{letters[-1]}{carry}")
    return Solution("".join(steps), "".join(reversed(digits)))
