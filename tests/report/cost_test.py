import json
import shutil

import pytest

from rlm.report.cost import costs
from rlm.report.run_folder import read_run


def test_costs_come_from_the_recipes_summary(recipe):
  found = {cost.label: cost for cost in costs(read_run(recipe))}
  assert list(found)[:3] == ["Pretraining", "Cold start", "RL"]
  assert found["RL"].seconds == 131.0
  assert found["RL"].tokens == 131_000 * 21
  assert found["RL"].flops == 2.5e12


def test_evaluations_have_a_row_of_their_own(recipe):
  last = costs(read_run(recipe))[-1]
  assert last.is_evaluation and last.seconds is None
  assert (last.tokens, last.flops) == (7 * 50_000, 7 * 1e11)
  # The recipe's summary stands in for folders that were not copied along.
  summary = json.loads((recipe / "summary.json").read_text())
  for stage in summary["stages"]:
    stage |= {"flops": 1e15, "evaluation": {"tokens": 1, "flops": 2.0}}
  (recipe / "summary.json").write_text(json.dumps(summary))
  shutil.rmtree(recipe / "evaluate")
  last = costs(read_run(recipe))[-1]
  assert (last.tokens, last.flops) == (7, 14.0)
  for stage in summary["stages"]:
    del stage["evaluation"]  # of an older run, which did not count it
  (recipe / "summary.json").write_text(json.dumps(summary))
  assert not any(c.is_evaluation for c in costs(read_run(recipe)))


def test_a_running_stage_is_costed_by_its_records(recipe):
  (recipe / "summary.json").unlink()
  (recipe / "rl" / "summary.json").unlink()
  found = {cost.label: cost for cost in costs(read_run(recipe))}
  assert found["RL"].seconds == pytest.approx(120 * 0.25)
  assert found["RL"].tokens == 120 * 256 * 40


def test_throughput_is_the_median_over_steps(recipe):
  path = recipe / "rl" / "timing.jsonl"
  speeds = [{"step": 0, "seconds": 60, "tokens_per_second": 1}]  # compiling
  speeds += [{"step": s, "tokens_per_second": 900 + s} for s in (1, 2)]
  path.write_text("".join(json.dumps(s) + "\n" for s in speeds))
  found = {cost.label: cost for cost in costs(read_run(recipe))}
  assert found["RL"].tokens_per_second == 901
  assert found["RL"].mfu is None
  assert found["SFT"].mfu == 0.213
