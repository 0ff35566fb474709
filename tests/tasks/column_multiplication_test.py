from rlm.tasks.column_multiplication import (
  ColumnMultiplication,
  multiplication_problem,
)
from rlm.tasks.columns import ColumnConfig
from rlm.tasks.draws import Draws

EXAMPLE = multiplication_problem(8577, 6, "bcdef")


def make(forget_carry=0.0, slip=0.0):
  return ColumnMultiplication(
    ColumnConfig("column_multiplication", 0.1, "abcdefgh", forget_carry, slip)
  )


def test_the_example_of_the_docstring():
  assert EXAMPLE.prompt == "e8d5c7b7*6?"
  assert EXAMPLE.answer == "f5e1d4c6b2"  # 8577 * 6 = 51462
  solution = make().worked_solution(EXAMPLE)
  assert solution.thinking == "b760=42c764=46d564=34e863=51"
  assert solution.answer == EXAMPLE.answer


def test_the_example_by_an_author_who_forgets_carries():
  solution = make(forget_carry=1.0).authored_solution(EXAMPLE, Draws(0))
  assert solution.thinking == "b760=42c760=42d560=30e860=48"
  assert solution.answer == "f4e8d0c2b2"


def test_the_largest_step_keeps_two_digits():
  problem = multiplication_problem(999, 9, "abcd")
  assert make().worked_solution(problem).thinking == "a990=81b998=89c998=89"
  task = make(slip=1.0)
  for i in range(50):
    thinking = task.authored_solution(problem, Draws(i)).thinking
    assert len(thinking) == 3 * 7
    assert thinking != "a990=81b998=89c998=89"


def test_numbers_have_full_width_and_multipliers_do_something():
  task = make()
  problems = [task.problem(0, i, 3, "train") for i in range(2000)]
  numbers, multipliers = zip(
    *(p.metadata["operands"] for p in problems), strict=True
  )
  assert min(numbers) >= 100 and max(numbers) <= 999
  assert set(multipliers) == set(range(2, 10))


def test_identity_ignores_letters():
  assert multiplication_problem(8577, 6, "cdefg").identity == EXAMPLE.identity


def test_a_prompt_tells_its_problem():
  task = make()
  for i in range(50):
    problem = task.problem(0, i, 2 + i % 5, "train")
    assert task.problem_of(problem.prompt) == problem
  for prompt in ("e8d5c7b7*1?", "e8d5c7b7?", "e0d5*6?", "e8c5*6?", "h8g5*6?"):
    assert task.problem_of(prompt) is None
