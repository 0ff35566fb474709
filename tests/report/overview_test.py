import json

from rlm.report.accuracy import evaluation, evaluations
from rlm.report.cost import costs
from rlm.report.overview import (
  evaluation_size,
  key_figures,
  listed,
  notices,
  subtitle,
)
from rlm.report.run_folder import read_run


def test_levels_are_listed_shortly():
  assert listed([]) == ""
  assert listed([6]) == "level 6"
  assert listed({3, 2, 4}) == "levels 2–4"
  assert listed([2, 4]) == "levels 2, 4"


def test_the_head_of_a_recipe(recipe):
  run = read_run(recipe)
  assert subtitle(run) == "The recipe, 8 stages · seed 0 · commit 0123456789ab"
  found = key_figures(run, evaluations(run), costs(run))
  assert [(name, value) for name, value, _ in found] == [
    ("Gain by RL", "+47.0 points"),
    ("Accuracy after final RL", "85.0%"),
    ("Parameters", "214 k"),
    ("Time", "8 min 32 s"),
  ]
  details = {name: detail for name, _, detail in found}
  assert details["Gain by RL"] == (
    "held-out pass@1, over cold start, which learned from erring authors"
  )
  assert notices(run, evaluations(run)) == []


def test_uncommitted_code_is_said(recipe):
  (recipe / "run.json").write_text(json.dumps({"commit": "f" * 40 + "-dirty"}))
  assert subtitle(read_run(recipe)).endswith("commit ffffffffffff-dirty")


def test_a_size_is_said_only_if_every_stage_shares_it():
  same = evaluation("rl", {"n_problems": 400, "n_samples": 8})
  other = evaluation("sft", {"n_problems": 50, "n_samples": 8})
  said = "400 problems, each answered 8 times."
  assert evaluation_size([same], frozenset()) == said
  assert evaluation_size([same, other], frozenset()) == ""
  assert evaluation_size([], frozenset()) == ""


def test_the_headlines_levels_are_called_rls_only_if_they_are():
  record = {"n_problems": 9, "n_samples": 8, "levels_trained": [2, 3]}
  rows = [evaluation("rl", record)]
  of_rl = evaluation_size(rows, frozenset({2, 3}))
  assert of_rl.startswith("9 problems of levels 2–3, those that RL draws, each")
  other = evaluation_size(rows, frozenset({2, 3, 4}))
  assert other.startswith("9 problems of levels 2–3, each")
