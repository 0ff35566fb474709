import dataclasses
import math

import jax
import numpy as np
import pytest

from rlm.eval.config import EvaluationConfig
from rlm.eval.evaluate import evaluate, heldout_problems, sample_problems
from rlm.files import to_json
from rlm.flops import decode_flops_per_token
from rlm.rewards.registry import Scorer
from tests.rl.reciter import CHAT, TASK, Reciter, right, wrong
from tests.tiny_model import tiny_config

CONFIG = EvaluationConfig(
  seed=0,
  levels=(2, 3, 4),
  levels_trained=(2, 3),
  problems_per_level=2,
  samples_per_problem=4,
  ks=(1, 2, 4),
  bootstrap_resamples=200,
  traces_per_level=1,
  samples_per_trace=2,
)
MODEL = tiny_config()
SCORER = Scorer(TASK, {"accuracy": 1.0, "format": 1.0})


def cut(problem):
  return right(problem)[:-1]


# Samples of the two problems of each level.
SAID = {
  2: [(right, right, right, right), (right, right, wrong, wrong)],
  3: [(wrong, wrong, wrong, cut), (right, wrong, wrong, cut)],
  4: [(cut, cut, cut, cut), (cut, cut, cut, cut)],
}


class ByLevel:
  """Recites SAID, one level a call."""

  def __init__(self):
    problems = heldout_problems(TASK, CONFIG)
    self.said = {
      level: [
        make(problem)
        for makers, problem in zip(
          SAID[level],
          [p for p in problems if p.level == level],
          strict=True,
        )
        for make in makers
      ]
      for level in CONFIG.levels
    }
    self.levels = list(CONFIG.levels)
    self.keys = []

  def generate(self, variables, prompts, keys):
    said = self.said[self.levels.pop(0)]
    reciter = Reciter(said, max_new=80)
    completions = reciter.generate(variables, prompts, keys)
    self.keys.append(reciter.keys)
    return completions


@pytest.fixture(scope="module")
def result():
  sampler = ByLevel()
  done = []
  summary, traces = evaluate(
    sampler,
    None,
    TASK,
    CHAT,
    SCORER,
    CONFIG,
    MODEL,
    stage="rl",
    step=9,
    on_level=done.append,
  )
  assert done == [1, 2, 3]
  keys = np.concatenate(sampler.keys)
  assert len({tuple(k) for k in keys}) == len(keys) == 24
  return summary, traces


def test_measures_by_hand(result):
  summary, _ = result
  # Levels 2 and 3: correct counts 4, 2, 0, 1 of 4; well formed 4, 4, 3, 3.
  assert summary["pass_at_1"]["mean"] == pytest.approx(7 / 16)
  assert summary["pass_at_1_given_format"]["mean"] == pytest.approx(7 / 14)
  assert summary["format"]["mean"] == pytest.approx(14 / 16)
  assert summary["pass_at_4"]["mean"] == pytest.approx(3 / 4)
  # C(n-c, 2) / C(4, 2) = 0, 1/6, 1, 3/6.
  assert summary["pass_at_2"]["mean"] == pytest.approx(
    (1 + 5 / 6 + 0 + 1 / 2) / 4
  )
  # 4 right; 2 right against 2 wrong; none; 1 right against 2 wrong.
  assert summary["maj_at_4"]["mean"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
  # All steps were right wherever the response was whole.
  assert summary["steps_correct"]["mean"] == pytest.approx(14 / 16)
  assert summary["steps_correct_given_correct"]["mean"] == 1.0
  assert summary["finished"]["mean"] == pytest.approx(14 / 16)
  assert summary["pass_at_1"]["n"] == 4 == summary["n_problems"]
  assert summary["n_samples"] == 4
  assert summary["pass_at_1"]["low"] <= 7 / 16 <= summary["pass_at_1"]["high"]


def test_cost_counts_a_prompt_once_for_all_its_samples(result):
  summary, _ = result
  problems = heldout_problems(TASK, CONFIG)
  prompts = [len(CHAT.encode_prompt(p.prompt)) for p in problems]
  assert summary["tokens"] >= sum(prompts) + 24
  sampled = summary["tokens"] - sum(prompts)
  by_level = summary["levels"].values()
  means = [level["response_length"]["mean"] for level in by_level]
  assert sampled == pytest.approx(8 * sum(means))  # 8 samples of each level
  assert summary["flops"] > sampled * decode_flops_per_token(MODEL, 0)


def test_levels(result):
  summary, _ = result
  assert summary["levels_trained"] == [2, 3]
  assert list(summary["levels"]) == ["2", "3", "4"]
  assert summary["levels"]["2"]["pass_at_1"]["mean"] == pytest.approx(6 / 8)
  none = summary["levels"]["4"]["pass_at_1"]
  assert none["mean"] == none["low"] == 0.0
  assert none["high"] == pytest.approx(1 - 0.025**0.5)  # 0 of 2 problems
  # Nothing was well formed there: a share of nothing has no value.
  given = summary["levels"]["4"]["pass_at_1_given_format"]
  assert given == {"mean": None, "low": None, "high": None, "n": 0}
  assert to_json(summary) == summary


def test_traces(result):
  _, traces = result
  assert [t["level"] for t in traces] == [2, 2, 3, 3, 4, 4]
  assert [t["correct"] for t in traces] == [True, True] + [False] * 4
  assert [t["finished"] for t in traces] == [True] * 4 + [False] * 2
  first = traces[0]
  assert first["stage"] == "rl" and first["step"] == 9
  assert first["answer"] == first["expected"]
  assert first["completion"].startswith("<think>")
  assert set(first) == {
    *("stage", "step", "task", "level", "prompt", "completion", "rewards"),
    *("correct", "well_formed", "finished", "steps_correct", "answer"),
    *("expected", "identity"),
  }


def test_problems_are_distinct_and_held_out():
  problems = heldout_problems(
    TASK, dataclasses.replace(CONFIG, problems_per_level=20)
  )
  assert len({p.identity for p in problems}) == 60
  assert all(TASK.is_heldout(p) for p in problems)


def test_a_problem_that_training_may_draw_is_refused():
  problem = TASK.problem(0, 0, 2, "train")
  with pytest.raises(ValueError, match=r"not held out .*heldout_fraction=0\.1"):
    sample_problems(
      None,
      None,
      TASK,
      [problem],
      CHAT,
      SCORER,
      jax.random.key(0),
      samples_per_problem=1,
    )


@pytest.mark.parametrize(
  ("changes", "error"),
  [
    (dict(levels_trained=(7,)), "have none in common"),
    (dict(levels=(2, 2, 3)), "names a level twice"),
    (dict(ks=(8,)), "pass@8 needs at least 8 samples"),
    (dict(ks=()), "must hold numbers"),
    (dict(problems_per_level=0), "problems_per_level=0 must be at least 1"),
    (dict(traces_per_level=3), "must lie within 0 and problems_per_level=2"),
    (dict(samples_per_trace=5), "must lie within 0 and samples_per_problem=4"),
  ],
)
def test_config_errors(changes, error):
  with pytest.raises(ValueError, match=error):
    dataclasses.replace(CONFIG, **changes)


def test_an_unknown_level_is_named():
  cfg = dataclasses.replace(CONFIG, levels=(2, 77))
  with pytest.raises(ValueError, match="level 77"):
    heldout_problems(TASK, cfg)


def test_intervals_widen_with_fewer_problems(result):
  summary, _ = result
  wide = summary["levels"]["2"]["pass_at_1"]
  assert 0.5 <= wide["low"] <= wide["mean"] <= wide["high"] <= 1.0
  assert not math.isclose(wide["low"], wide["high"])
