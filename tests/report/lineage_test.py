import json
import shutil

from rlm.report.lineage import (
  beyond_note,
  distilled_pair,
  levels_seen,
  rl_pair,
  started_from,
)
from rlm.report.run_folder import read_run


def change_config(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_each_stage_started_from_and_saw(recipe):
  run = read_run(recipe)
  origin = started_from(run)
  assert origin["rl"] == "cold_start" and origin["sft"] == "pretrain"
  assert "pretrain" not in origin
  seen = levels_seen(run)
  assert seen["pretrain"] == {2, 3, 4, 5, 6}
  assert seen["cold_start"] == {2, 3}
  assert seen["rl"] == {2, 3, 4, 5}
  assert seen["distill"] == seen["rejection"] == {2, 3, 4, 5}


def test_how_far_beyond_a_level_lies(recipe):
  run = read_run(recipe)
  assert beyond_note(7, run) == "never seen"
  assert beyond_note(6, run) == "not in RL"
  assert beyond_note(5, run) == "beyond training"  # as its evaluation says
  for path in recipe.glob("*/config.json"):
    path.unlink()
  assert beyond_note(7, read_run(recipe)) == "beyond training"


def test_the_configs_pair_comes_first(recipe):
  names = ["pretrain", "cold_start", "rl", "rl_final", "sft"]
  assert rl_pair(read_run(recipe), names) == ("cold_start", "rl")
  change_config(recipe, rl_gain=["sft", "rl_final"])
  assert rl_pair(read_run(recipe), names) == ("sft", "rl_final")
  assert rl_pair(read_run(recipe), names[:3]) == ("cold_start", "rl")


def test_without_a_cold_start_rl_is_compared_with_what_it_began_from(recipe):
  change_config(recipe / "rl", init_from=str(recipe / "pretrain"))
  change_config(recipe, rl_gain=None)
  shutil.rmtree(recipe / "cold_start")
  run = read_run(recipe)
  assert rl_pair(run, ["pretrain", "rl"]) == ("pretrain", "rl")
  assert rl_pair(run, ["rl"]) is None
  assert rl_pair(run, ["pretrain"]) is None


def test_the_students_pair(recipe):
  run = read_run(recipe)
  both = ("student_pretrain", "distill")
  assert distilled_pair(run, both) == both
  assert distilled_pair(run, ["distill"]) is None


def test_odd_configs_are_no_trouble(recipe):
  change_config(recipe / "rl", init_from=3, curriculum=[1], data={"sources": 1})
  change_config(recipe, rl_gain="rl", order=None)
  run = read_run(recipe)
  assert "rl" not in started_from(run) and "rl" not in levels_seen(run)
  assert rl_pair(run, ["cold_start", "rl"]) == ("cold_start", "rl")
