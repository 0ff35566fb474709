import json

from rlm.report.accuracy import Interval, evaluations
from rlm.report.findings import change, findings
from rlm.report.run_folder import read_run


def around(mean):
  return Interval(mean, (mean - 0.02, mean + 0.02), 100)


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
  run = read_run(recipe)
  found = findings(run, evaluations(run))
  assert found[0].startswith("RL raised held-out accuracy after cold start")
  assert found[1].startswith("It started from examples that err by design")
  assert "well-formed" in found[2]
  assert found[3].startswith("On level 6 (seen in pretraining only) it raised")
  assert found[4].startswith("On level 7 (never seen by any stage) it")
  assert found[-1].startswith("Distillation raised the student's accuracy from")
  assert findings(run, evaluations(run)[:1]) == []


def test_no_change_is_said_as_such():
  zero = Interval(0.0, (0.0, 0.074), 48)
  assert change("accuracy", zero, zero) == "left accuracy at 0.0% [0.0, 7.4]"


def test_without_intervals_chance_is_not_ruled_out():
  said = change("it", Interval(0.4, None, 48), around(0.9))
  assert said.startswith("moved it from 40.0% to 90.0% [88.0, 92.0]")
  assert said.endswith("chance is not ruled out")


def test_what_rejection_sampling_kept(recipe):
  path = recipe / "rejection" / "summary.json"
  counts = {"solved": 940, "problems": 1280, "kept": 812, "sampled": 5120}
  path.write_text(json.dumps(counts))
  run = read_run(recipe)
  assert findings(run, []) == [
    "Rejection sampling solved 940 of 1,280 problems and kept 812 of 5,120"
    " answers to learn from."
  ]
