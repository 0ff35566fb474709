"""Countdown: reach a target from given numbers, `3,7,25=46?`.

The answer is an expression that uses every number exactly once; any right
one passes. The worked solution tries and discards, as a reasoner would:

  7+3=10;25+10=35|7*3=21;25+21=46     answer 25+(7*3)

Attempts are parted by `|`, steps by `;`; a step takes two numbers at hand
and puts back its result. Level = how many numbers. Problems are made
backwards, from a random way of combining them, so all have a solution, with
results from 1 to `max_value` throughout. Targets that signs alone can reach
are drawn again: without that, adding everything is right for one problem in
five at level 3. One fixed recipe such as "the two smallest multiplied, plus
the third" still pays up to 15% at level 3 and 8% at level 4; from level 5 on
a random combination pays below 2%.
"""

import dataclasses
import re
from collections.abc import Sequence

from rlm.tasks.base import Problem, Solution, Task, TaskConfig, check_share
from rlm.tasks.draws import Draws, RandomSource
from rlm.tasks.expressions import evaluate

# Two numbers leave one sum or product to guess.
_LEVELS = (3, 4, 5, 6)
_OPERATIONS = "+-*/"
_MAX_VALUE = 10**6 - 1
_MAX_TRIES = 1000
_MAX_THINKING_CHARS = 10_000
_PROMPT = re.compile(r"[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*=[1-9][0-9]{0,5}\?")
_STEP = re.compile(r"([0-9]{1,6})([-+*/])([0-9]{1,6})=([0-9]{1,6})", re.ASCII)

# a, operation, b, result; lists, as JSON gives them back.
_Step = list


@dataclasses.dataclass(frozen=True)
class CountdownConfig(TaskConfig):
  """Config section of countdown.

  Attributes:
    operations: which of "+-*/" may be used, at least two and one of them
      "*" or "/", such as "+-*".
    max_number: the numbers are drawn from 1 to this.
    max_value: largest target and intermediate result.
    max_attempts: a worked solution shows up to this many failed attempts
      before the right one.
    settle: share of authors who give up and answer with an attempt that
      misses the target.
    slip: probability that a step is written with another operation than the
      one meant, beside the result that was meant.
  """

  operations: str
  max_number: int
  max_value: int
  max_attempts: int
  settle: float
  slip: float

  def __post_init__(self):
    super().__post_init__()
    check_share("settle", self.settle)
    check_share("slip", self.slip)
    chosen = set(self.operations)
    if (
      len(chosen) < 2
      or not chosen & set("*/")
      or not chosen <= set(_OPERATIONS)
      or len(chosen) != len(self.operations)
    ):
      raise ValueError(
        f"operations is {self.operations!r}, but must name two or more of"
        f" {_OPERATIONS!r}, each once and '*' or '/' among them, such as"
        " '+-*'."
      )
    if not 2 <= self.max_number <= self.max_value <= _MAX_VALUE:
      raise ValueError(
        f"max_number is {self.max_number} and max_value {self.max_value}, but"
        f" 2 <= max_number <= max_value <= {_MAX_VALUE} is needed."
      )
    if self.max_attempts < 0:
      raise ValueError(
        f"max_attempts is {self.max_attempts}, but cannot be negative. 0"
        " shows the right attempt alone."
      )


class Countdown(Task):
  """Expressions over given numbers; level = how many numbers, 3 to 6."""

  name = "countdown"
  config_class = CountdownConfig
  levels = _LEVELS

  def __init__(self, cfg: CountdownConfig):
    super().__init__(cfg)
    self._cfg = cfg

  def draw(self, draws: Draws, level: int) -> Problem:
    """The numbers, and the target as where a random way of using them ends.

    Raises:
      ValueError: 1000 tries gave no problem within the config's limits.
    """
    for _ in range(_MAX_TRIES):
      numbers = [1 + draws.below(self._cfg.max_number) for _ in range(level)]
      steps = self._draw_steps(draws, numbers)
      if steps is not None and not _is_signed_sum(numbers, steps[-1][3]):
        return countdown_problem(numbers, steps)
    raise ValueError(
      f"{_MAX_TRIES} tries found no problem of {level} numbers up to"
      f" max_number={self._cfg.max_number} with results up to"
      f" max_value={self._cfg.max_value} that signs alone do not solve."
      " Raise max_value or allow more operations."
    )

  def problem_of(self, prompt: str) -> Problem | None:
    """The numbers and target of a prompt; Task.problem_of.

    Whether any expression reaches the target is left open.
    """
    if not _PROMPT.fullmatch(prompt):
      return None
    shown, _, target = prompt[:-1].partition("=")
    numbers = [int(number) for number in shown.split(",")]
    if (
      len(numbers) not in self.levels
      or max(numbers) > self._cfg.max_number
      or int(target) > self._cfg.max_value
    ):
      return None
    return _make_problem(numbers, int(target), answer="", steps=[])

  def worked_solution(self, problem: Problem) -> Solution:
    """Some failed attempts and the right one; Task.worked_solution."""
    attempts = [*self._failed_attempts(problem), problem.metadata["steps"]]
    thinking = "|".join(_write_steps(steps) for steps in attempts)
    return Solution(thinking, problem.answer)

  def authored_solution(self, problem: Problem, rng: RandomSource) -> Solution:
    """By an author who may settle or slip; Task.authored_solution."""
    attempts = self._failed_attempts(problem)
    settles = rng.random() < self._cfg.settle
    if settles and not attempts:
      attempts = self._misses(problem, 1)
    if not settles or not attempts:
      attempts.append(problem.metadata["steps"])
    attempts = [
      [self._slip_step(step, rng) for step in steps] for steps in attempts
    ]
    return Solution(
      "|".join(_write_steps(steps) for steps in attempts),
      write_expression(problem.metadata["numbers"], attempts[-1]),
    )

  def verify(self, problem: Problem, answer: str) -> bool:
    """Any expression over exactly the numbers that equals the target."""
    evaluated = evaluate(answer)
    if evaluated is None:
      return False
    value, numbers = evaluated
    return value == problem.metadata["target"] and sorted(numbers) == sorted(
      problem.metadata["numbers"]
    )

  def check_steps(self, problem: Problem, thinking: str) -> bool:
    """Every step right and of numbers at hand; only the last attempt hits.

    A failed attempt may be broken off early.
    """
    if len(thinking) > _MAX_THINKING_CHARS:
      return False
    *failed, last = (
      _replay(problem.metadata["numbers"], attempt)
      for attempt in thinking.strip().split("|")
    )
    target = [problem.metadata["target"]]
    return last == target and all(
      left is not None and left != target for left in failed
    )

  def _failed_attempts(self, problem: Problem) -> list[list[_Step]]:
    """The attempts that the worked solution discards; fixed by the prompt."""
    count = Draws("countdown tries", problem.prompt).below(
      self._cfg.max_attempts + 1
    )
    return self._misses(problem, count)

  def _misses(self, problem: Problem, count: int) -> list[list[_Step]]:
    """Up to `count` ways of combining that miss, fixed by the prompt.

    Fewer where almost every way hits the target, as for 1,1,1.
    """
    draws = Draws("countdown misses", problem.prompt)
    misses: list[list[_Step]] = []
    for _ in range(10 * count):
      steps = self._draw_steps(draws, problem.metadata["numbers"])
      if steps is None or steps[-1][3] == problem.metadata["target"]:
        continue
      misses.append(steps)
      if len(misses) == count:
        break
    return misses

  def _draw_steps(
    self, draws: Draws, numbers: Sequence[int]
  ) -> list[_Step] | None:
    """A random way of combining all numbers; None at a dead end."""
    at_hand = list(numbers)
    steps: list[_Step] = []
    while len(at_hand) > 1:
      a = at_hand.pop(draws.below(len(at_hand)))
      b = at_hand.pop(draws.below(len(at_hand)))
      a, b = max(a, b), min(a, b)
      options = [
        (operation, result)
        for operation in self._cfg.operations
        if (result := _apply(a, operation, b)) is not None
        and 0 < result <= self._cfg.max_value
        # Times or divided by one changes nothing: no step at all.
        and (b > 1 or operation in "+-")
      ]
      if not options:
        return None
      operation, result = options[draws.below(len(options))]
      steps.append([a, operation, b, result])
      at_hand.append(result)
    return steps

  def _slip_step(self, step: _Step, rng: RandomSource) -> _Step:
    """The step, perhaps with a wrong operation beside the meant result."""
    if rng.random() >= self._cfg.slip:
      return step
    a, meant, b, result = step
    others = self._cfg.operations.replace(meant, "")
    return [a, others[int(rng.random() * len(others))], b, result]


def countdown_problem(numbers: list[int], steps: list[_Step]) -> Problem:
  """Writes one problem.

  Args:
    numbers: the numbers to use, in the order in which they are shown.
    steps: [a, operation, b, result] for each step of one solution; the last
      result is the target.
  """
  answer = write_expression(numbers, steps)
  return _make_problem(numbers, steps[-1][3], answer, steps)


def _make_problem(
  numbers: list[int], target: int, answer: str, steps: list[_Step]
) -> Problem:
  shown = ",".join(map(str, numbers))
  return Problem(
    task=Countdown.name,
    prompt=f"{shown}={target}?",
    answer=answer,
    level=len(numbers),
    identity=f"{','.join(map(str, sorted(numbers)))}={target}",
    metadata={"numbers": numbers, "target": target, "steps": steps},
  )


def write_expression(numbers: Sequence[int], steps: list[_Step]) -> str:
  """The steps as one expression, `25+(7*3)`."""
  at_hand = [(number, str(number)) for number in numbers]
  written = ""
  for a, operation, b, result in steps:
    left, right = (_take(at_hand, value) for value in (a, b))
    written = f"{left}{operation}{right}"
    at_hand.append((result, f"({written})"))
  return written


def _is_signed_sum(numbers: Sequence[int], target: int) -> bool:
  """Whether some signs before the numbers make them add up to `target`."""
  # Turning the signs of a subset takes twice its sum off the total.
  twice = sum(numbers) - target
  if twice < 0 or twice % 2:
    return False
  subset_sums = 1  # bit i: some subset sums to i
  for number in numbers:
    subset_sums |= subset_sums << number
  return bool(subset_sums >> twice // 2 & 1)


def _take(at_hand: list[tuple[int, str]], value: int) -> str:
  """Removes the first entry of this value and returns its text."""
  for i, (number, _) in enumerate(at_hand):
    if number == value:
      return at_hand.pop(i)[1]
  raise AssertionError(f"{value} is not at hand among {at_hand}")


def _write_steps(steps: list[_Step]) -> str:
  return ";".join(f"{a}{op}{b}={result}" for a, op, b, result in steps)


def _apply(a: int, operation: str, b: int) -> int | None:
  """A operation b; None for a division with a remainder."""
  if operation == "+":
    return a + b
  if operation == "-":
    return a - b
  if operation == "*":
    return a * b
  return a // b if b and a % b == 0 else None


def _replay(numbers: Sequence[int], attempt: str) -> list[int] | None:
  """What is left after an attempt's steps; None if one of them is wrong."""
  at_hand = list(numbers)
  for step in attempt.split(";"):
    match = _STEP.fullmatch(step)
    if match is None:
      return None
    a, b, result = (int(match[i]) for i in (1, 3, 4))
    for number in (a, b):
      if number not in at_hand:
        return None
      at_hand.remove(number)
    if _apply(a, match[2], b) != result:
      return None
    at_hand.append(result)
  return at_hand
