import hashlib

import pytest

from rlm.tasks.base import Problem, Solution, Task, TaskConfig, is_heldout


class Digits(Task):
  """A level k holds k problems; the smallest task one can make."""

  name = "digits"
  config_class = TaskConfig
  levels = (1, 10, 1000)

  def draw(self, draws, level):
    text = str(draws.below(level))
    return Problem(self.name, f"{text}?", text, level, text, {})

  def worked_solution(self, problem):
    return Solution("", problem.answer)

  def authored_solution(self, problem, rng):
    return self.worked_solution(problem)

  def verify(self, problem, answer):
    return answer == problem.answer

  def check_steps(self, problem, thinking):
    return not thinking


def make(fraction):
  return Digits(TaskConfig(name="digits", heldout_fraction=fraction))


def test_held_out_is_the_published_hash_rule():
  digest = hashlib.sha256(b"column_addition\n8577+9117").hexdigest()
  bucket = int(digest, 16) % 10_000
  above, below = (bucket + 1) / 10_000, bucket / 10_000
  assert is_heldout("column_addition", "8577+9117", above)
  assert not is_heldout("column_addition", "8577+9117", below)


def test_the_split_depends_on_the_task_and_keeps_its_share():
  names = [str(i) for i in range(5000)]
  a = [is_heldout("a", name, 0.2) for name in names]
  b = [is_heldout("b", name, 0.2) for name in names]
  assert a != b
  assert 0.18 < sum(a) / len(a) < 0.22


def test_splits_are_disjoint_and_together_complete():
  task = make(0.3)
  train, heldout = (
    {
      task.problem(s, i, 10, split).identity
      for s in range(3)
      for i in range(99)
    }
    for split in ("train", "heldout")
  )
  assert train and heldout
  assert not train & heldout
  assert train | heldout == set("0123456789")


def test_a_larger_fraction_holds_out_a_superset():
  # Raising the fraction later never moves a held-out problem into training.
  few, many = make(0.1), make(0.4)
  for i in range(500):
    problem = few.problem(0, i, 1000, "heldout")
    assert many.is_heldout(problem)


def test_problem_is_pure_in_its_arguments():
  one, two = make(0.3), make(0.3)
  forwards = [one.problem(5, i, 1000, "train") for i in range(50)]
  backwards = [two.problem(5, i, 1000, "train") for i in reversed(range(50))]
  assert forwards == backwards[::-1]
  assert forwards != [one.problem(6, i, 1000, "train") for i in range(50)]


def test_a_level_without_problems_of_the_split_says_so():
  task = make(0.1)
  empty = "train" if task.is_heldout(task.draw(_Zero(), 1)) else "heldout"
  with pytest.raises(
    ValueError, match=rf"digits at level 1 .* '{empty}' split"
  ):
    task.problem(0, 0, 1, empty)


class _Zero:
  def below(self, n):
    return 0


def test_distinct_problems_differ_and_exhaust_the_split():
  task = make(0.3)
  count = sum(is_heldout("digits", str(i), 0.3) for i in range(10))
  problems = task.distinct_problems(0, count, 10, "heldout")
  assert len({p.identity for p in problems}) == len(problems) == count
  # The stream's own order: fewer are the beginning of more.
  assert task.distinct_problems(0, count - 1, 10, "heldout") == problems[:-1]
  with pytest.raises(ValueError, match=f"seems to hold {count}. Ask for fewer"):
    task.distinct_problems(0, count + 1, 10, "heldout")


def test_unknown_level_and_split():
  task = make(0.1)
  with pytest.raises(ValueError, match=r"asks digits for level 7, but it has"):
    task.problem(0, 0, 7, "train")
  with pytest.raises(ValueError, match=r"config.rl asks .* levels 1, 10, 1000"):
    task.check_levels((1, 11), "config.rl")
  with pytest.raises(ValueError, match=r"split is 'test', but must be one of"):
    task.problem(0, 0, 10, "test")


def test_held_out_problems_need_a_fraction():
  task = make(0.0)
  task.problem(0, 0, 10, "train")
  with pytest.raises(ValueError, match=r"its heldout_fraction is 0"):
    task.problem(0, 0, 10, "heldout")


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_a_fraction_outside_its_range(fraction):
  with pytest.raises(ValueError, match=r"at least 0 and below 1"):
    make(fraction)


def test_a_fraction_finer_than_the_hash():
  with pytest.raises(ValueError, match=r"finer than the split's resolution"):
    make(0.00001)
