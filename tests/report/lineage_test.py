import json

from rlm.report.lineage import (
  descent,
  distilled_pair,
  drawn_by_rl,
  last_of_model,
  level_note,
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


def test_a_level_is_named_by_who_drew_it(recipe):
  run = read_run(recipe)
  assert level_note(7, run) == "never seen by any stage"
  assert level_note(6, run) == "seen in pretraining only"
  assert [level_note(k, run) for k in (2, 3, 4, 5)] == [""] * 4  # RL drew them
  assert drawn_by_rl(run) == {2, 3, 4, 5}
  assert descent(run, "rl_final") == ["pretrain", "sft", "rl_final"]
  assert level_note(6, run, "rl_final") == "seen in pretraining only"
  # The student has seen RL's levels in its teacher's traces, but no RL.
  assert drawn_by_rl(run, "distill") == frozenset()
  assert level_note(6, run, "distill") == "seen in pretraining only"
  assert level_note(5, run, "distill") == ""


def test_fine_tuning_is_not_pretraining(recipe):
  data = {"sources": {"traces": {"levels": [2, 3, 6]}}}
  change_config(recipe / "cold_start", data=data)
  run = read_run(recipe)
  assert level_note(6, run, "rl") == "seen in training, not drawn by RL"


def test_a_level_that_rl_did_not_reach_was_not_drawn(recipe):
  for name in ("rl", "rl_final"):
    path = recipe / name / "metrics.jsonl"
    path.write_text('{"step": 1, "curriculum/level": 4}\n')
  run = read_run(recipe)
  assert drawn_by_rl(run) == {2, 3, 4}
  # Rejection sampling asked it, and SFT learned from that.
  assert level_note(5, run) == "seen in training, not drawn by RL"
  assert level_note(5, run, "rl") == "seen in pretraining only"


def test_a_source_without_weight_is_not_trained_on(recipe):
  columns = {"levels": [2, 6], "weight": 0.0}
  change_config(recipe / "pretrain", data={"sources": {"columns": columns}})
  run = read_run(recipe)
  assert "pretrain" not in levels_seen(run)
  assert level_note(6, run, "rl") == "never seen by any stage"


def test_without_configs_levels_have_no_note(recipe):
  for path in recipe.glob("*/config.json"):
    path.unlink()
  assert level_note(7, read_run(recipe)) == ""
  assert level_note(7, read_run(recipe), "rl") == ""


def test_the_pair_is_the_configs(recipe):
  names = ["pretrain", "cold_start", "rl", "rl_final", "sft"]
  assert rl_pair(read_run(recipe), names) == ("cold_start", "rl")
  change_config(recipe, rl_gain=["sft", "rl_final"])
  assert rl_pair(read_run(recipe), names) == ("sft", "rl_final")
  assert rl_pair(read_run(recipe), names[:3]) is None
  change_config(recipe, rl_gain=None)
  assert rl_pair(read_run(recipe), names) is None


def test_the_last_stage_of_the_model_is_not_the_students(recipe):
  run = read_run(recipe)
  assert last_of_model(run, list(levels_seen(run))) == "rl_final"
  assert last_of_model(run, ["cold_start", "rl", "distill"]) == "rl"
  stages = {"base": {"model": "a"}, "polish": {"model": "a"}}
  change_config(recipe, order=["base", "polish"], stages=stages)
  assert last_of_model(read_run(recipe), ["base", "polish"]) == "polish"
  change_config(recipe, stages=None)
  assert last_of_model(read_run(recipe), ["base"]) is None


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
  assert rl_pair(run, ["cold_start", "rl"]) is None
