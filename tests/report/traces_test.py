import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.report.run_folder import read_run
from rlm.report.traces import compare, departure, pieces, samples


def test_the_same_problem_stands_side_by_side(recipe):
  found = compare(read_run(recipe))
  assert found is not None
  assert (found.before, found.after) == ("Cold start", "RL")
  assert sum(found.counts.values()) == 40
  fates = [problem.fate for problem in found.shown]
  assert fates.count("Wrong, then right") == 3
  assert fates.count("Wrong both times") == 2
  assert fates.count("Right both times") == 1
  for problem in found.shown:
    before, after = (side.verdict for side in problem.sides)
    if problem.fate == "Wrong, then right":
      assert (before, after) == ("Wrong", "Correct")
  levels = [p.level for p in found.shown if p.fate == "Wrong, then right"]
  assert levels == ["5", "4", "3"]  # in turn, hardest first


def test_the_first_wrong_step_is_marked(recipe):
  found = compare(read_run(recipe))
  assert found is not None
  before, after = found.shown[0].sides
  assert [p.text for p in before.pieces if p.kind == "wrong"] == ["719"]
  assert not [p for p in after.pieces if p.kind == "wrong"]
  assert "a step is wrong" in before.notes
  assert "every step right" in after.notes


def test_nothing_to_compare(recipe):
  shutil.rmtree(recipe / "evaluate" / "rl")
  shutil.rmtree(recipe / "evaluate" / "rl_final")
  assert compare(read_run(recipe)) is None


def test_a_single_run_compares_its_early_steps_with_its_late(recipe):
  source = recipe / "evaluate" / "cold_start" / "traces"
  late = (recipe / "evaluate" / "rl_final" / "traces" / "000.jsonl").read_text()
  folder = recipe / "rl" / "traces"
  shutil.copytree(source, folder)
  (folder / "000.jsonl").write_text(
    (folder / "000.jsonl").read_text().replace('"step": 100', '"step": 0')
  )
  (folder / "100.jsonl").write_text(late)
  found = compare(read_run(recipe / "rl"))
  assert found is not None
  assert (found.before, found.after) == ("Early steps", "Late steps")


def test_a_single_run_without_repeats_shows_its_last_completions(recipe):
  run = read_run(recipe / "evaluate" / "rl")
  assert compare(run) is None
  found = samples(run)
  verdicts = [[side.verdict for side in problem.sides] for problem in found]
  assert verdicts == [["Correct"]] * 3 + [["Wrong"]] * 3
  assert found[0].fate == "Step 100"
  assert samples(read_run(recipe)) == []  # a recipe compares


@pytest.mark.parametrize(
  ("wrong", "right", "marked"),
  [
    ("5-8=7;7+4=2;", "5-8=7;7+4=1;", "2"),
    ("a 1719 b", "a 1711 b", "1719"),  # the whole number
    ("abc", "abc", None),
    ("ab", "abc", None),  # stopped early
    ("abc", "ab", None),
    ("x", "y", "x"),
    ("", "y", None),
  ],
)
def test_departure(wrong, right, marked):
  found = departure(wrong, right)
  assert (None if found is None else wrong[slice(*found)]) == marked


completions = st.lists(
  st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "a", "7", "<", "<|eos|>"]
  )
).map("".join)


@given(completions, completions)
def test_pieces_are_the_completion(wrong, right):
  found = pieces(wrong, departure(wrong, right))
  assert "".join(piece.text for piece in found) == wrong
  assert all(piece.text for piece in found)


def test_pieces_know_markers_and_the_answer():
  found = pieces("<think>1+1</think><answer>2</answer>", (8, 9))
  assert [(p.kind, p.text) for p in found] == [
    ("marker", "<think>"),
    ("text", "1"),
    ("wrong", "+"),
    ("text", "1"),
    ("marker", "</think>"),
    ("marker", "<answer>"),
    ("answer", "2"),
    ("marker", "</answer>"),
  ]


def test_an_endless_completion_is_cut_and_says_so():
  found = pieces("a" * 10_000, None)
  assert len(found[0].text) == 4000
  assert "6,000 more characters" in found[-1].text
