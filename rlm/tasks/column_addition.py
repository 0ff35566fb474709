"""Addition of two numbers in column notation: `e89d51c71b77?`.

Per column, highest first: its letter, upper digit, lower digit. Level k has
k columns, and both operands have k digits without leading zeros, so level k
holds 81 * 100**(k-1) problems (8,100 at k = 2: claim nothing about
memorising there). Both orders of the operands share one identity.
"""

import re

from rlm.tasks.base import Problem
from rlm.tasks.columns import ColumnTask
from rlm.tasks.draws import Draws

_PROMPT = re.compile(r"([a-zA-Z][0-9][0-9])+\?")


class ColumnAddition(ColumnTask):
  """Sums of two k-digit numbers; the task of the laptop recipe."""

  name = "column_addition"
  max_result = 19  # 9 + 9 and a carry

  def draw(self, draws: Draws, level: int) -> Problem:
    """Both operands, then the place in the alphabet."""
    low = 10 ** (level - 1)
    upper = low + draws.below(9 * low)
    lower = low + draws.below(9 * low)
    return addition_problem(upper, lower, self.draw_letters(draws, level))

  def problem_of(self, prompt: str) -> Problem | None:
    """The sum that a prompt states; Task.problem_of."""
    if not _PROMPT.fullmatch(prompt):
      return None
    columns, upper, lower = prompt[:-1:3], prompt[1:-1:3], prompt[2:-1:3]
    letters = self.letters_from(columns)
    if letters is None or "0" in (upper[0], lower[0]):
      return None
    return addition_problem(int(upper), int(lower), letters)

  @staticmethod
  def column_pairs(problem: Problem) -> list[tuple[int, int]]:
    """Upper and lower digit of each column, lowest first."""
    upper, lower = map(str, problem.metadata["operands"])
    return [
      (int(u), int(v)) for u, v in zip(upper[::-1], lower[::-1], strict=True)
    ]

  @staticmethod
  def combine(upper: int, lower: int) -> int:
    """The column's sum."""
    return upper + lower


def addition_problem(upper: int, lower: int, letters: str) -> Problem:
  """Writes one sum as a problem.

  Args:
    upper: first operand, of k digits.
    lower: second operand, of k digits.
    letters: names of the k columns and of the last carry, lowest first.
  """
  level = len(letters) - 1
  columns = zip(letters[-2::-1], str(upper), str(lower), strict=True)
  total = f"{upper + lower:0{level + 1}d}"
  return Problem(
    task=ColumnAddition.name,
    prompt="".join(map("".join, columns)) + "?",
    answer="".join(map("".join, zip(letters[::-1], total, strict=True))),
    level=level,
    # The mirrored sum has the same steps with swapped digits.
    identity=f"{min(upper, lower)}+{max(upper, lower)}",
    metadata={"operands": [upper, lower], "letters": letters},
  )
