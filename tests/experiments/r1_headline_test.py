"""What the recipe's headline is over, and what its summary counts."""

import pytest

from configs.r1 import laptop
from experiments import r1
from rlm.config import build, plain


def recipe(**changes):
  c = laptop.get_config()
  c.evaluate.evaluation.update(changes)
  return build(r1.Config, plain(c))


def test_the_headline_is_over_the_levels_that_rl_draws():
  r1.check_headline(recipe())
  with pytest.raises(
    ValueError,
    match=r"levels_trained=\(2, 3, 6\), but stages\.rl\.curriculum\.levels="
    r"\(2, 3, 4, 5\).* Make them the same",
  ):
    r1.check_headline(recipe(levels_trained=(2, 3, 6)))


def test_the_summary_counts_the_evaluations_too():
  cfg = recipe()
  share = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
  measured = {"pass_at_1": share, "pass_at_1_given_format": share}
  results = {
    name: {"tokens": 10, "flops": 100.0, "model": {"total": 1}}
    for name in cfg.order
  }
  evaluations = {
    name: measured | {"seconds": 1.0, "tokens": 7, "flops": 3.0}
    for name in cfg.order
    if cfg.stages[name]["evaluate"]
  }
  summary = r1.summarise(cfg, results, evaluations, {})
  assert summary["flops"] == 8 * 100.0 + 7 * 3.0
  by_name = {stage["name"]: stage for stage in summary["stages"]}
  assert by_name["rl"]["tokens"] == 10 and by_name["rl"]["flops"] == 100.0
  assert by_name["rl"]["evaluation"] == {
    "seconds": 1.0,
    "tokens": 7,
    "flops": 3.0,
  }
  assert "evaluation" not in by_name["rejection"]
