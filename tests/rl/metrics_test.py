import numpy as np

from rlm.rl.metrics import combine_updates, level_success, rollout_metrics
from tests.rl.reciter import right, wrong
from tests.rl.rollout_test import recite


def test_rollout_metrics_by_hand():
  def cut(problem):
    return right(problem)[:-1]

  # Two prompts of level 2; each gives a right, a wrong and a cut completion.
  asked, _, rollout = recite(right, wrong, cut, problems=2)
  metrics = rollout_metrics(rollout, np.array([False, True]))
  np.testing.assert_allclose(metrics["reward/mean"], 1.2 / 3, rtol=1e-6)
  np.testing.assert_allclose(
    metrics["reward/std"], np.std([1.1, 0.1, 0.0]), rtol=1e-6
  )
  assert metrics["reward/accuracy"] == 1 / 3
  assert metrics["reward/format"] == 2 / 3
  assert metrics["accuracy"] == 1 / 3
  assert metrics["accuracy_given_format"] == 1 / 2
  assert metrics["steps_correct"] == 2 / 3
  assert metrics["truncated"] == 1 / 3
  assert metrics["zero_std_groups"] == 0.5
  assert metrics["level/2/accuracy"] == 1 / 3
  whole, other = (len(make(asked[0])) for make in (right, wrong))
  assert metrics["response_length/finished"] == (whole + other) / 2
  np.testing.assert_allclose(
    metrics["response_length/mean"], (2 * whole - 1 + other) / 3
  )
  prompt = int(rollout.prompt_lengths[0])
  assert metrics["tokens"] == 2 * (prompt + 2 * whole - 1 + other)
  assert level_success(rollout) == {2: 1 / 3}


def test_shares_of_nothing_are_not_measured():
  _, _, rollout = recite(lambda p: right(p)[:4], lambda p: right(p)[:5])
  metrics = rollout_metrics(rollout, np.array([True]))
  assert metrics["accuracy_given_format"] is None
  assert metrics["response_length/finished"] is None
  assert metrics["accuracy"] == 0.0 and metrics["truncated"] == 1.0


def test_updates_are_combined_by_the_end_of_their_names():
  updates = [
    {"loss": 1.0, "ratio/max": 2.0, "ratio/min": 0.5, "nonfinite": 0},
    {"loss": 3.0, "ratio/max": 1.5, "ratio/min": 0.7, "nonfinite": 0},
    {"loss": 5.0, "ratio/max": 1.0, "ratio/min": 0.9, "nonfinite": 0},
  ]
  assert combine_updates(updates) == {
    "loss": 3.0,
    "ratio/max": 2.0,
    "ratio/min": 0.5,
    "nonfinite": 0,
  }
  load = [{"expert_load": np.array([[0.2, 0.8]]), "nonfinite": 0}] * 2
  np.testing.assert_allclose(combine_updates(load)["expert_load"], [[0.2, 0.8]])
  assert combine_updates([]) == {}


def test_a_skipped_update_does_not_hide_those_that_were_made():
  bad = {"loss": np.nan, "ratio/max": np.nan, "nonfinite": 1}
  good = {"loss": 1.0, "ratio/max": 2.0, "nonfinite": 0}
  assert combine_updates([bad, good]) == good | {"nonfinite": 1}
  both = combine_updates([bad, bad])
  assert both["nonfinite"] == 2 and np.isnan(both["loss"])
