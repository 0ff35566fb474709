import json
import shutil

import pytest

from rlm.report.run_folder import (
  STAGES,
  inline_label,
  read_jsonl,
  read_run,
  read_traces,
  stage_label,
)


def test_a_recipe_is_read_in_the_order_in_which_it_ran(recipe):
  run = read_run(recipe)
  assert run.is_recipe
  assert [stage.name for stage in run.stages] == list(STAGES)
  assert list(run.evaluations) == [
    "pretrain",
    "cold_start",
    "rl",
    "sft",
    "rl_final",
    "student_pretrain",
    "distill",
  ]
  assert run.missing == []
  assert len(run.stages[2].metrics) == 120
  assert run.stages[2].timing[0]["seconds"] == 0.25


def test_a_partial_recipe_names_what_is_missing(recipe):
  for name in ("rl_final", "distill"):
    shutil.rmtree(recipe / name)
    shutil.rmtree(recipe / "evaluate" / name)
  (recipe / "summary.json").unlink()
  run = read_run(recipe)
  assert run.missing == ["rl_final", "distill"]
  assert "rl_final" not in run.evaluations


def test_a_config_may_order_and_name_other_stages(recipe):
  config = {"order": ["warmup", "distill", "rl"]}
  (recipe / "config.json").write_text(json.dumps(config))
  run = read_run(recipe)
  assert [s.name for s in run.stages][:3] == ["distill", "rl", "cold_start"]
  assert list(run.evaluations)[:2] == ["distill", "rl"]
  assert run.missing == ["warmup"]


def test_the_summary_stands_in_for_evaluations(recipe):
  shutil.rmtree(recipe / "evaluate")
  assert "rl" in read_run(recipe).evaluations


def test_a_single_run_is_its_own_stage(recipe):
  run = read_run(recipe / "rl")
  assert not run.is_recipe
  assert [stage.name for stage in run.stages] == ["rl"]
  assert run.missing == []


def test_a_folder_of_an_evaluation_is_a_run(recipe):
  run = read_run(recipe / "evaluate" / "rl")
  assert list(run.evaluations) == ["rl"]


def test_torn_and_foreign_lines_are_counted(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(
    b'{"step": 1, "kl": NaN}\n[1]\n\xff\xfe\n\n{"step": 2}\n{"step": 3, "k'
  )
  records, unreadable = read_jsonl(path)
  assert [r["step"] for r in records] == [1, 2]
  assert unreadable == 3
  assert read_jsonl(tmp_path / "absent.jsonl") == ([], 0)


def test_traces_come_in_the_order_of_their_numbers(tmp_path):
  for step in (10, 9):
    path = tmp_path / "traces" / f"step_{step}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"step": step}))
  assert [t["step"] for t in read_traces(tmp_path)] == [9, 10]


def test_what_is_no_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"holds no run.*--workdir"):
    read_run(tmp_path)
  with pytest.raises(ValueError, match=r"No such folder"):
    read_run(tmp_path / "absent")


def test_labels():
  assert stage_label("cold_start") == "Cold start"
  assert stage_label("my_stage") == "my stage"
  assert inline_label("Cold start") == "cold start"
  assert inline_label("RL") == "RL"
