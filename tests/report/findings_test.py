from rlm.report.accuracy import Interval, evaluation, evaluations
from rlm.report.findings import change, findings, rl_pair
from rlm.report.run_folder import read_run


def around(mean):
  return Interval(mean, mean - 0.02, mean + 0.02, 100)


def test_a_change_is_told_whichever_way_it_falls():
  assert change("accuracy", around(0.4), around(0.9)) == (
    "raised accuracy from 40.0% [38.0, 42.0] to 90.0% [88.0, 92.0],"
    " +50.0 points"
  )
  assert change("it", around(0.9), around(0.4)).startswith("lowered it")
  overlap = change("it", around(0.50), around(0.49))
  assert overlap.startswith("moved it")
  assert overlap.endswith("−1.0 points; the intervals overlap")


def test_findings_of_a_recipe(recipe):
  found = findings(evaluations(read_run(recipe)))
  assert found[0].startswith("RL raised held-out accuracy after cold start")
  assert "well-formed" in found[1]
  assert found[2].startswith("On level 6, harder than any training")
  assert found[-1].startswith("The distilled student answers 66.0%")


def test_without_a_cold_start_rl_is_compared_with_the_base():
  rows = [
    evaluation(name, {"pass_at_1": {"mean": mean}})
    for name, mean in (("pretrain", 0.1), ("rl", 0.5))
  ]
  pair = rl_pair(rows)
  assert pair is not None and pair[0].name == "pretrain"
  assert findings(rows[:1]) == []
  assert rl_pair(rows[1:]) is None
