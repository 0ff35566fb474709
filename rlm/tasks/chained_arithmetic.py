"""Chains of operations from left to right, modulo M: `23+71-8?`.

Worked: `23+71=94;94-8=86`, answer `86` (M = 97). Every operation is taken as
it comes, as on a pocket calculator: there is no precedence. Level = number
of terms, each from 1 to M - 1. M is at least 53, and prime where there is
multiplication, so that no answer is right more often than 1 / (M - 1); with
a composite modulus 0 is over-represented, and RL collapses onto it.
"""

import dataclasses
import math
import re

from rlm.tasks.base import (
  Problem,
  Solution,
  Task,
  TaskConfig,
  check_share,
  draw_slip,
)
from rlm.tasks.draws import Draws, RandomSource

_MAX_TERMS = 16
_MIN_MODULUS = 53  # guessing pays at most 1 / 52
_MAX_MODULUS = 10**6
_OPERATIONS = "+-*"
_OPERATION = re.compile(r"[-+*]")
_PROMPT = re.compile(r"[1-9][0-9]{0,5}([-+*][1-9][0-9]{0,5})+\?")


@dataclasses.dataclass(frozen=True)
class ChainedArithmeticConfig(TaskConfig):
  """Config section of chained_arithmetic.

  Attributes:
    modulus: M; results are taken modulo M, into 0 .. M - 1.
    operations: which of "+-*" may occur, each once, such as "+-".
    misread_minus: share of authors who read every minus as a plus.
    slip: probability that a step's result is off by one, modulo M.
  """

  modulus: int
  operations: str
  misread_minus: float
  slip: float

  def __post_init__(self):
    super().__post_init__()
    check_share("misread_minus", self.misread_minus)
    check_share("slip", self.slip)
    if not _MIN_MODULUS <= self.modulus <= _MAX_MODULUS:
      raise ValueError(
        f"modulus is {self.modulus}, but must lie in"
        f" [{_MIN_MODULUS}, {_MAX_MODULUS}]: below it guessing pays 2%."
      )
    chosen = set(self.operations)
    if (
      not chosen
      or not chosen <= set(_OPERATIONS)
      or len(chosen) != len(self.operations)
    ):
      raise ValueError(
        f"operations is {self.operations!r}, but must name one or more"
        f" of {_OPERATIONS!r}, each once, such as '+-'."
      )
    if "*" in chosen and not _is_prime(self.modulus):
      raise ValueError(
        f"modulus is {self.modulus}, but must be prime where"
        " operations has '*': else the answer 0 is too frequent. 97 and"
        " 101 are prime."
      )


class ChainedArithmetic(Task):
  """Left-to-right chains modulo M; level = number of terms, 2 to 16."""

  name = "chained_arithmetic"
  config_class = ChainedArithmeticConfig
  levels = tuple(range(2, _MAX_TERMS + 1))

  def __init__(self, cfg: ChainedArithmeticConfig):
    super().__init__(cfg)
    self._cfg = cfg

  def draw(self, draws: Draws, level: int) -> Problem:
    """Terms and operations, all uniform."""
    modulus, operations = self._cfg.modulus, self._cfg.operations
    terms = [1 + draws.below(modulus - 1) for _ in range(level)]
    chain = "".join(
      operations[draws.below(len(operations))] for _ in range(level - 1)
    )
    return chain_problem(terms, chain, modulus)

  def problem_of(self, prompt: str) -> Problem | None:
    """The chain that a prompt states; Task.problem_of."""
    if not _PROMPT.fullmatch(prompt):
      return None
    terms = [int(term) for term in _OPERATION.split(prompt[:-1])]
    operations = "".join(_OPERATION.findall(prompt))
    if (
      not set(operations) <= set(self._cfg.operations)
      or not 0 < min(terms) <= max(terms) < self._cfg.modulus
      or len(terms) not in self.levels
    ):
      return None
    return chain_problem(terms, operations, self._cfg.modulus)

  def worked_solution(self, problem: Problem) -> Solution:
    """The right steps and answer; Task.worked_solution."""
    return _solve(problem, False, 0.0, None)

  def authored_solution(self, problem: Problem, rng: RandomSource) -> Solution:
    """By an author who may misread minus or slip; Task.authored_solution.

    Who misreads writes the plus that he read; a slip is carried on.
    """
    misreads = rng.random() < self._cfg.misread_minus
    return _solve(problem, misreads, self._cfg.slip, rng)

  def verify(self, problem: Problem, answer: str) -> bool:
    """The number in plain digits, nothing else; Task.verify."""
    return answer.strip() == problem.answer

  def check_steps(self, problem: Problem, thinking: str) -> bool:
    """The notation leaves one right way to write the steps."""
    return thinking.strip() == self.worked_solution(problem).thinking


def chain_problem(terms: list[int], operations: str, modulus: int) -> Problem:
  """Writes one chain as a problem.

  Args:
    terms: at least two, each in 1 .. modulus - 1.
    operations: one of "+-*" between each two neighbours.
    modulus: M.
  """
  value = terms[0]
  chain = str(value)
  for operation, term in zip(operations, terms[1:], strict=True):
    value = _apply(value, operation, term) % modulus
    chain += f"{operation}{term}"
  return Problem(
    task=ChainedArithmetic.name,
    prompt=chain + "?",
    answer=str(value),
    level=len(terms),
    identity=f"{chain} mod {modulus}",
    metadata={"terms": terms, "operations": operations, "modulus": modulus},
  )


def _apply(value: int, operation: str, term: int) -> int:
  if operation == "+":
    return value + term
  if operation == "-":
    return value - term
  return value * term


def _solve(
  problem: Problem, misreads: bool, slip: float, rng: RandomSource | None
) -> Solution:
  """Works the chain; `rng` is None for the right solution."""
  modulus = problem.metadata["modulus"]
  value, *terms = problem.metadata["terms"]
  steps = []
  for operation, term in zip(
    problem.metadata["operations"], terms, strict=True
  ):
    if misreads and operation == "-":
      operation = "+"
    result = _apply(value, operation, term)
    if rng is not None:
      result += draw_slip(rng, slip)
    result %= modulus
    steps.append(f"{value}{operation}{term}={result}")
    value = result
  return Solution(";".join(steps), str(value))


def _is_prime(n: int) -> bool:
  return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
