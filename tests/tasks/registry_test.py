"""What holds for every family, built as a config would build it."""

import copy
import itertools
import json
import math

import ml_collections
import numpy as np
import pytest

from rlm.tasks.base import is_heldout
from rlm.tasks.draws import Draws
from rlm.tasks.registry import TASKS, make_task

SECTIONS = {
  "column_addition": dict(
    name="column_addition",
    heldout_fraction=0.1,
    letters="abcdefghijkl",
    forget_carry=0.5,
    slip=0.1,
  ),
  "column_multiplication": dict(
    name="column_multiplication",
    heldout_fraction=0.1,
    letters="abcdefghijkl",
    forget_carry=0.5,
    slip=0.1,
  ),
  "chained_arithmetic": dict(
    name="chained_arithmetic",
    heldout_fraction=0.1,
    modulus=97,
    operations="+-*",
    misread_minus=0.3,
    slip=0.1,
  ),
  "countdown": dict(
    name="countdown",
    heldout_fraction=0.1,
    operations="+-*/",
    max_number=20,
    max_value=100,
    max_attempts=2,
    settle=0.3,
    slip=0.1,
  ),
}
# Where an author's noise is switched off, by any family.
NOISE = ("slip", "forget_carry", "misread_minus", "settle")

HOSTILE = (
  "",
  " ",
  "\x00",
  "9" * 100_000,
  "-" * 100_000,
  "(" * 100_000,
  "((" * 50_000 + "1" + "))" * 50_000,
  "1+" * 100_000,
  "1;" * 100_000,
  "|" * 100_000,
  " " * 100_000 + "!",
  "__import__('os').system('exit 1')",
  "9**9**9**9",
  "1e999999",
  "1/0",
  "nan",
  "\u0663",
  "<answer>1</answer>",
)


@pytest.fixture(params=sorted(SECTIONS))
def task(request):
  return make_task(SECTIONS[request.param])


def problems(task, count, split="train", seed=0, levels=None):
  for level in levels or task.levels:
    for index in range(count):
      yield task.problem(seed, index, level, split)


def test_sections_cover_every_family_but_files():
  assert {*SECTIONS, "jsonl"} == set(TASKS)


def test_worked_solutions_verify_at_every_level(task):
  for split in ("train", "heldout"):
    for problem in problems(task, 40, split):
      solution = task.worked_solution(problem)
      assert task.verify(problem, solution.answer), problem
      assert task.verify(problem, problem.answer), problem
      assert task.check_steps(problem, solution.thinking), problem


def test_authors_without_noise_write_the_worked_solution(task):
  section = dict(SECTIONS[task.name])
  section.update((key, 0.0) for key in NOISE if key in section)
  clean = make_task(section)
  for problem in problems(clean, 20):
    written = clean.authored_solution(problem, Draws("author"))
    assert written == clean.worked_solution(problem)


def test_noisy_authors_err_sometimes_and_the_checks_see_it(task):
  verdicts = []
  for i, problem in enumerate(problems(task, 60)):
    written = task.authored_solution(problem, Draws("author", i))
    verdicts.append(task.verify(problem, written.answer))
  assert 0.2 < np.mean(verdicts) < 0.95


def test_text_has_no_marker_and_is_plain_ascii(task):
  for problem in problems(task, 20):
    solution = task.worked_solution(problem)
    for text in (problem.prompt, solution.thinking, solution.answer):
      assert text.isascii() and text.isprintable()
      assert not set("<>") & set(text)


def test_problems_say_what_they_are(task):
  for problem in problems(task, 5):
    assert problem.task == task.name
    assert problem.level in task.levels
    assert json.loads(json.dumps(problem.metadata)) == problem.metadata


def test_no_held_out_problem_among_20000_train_draws(task):
  fraction = SECTIONS[task.name]["heldout_fraction"]
  easiest = task.levels[0]  # the smallest space: the most collisions
  heldout = {p.identity for p in problems(task, 500, "heldout", 1, [easiest])}
  assert len(heldout) > 50
  for seed in range(4):
    for problem in problems(task, 5000, "train", seed, [easiest]):
      assert problem.identity not in heldout
      assert not is_heldout(task.name, problem.identity, fraction)


def test_problem_is_a_pure_function_of_its_arguments(task):
  other = make_task(copy.deepcopy(SECTIONS[task.name]))
  level = task.levels[1]
  forwards = [task.problem(7, i, level, "train") for i in range(30)]
  backwards = [other.problem(7, i, level, "train") for i in range(29, -1, -1)]
  assert forwards == backwards[::-1]
  numpy_ints = [
    task.problem(np.int64(7), np.int32(i), level, "train") for i in range(30)
  ]
  assert forwards == numpy_ints
  other_seed = [task.problem(8, i, level, "train") for i in range(30)]
  assert forwards != other_seed


def test_first_problems_stay_what_they_are(task):
  # Drawn problems are part of every published result: a change here changes
  # what old configs train and evaluate on.
  expected = {
    "column_addition": "i62h08g98f49?",
    "column_multiplication": "g4f6e4d4*6?",
    "chained_arithmetic": "47+24+53-66?",
    "countdown": "17,15,6,5=28?",
  }
  assert task.problem(0, 0, 4, "heldout").prompt == expected[task.name]


def test_the_answer_of_another_problem_pays_below_two_percent(task):
  for level in task.levels:
    drawn = task.distinct_problems(3, 300, level, "train")
    pairs = zip(drawn, drawn[1:] + drawn[:1], strict=True)
    hits = sum(task.verify(p, other.answer) for p, other in pairs)
    # Chance may be 1.9%; allow three standard deviations of 300 draws.
    assert hits / 300 < 0.02 + 3 * math.sqrt(0.02 * 0.98 / 300)
  drawn = list(problems(task, 2500, levels=task.levels[:4]))
  pairs = list(itertools.pairwise(drawn))
  assert sum(task.verify(p, o.answer) for p, o in pairs) / len(pairs) < 0.02


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_just_wrong(task, text):
  problem = task.problem(0, 0, task.levels[-1], "train")
  assert task.verify(problem, text) is False
  assert task.check_steps(problem, text) is False


def test_config_dicts_are_sections_too():
  section = ml_collections.ConfigDict(SECTIONS["countdown"])
  assert make_task(section).name == "countdown"


def test_unknown_family_names_the_nearest():
  with pytest.raises(
    ValueError,
    match=r"config.task.name: unknown task 'colum_addition'; did you mean"
    r" 'column_addition'\? The tasks are column_addition, ",
  ):
    make_task({**SECTIONS["column_addition"], "name": "colum_addition"})


@pytest.mark.parametrize("section", [{}, {"heldout_fraction": 0.1}, 3])
def test_a_section_without_name(section):
  with pytest.raises(
    ValueError, match=r"a section with the key 'name', one of"
  ):
    make_task(section)


def test_misspelt_missing_and_wrong_keys():
  section = dict(SECTIONS["column_addition"])
  with pytest.raises(ValueError, match=r"unknown key 'slips'.*'slip'"):
    make_task({**section, "slips": 0.1})
  del section["slip"]
  with pytest.raises(ValueError, match=r"config.task: missing 'slip'"):
    make_task(section)
  with pytest.raises(ValueError, match=r"config.rl.task: slip is 2"):
    make_task({**section, "slip": 2.0}, "config.rl.task")
