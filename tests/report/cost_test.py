import json

import pytest

from rlm.report.cost import costs
from rlm.report.run_folder import read_run


def test_costs_come_from_the_recipes_summary(recipe):
  found = {cost.label: cost for cost in costs(read_run(recipe))}
  assert list(found)[:3] == ["Pretraining", "Cold start", "RL"]
  assert found["RL"].seconds == 131.0
  assert found["RL"].tokens == 131_000 * 21
  assert found["RL"].flops is None


def test_a_running_stage_is_costed_by_its_records(recipe):
  (recipe / "summary.json").unlink()
  (recipe / "rl" / "summary.json").unlink()
  found = {cost.label: cost for cost in costs(read_run(recipe))}
  assert found["RL"].seconds == pytest.approx(120 * 0.25)
  assert found["RL"].tokens == 120 * 256 * 40


def test_flops_by_stage_are_understood(recipe):
  path = recipe / "summary.json"
  summary = json.loads(path.read_text()) | {"flops": {"rl": 2e12}}
  path.write_text(json.dumps(summary))
  found = {cost.label: cost.flops for cost in costs(read_run(recipe))}
  assert found["RL"] == 2e12 and found["SFT"] is None
