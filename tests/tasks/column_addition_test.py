import collections

import numpy as np
import pytest

from rlm.tasks.column_addition import ColumnAddition, addition_problem
from rlm.tasks.columns import ColumnConfig
from rlm.tasks.draws import Draws

EXAMPLE = addition_problem(8577, 9117, "bcdef")


def make(letters="abcdefghijkl", forget_carry=0.0, slip=0.0):
  return ColumnAddition(
    ColumnConfig("column_addition", 0.1, letters, forget_carry, slip)
  )


def test_the_example_of_the_recipe():
  assert EXAMPLE.prompt == "e89d51c71b77?"
  assert EXAMPLE.answer == "f1e7d6c9b4"  # 8577 + 9117 = 17694
  assert EXAMPLE.level == 4
  solution = make().worked_solution(EXAMPLE)
  assert solution.thinking == "b770=14c711=09d510=06e890=17"
  assert solution.answer == "f1e7d6c9b4"


def test_the_example_by_an_author_who_forgets_carries():
  task = make(forget_carry=1.0)
  solution = task.authored_solution(EXAMPLE, Draws(0))
  # Only column c had a carry coming in; the last carry is a digit he sees.
  assert solution.thinking == "b770=14c710=08d510=06e890=17"
  assert solution.answer == "f1e7d6c8b4"
  assert not task.verify(EXAMPLE, solution.answer)
  assert not task.check_steps(EXAMPLE, solution.thinking)


class Always:
  """A source whose draws are given."""

  def __init__(self, *values):
    self.values = list(values)

  def random(self):
    return self.values.pop(0)


def test_a_slip_is_carried_on():
  task = make(slip=0.5)
  # Author remembers; slips at b by -1 (77 -> 13), not at c, d; at e by +1.
  rng = Always(0.9, 0.1, 0.9, 0.9, 0.9, 0.1, 0.1)
  solution = task.authored_solution(EXAMPLE, rng)
  assert solution.thinking == "b770=13c711=09d510=06e890=18"
  assert solution.answer == "f1e8d6c9b3"


def test_slips_stay_inside_the_notation():
  task = make(slip=0.5)
  lowest = addition_problem(10, 10, "abc")
  solution = task.authored_solution(lowest, Always(0.9, 0.1, 0.9, 0.9))
  assert solution.thinking == "a000=01b110=02"  # -1 would be below zero
  highest = addition_problem(99, 99, "abc")
  solution = task.authored_solution(highest, Always(0.9, 0.9, 0.1, 0.1))
  assert solution.thinking == "a990=18b991=18"  # 20 would need two carries


def test_the_last_carry_is_written_even_if_zero():
  problem = addition_problem(12, 34, "xyz")
  assert problem.prompt == "y13x24?"
  assert problem.answer == "z0y4x6"


def test_authors_err_as_often_as_the_recipe_says():
  # Half forget carries and steps slip at .02: 25% at k = 2, 50% at k = 5.
  task = make(forget_carry=0.5, slip=0.02)
  for level, expected in ((2, 0.25), (5, 0.50)):
    wrong = 0
    for i in range(4000):
      problem = task.problem(0, i, level, "train")
      solution = task.authored_solution(problem, Draws("author", i))
      wrong += not task.verify(problem, solution.answer)
    assert abs(wrong / 4000 - expected) < 0.03  # four standard deviations


def test_operands_have_full_width_and_letters_every_offset():
  task = make("abcdef")
  offsets = collections.Counter()
  digits = [collections.Counter(), collections.Counter()]
  for i in range(3000):
    problem = task.problem(1, i, 3, "train")
    for operand in problem.metadata["operands"]:
      assert 100 <= operand <= 999
      digits[0][operand // 100] += 1
      digits[1][operand % 10] += 1
    offsets[problem.metadata["letters"]] += 1
  assert set(offsets) == {"abcd", "bcde", "cdef"}
  assert min(offsets.values()) > 850
  assert set(digits[0]) == set(range(1, 10))
  assert set(digits[1]) == set(range(10))


def test_identity_ignores_letters_and_order():
  other = addition_problem(9117, 8577, "ghijk")
  assert other.prompt != EXAMPLE.prompt
  assert other.identity == EXAMPLE.identity
  assert addition_problem(8577, 9118, "bcdef").identity != EXAMPLE.identity


def test_another_notation_of_the_right_sum_is_wrong():
  task = make()
  assert task.verify(EXAMPLE, " f1e7d6c9b4\n")
  for wrong in ("17694", "f1e7d6c9b5", "f1e7d6c9", "", "g1f7e6d9c4"):
    assert not task.verify(EXAMPLE, wrong)


def test_one_wrong_step_fails_the_check_although_the_answer_is_right():
  task = make()
  assert not task.check_steps(EXAMPLE, "b770=14c710=09d510=06e890=17")
  assert not task.check_steps(EXAMPLE, "b770=14c711=09d510=06")
  assert not task.check_steps(EXAMPLE, "")


def test_levels_follow_from_the_letters():
  assert make("abc").levels == (2,)
  assert make("abcdefghi").levels == tuple(range(2, 9))


def test_numpy_generators_can_be_authors():
  task = make(forget_carry=0.5, slip=0.1)
  one, two = (
    [task.authored_solution(EXAMPLE, rng) for _ in range(50)]
    for rng in (np.random.default_rng(3), np.random.default_rng(3))
  )
  assert one == two
  assert len(set(one)) > 5


@pytest.mark.parametrize("letters", ["ab", "aab", "ab1", "abé", ""])
def test_bad_letters(letters):
  with pytest.raises(ValueError, match="at least 3 different letters"):
    make(letters)


def test_shares_outside_zero_to_one():
  with pytest.raises(ValueError, match=r"forget_carry is 1.5, but is a share"):
    make(forget_carry=1.5)
  with pytest.raises(ValueError, match=r"slip is -0.1, but is a share"):
    make(slip=-0.1)


def test_a_prompt_tells_its_problem():
  task = make()
  for i in range(50):
    problem = task.problem(0, i, 2 + i % 5, "train")
    assert task.problem_of(problem.prompt) == problem
  assert task.problem_of("e89d51c71b77?") == EXAMPLE
  for prompt in (
    "e89d51c71b77",  # no question
    "e89d51c71b77? ",
    "e89d51c71a77?",  # columns that are no neighbours
    "b77c71d51e89?",
    "e09d51c71b77?",  # a leading zero
    "b77?",  # one column
    "l89k51?",  # no letter left for the carry
    "x89w51?",
    "",
  ):
    assert task.problem_of(prompt) is None
