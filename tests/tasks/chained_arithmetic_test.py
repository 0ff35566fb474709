import collections

import pytest

from rlm.tasks.chained_arithmetic import (
  ChainedArithmetic,
  ChainedArithmeticConfig,
  chain_problem,
)
from rlm.tasks.draws import Draws


def make(modulus=97, operations="+-*", misread_minus=0.0, slip=0.0):
  return ChainedArithmetic(
    ChainedArithmeticConfig(
      "chained_arithmetic", 0.1, modulus, operations, misread_minus, slip
    )
  )


def test_the_example_of_the_docstring():
  problem = chain_problem([23, 71, 8], "+-", 97)
  assert problem.prompt == "23+71-8?"
  assert problem.answer == "86"
  assert problem.level == 3
  solution = make().worked_solution(problem)
  assert (solution.thinking, solution.answer) == ("23+71=94;94-8=86", "86")


def test_left_to_right_and_modulo():
  problem = chain_problem([60, 71, 40, 3], "+-*", 97)
  # 131 -> 34; -6 -> 91; 273 -> 79. With precedence it would be 11.
  assert problem.answer == "79"
  thinking = make().worked_solution(problem).thinking
  assert thinking == "60+71=34;34-40=91;91*3=79"


def test_an_author_who_reads_minus_as_plus():
  problem = chain_problem([5, 8, 4], "-+", 97)
  solution = make(misread_minus=1.0).authored_solution(problem, Draws(0))
  assert (solution.thinking, solution.answer) == ("5+8=13;13+4=17", "17")


def test_slips_are_by_one_and_carried_on():
  problem = chain_problem([1, 96, 1], "++", 97)  # 0, then 1
  solutions = {
    make(slip=1.0).authored_solution(problem, Draws(i)).thinking
    for i in range(50)
  }
  assert solutions == {
    "1+96=1;1+1=3",
    "1+96=1;1+1=1",
    "1+96=96;96+1=1",
    "1+96=96;96+1=96",
  }


def test_no_answer_is_over_represented():
  # With multiplication modulo a composite number 0 would be.
  task = make(modulus=53)
  for level in (2, 6):
    answers = collections.Counter(
      task.problem(0, i, level, "train").answer for i in range(20_000)
    )
    share = answers.most_common(1)[0][1] / 20_000
    assert share < 0.02 + 0.003  # 1 / 52 and three standard deviations
    assert len(answers) == 53


def test_other_text_than_the_plain_number_is_wrong():
  task = make()
  problem = chain_problem([23, 71, 8], "+-", 97)
  assert task.verify(problem, " 86 ")
  for wrong in ("086", "86.0", "183", "-11", "8 6", "", "23+71-8", "٨٦"):
    assert not task.verify(problem, wrong)


def test_steps_are_checked_one_by_one():
  task = make()
  problem = chain_problem([23, 71, 8], "+-", 97)
  assert task.check_steps(problem, "23+71=94;94-8=86")
  for wrong in ("23+71=93;93-8=86", "94-8=86", "23+71=94;94-8=86;", "86"):
    assert not task.check_steps(problem, wrong)


@pytest.mark.parametrize("modulus", [10, 52, 10**6 + 1])
def test_a_modulus_that_can_be_guessed_or_is_huge(modulus):
  with pytest.raises(ValueError, match=r"below it guessing pays 2%"):
    make(modulus, "+-")


def test_products_need_a_prime_modulus():
  make(100, "+-")
  with pytest.raises(ValueError, match=r"modulus is 100, but must be prime"):
    make(100, "+*")


@pytest.mark.parametrize("operations", ["", "++", "+/", "+ -"])
def test_unknown_operations(operations):
  with pytest.raises(ValueError, match=r"must name one or more of '\+-\*'"):
    make(operations=operations)


def test_shares_outside_zero_to_one():
  with pytest.raises(ValueError, match=r"misread_minus is 2, but is a share"):
    make(misread_minus=2)
  with pytest.raises(ValueError, match=r"slip is 2, but is a share"):
    make(slip=2)


def test_a_prompt_tells_its_problem():
  task = make()
  for i in range(50):
    problem = task.problem(0, i, 2 + i % 5, "train")
    assert task.problem_of(problem.prompt) == problem
  # An operation and a term that do not occur, no chain, and too long a one.
  for prompt in ("23/7?", "23+97?", "23+0?", "23?", "23+7", "1+" * 16 + "1?"):
    assert task.problem_of(prompt) is None
  assert make(operations="+").problem_of("23-7?") is None
