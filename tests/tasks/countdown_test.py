import itertools
import json
import re

import pytest

from rlm.tasks.countdown import (
  Countdown,
  CountdownConfig,
  countdown_problem,
)
from rlm.tasks.draws import Draws
from rlm.tasks.expressions import evaluate

EXAMPLE = countdown_problem([3, 7, 25], [[7, "*", 3, 21], [25, "+", 21, 46]])


def make(**changes):
  section = dict(
    name="countdown",
    heldout_fraction=0.1,
    operations="+-*",
    max_number=20,
    max_value=100,
    max_attempts=2,
    settle=0.0,
    slip=0.0,
  )
  return Countdown(CountdownConfig(**{**section, **changes}))


def test_the_example_of_the_docstring():
  assert EXAMPLE.prompt == "3,7,25=46?"
  assert EXAMPLE.answer == "25+(7*3)"
  assert EXAMPLE.level == 3
  solution = make(max_attempts=0).worked_solution(EXAMPLE)
  assert solution.thinking == "7*3=21;25+21=46"
  assert solution.answer == "25+(7*3)"


def test_any_right_expression_passes():
  task = make()
  for right in ("25+7*3", "3*7+25", "(25)+((3*7))", " 25 + 3 * 7 "):
    assert task.verify(EXAMPLE, right)


@pytest.mark.parametrize(
  "wrong",
  [
    "46",
    "25+21",
    "25+7+3",  # wrong value
    "25+7*3+3-3",  # a number too often
    "25+7*3*1",  # a number that is not given
    "3*7+20+5",
    "25+7*3=46",
    "025+7*3+0",
    "",
    "46*25/25+0*7*3",
  ],
)
def test_other_answers_fail(wrong):
  assert not make().verify(EXAMPLE, wrong)


@pytest.mark.parametrize(
  "right",
  [
    "7*3=21;25+21=46",
    "3*7=21;21+25=46",
    "7+3=10;25+10=35|7*3=21;25+21=46",
    "25-7=18|7*3=21;25+21=46",  # broken off early
    " 7*3=21;25+21=46\n",
  ],
)
def test_right_steps(right):
  assert make().check_steps(EXAMPLE, right)


@pytest.mark.parametrize(
  "wrong",
  [
    "",
    "46",
    "7*3=20;25+20=45",
    "7*3=20;25+21=46",  # 21 is not at hand
    "7*3=21;25+21=46;46+3=49",
    "7*3=21;7+25=32",  # 7 is used up
    "25+21=46",
    "7+3=10;25+10=35",  # misses
    "7*3=21;25+21=46|7+3=10;25+10=35",  # right, then discarded
    "7*3=21;25+21=46|7*3=21;25+21=46",
    "7+3=11|7*3=21;25+21=46",  # wrong in a failed attempt
    "|7*3=21;25+21=46",
    "7*3=21;;25+21=46",
    "7*3=21;25+21=46;",
    "25/7=3;3*3=9",  # division with a remainder
    "9" * 100_000,
    "7*3=21;" * 100_000,
    "|" * 100_000,
  ],
)
def test_wrong_steps(wrong):
  assert not make().check_steps(EXAMPLE, wrong)


def test_worked_solutions_show_failed_attempts():
  task = make(max_attempts=3)
  seen = set()
  for i in range(300):
    problem = task.problem(0, i, 4, "train")
    solution = task.worked_solution(problem)
    assert task.check_steps(problem, solution.thinking)
    seen.add(solution.thinking.count("|"))
  assert seen == {0, 1, 2, 3}


def test_authors_who_settle_answer_with_a_miss():
  task = make(settle=1.0, max_attempts=0)
  for i in range(200):
    problem = task.problem(0, i, 4, "train")
    solution = task.authored_solution(problem, Draws(i))
    assert not task.verify(problem, solution.answer)
    value, numbers = evaluate(solution.answer)
    assert value != problem.metadata["target"]
    assert sorted(numbers) == sorted(problem.metadata["numbers"])


def test_slips_write_another_operation_beside_the_meant_result():
  task = make(slip=1.0, operations="+*", max_attempts=0)
  solution = task.authored_solution(EXAMPLE, Draws(0))
  assert solution.thinking == "7+3=21;25*21=46"
  assert solution.answer == "25*(7+3)"


def test_results_stay_within_the_limits():
  task = make(operations="+-*/", max_value=60, max_number=12)
  for level, i in itertools.product(task.levels, range(200)):
    problem = task.problem(0, i, level, "train")
    assert all(1 <= n <= 12 for n in problem.metadata["numbers"])
    for a, operation, b, result in problem.metadata["steps"]:
      assert 1 <= result <= 60
      assert b > 1 or operation in "+-"
      assert evaluate(f"{a}{operation}{b}")[0] == result


def test_signs_alone_never_reach_the_target():
  task = make()
  for level, i in itertools.product((3, 5), range(100)):
    problem = task.problem(0, i, level, "train")
    sums = {0}
    for n in problem.metadata["numbers"]:
      sums = {s + n for s in sums} | {s - n for s in sums}
    assert problem.metadata["target"] not in sums


def test_a_random_combination_rarely_hits_at_the_higher_levels():
  task = make()
  for level in (5, 6):
    hits = 0
    for i in range(1000):
      problem = task.problem(0, i, level, "train")
      guess = task.draw(Draws("guess", i), level)  # other numbers: a shape
      shape = re.sub("[0-9]+", "{}", guess.answer)
      hits += task.verify(problem, shape.format(*problem.metadata["numbers"]))
    assert hits / 1000 < 0.02


def test_identity_ignores_the_order_of_the_numbers():
  other = countdown_problem([25, 3, 7], [[3, "*", 7, 21], [25, "+", 21, 46]])
  assert other.identity == EXAMPLE.identity


def test_problems_survive_json():
  task = make()
  problem = task.problem(0, 0, 5, "train")
  assert json.loads(json.dumps(problem.metadata)) == problem.metadata


def test_impossible_limits_end_in_an_error():
  task = make(max_number=3, max_value=3, operations="+*")
  with pytest.raises(ValueError, match=r"found no problem of 6 numbers up to"):
    task.problem(0, 0, 6, "train")


@pytest.mark.parametrize("operations", ["+", "+-", "", "+%", "**"])
def test_unfit_operations(operations):
  with pytest.raises(ValueError, match=r"must name two or more of '\+-\*/'"):
    make(operations=operations)


def test_unfit_numbers():
  with pytest.raises(ValueError, match=r"2 <= max_number <= max_value"):
    make(max_number=1)
  with pytest.raises(ValueError, match=r"2 <= max_number <= max_value"):
    make(max_number=50, max_value=40)
  with pytest.raises(ValueError, match=r"max_attempts is -1"):
    make(max_attempts=-1)
  with pytest.raises(ValueError, match=r"settle is 1.1, but is a share"):
    make(settle=1.1)
  with pytest.raises(ValueError, match=r"slip is 1.1, but is a share"):
    make(slip=1.1)


def test_a_prompt_tells_numbers_and_target():
  task = make()
  for i in range(50):
    problem = task.problem(0, i, 3 + i % 4, "train")
    found = task.problem_of(problem.prompt)
    assert (found.prompt, found.level) == (problem.prompt, problem.level)
    assert found.identity == problem.identity
    assert found.answer == ""
    assert task.verify(found, problem.answer)
    assert not task.verify(found, problem.answer + "+1")
  # Two numbers, a number and a target beyond the limits, no target.
  for prompt in ("3,7=21?", "3,7,21=46?", "3,7,5=101?", "3,7,5?", "3,7,5=?"):
    assert task.problem_of(prompt) is None
