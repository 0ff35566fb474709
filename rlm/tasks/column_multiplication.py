"""Multiplication by one digit in column notation: `e8d5c7b7*6?`.

Per column, highest first: its letter and digit; then the multiplier. A step
has the digit, the multiplier, the carry in and the two-digit result:
`b760=42c764=46d564=34e863=51`, answer `f5e1d4c6b2` (8577 * 6 = 51462).

Level k has k digits without leading zeros and multipliers 2 to 9, so
72 * 10**(k-1) problems: 720 at k = 2, 7,200 at k = 3. Claim nothing
about memorising below k = 4.
"""

import re

from rlm.tasks.base import Problem
from rlm.tasks.columns import ColumnTask
from rlm.tasks.draws import Draws

_PROMPT = re.compile(r"([a-zA-Z][0-9])+\*[2-9]\?")


class ColumnMultiplication(ColumnTask):
  """Products of a k-digit number and one digit."""

  name = "column_multiplication"
  max_result = 89  # 9 * 9 and a carry of 8

  def draw(self, draws: Draws, level: int) -> Problem:
    """The number, the multiplier, then the place in the alphabet."""
    low = 10 ** (level - 1)
    number = low + draws.below(9 * low)
    multiplier = 2 + draws.below(8)
    letters = self.draw_letters(draws, level)
    return multiplication_problem(number, multiplier, letters)

  def problem_of(self, prompt: str) -> Problem | None:
    """The product that a prompt states; Task.problem_of."""
    if not _PROMPT.fullmatch(prompt):
      return None
    columns, number = prompt[:-3:2], prompt[1:-3:2]
    letters = self.letters_from(columns)
    if letters is None or number[0] == "0":
      return None
    return multiplication_problem(int(number), int(prompt[-2]), letters)

  @staticmethod
  def column_pairs(problem: Problem) -> list[tuple[int, int]]:
    """Digit and multiplier of each column, lowest first."""
    number, multiplier = problem.metadata["operands"]
    return [(int(digit), multiplier) for digit in str(number)[::-1]]

  @staticmethod
  def combine(upper: int, lower: int) -> int:
    """The column's product."""
    return upper * lower


def multiplication_problem(
  number: int, multiplier: int, letters: str
) -> Problem:
  """Writes one product as a problem.

  Args:
    number: of k digits.
    multiplier: one digit.
    letters: names of the k columns and of the last carry, lowest first.
  """
  level = len(letters) - 1
  columns = zip(letters[-2::-1], str(number), strict=True)
  total = f"{number * multiplier:0{level + 1}d}"
  return Problem(
    task=ColumnMultiplication.name,
    prompt="".join(map("".join, columns)) + f"*{multiplier}?",
    answer="".join(map("".join, zip(letters[::-1], total, strict=True))),
    level=level,
    identity=f"{number}*{multiplier}",
    metadata={"operands": [number, multiplier], "letters": letters},
  )
