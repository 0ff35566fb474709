import math

from rlm.report import svg
from rlm.report.accuracy import (
  evaluation,
  evaluations,
  interval,
  level_figure,
  measure_labels,
  stage_figure,
)
from rlm.report.run_folder import read_run


def test_interval_reads_what_is_there():
  full = interval({"mean": 0.5, "low": 0.4, "high": 0.6, "n": 100})
  assert full is not None
  assert (full.mean, full.low, full.high, full.n) == (0.5, 0.4, 0.6, 100)
  assert str(full) == "50.0% [40.0, 60.0]"
  bare = interval({"mean": 0.5})
  assert bare is not None and (bare.low, bare.high, bare.n) == (0.5, 0.5, None)
  assert interval({"mean": None, "low": None}) is None
  assert interval({"mean": math.nan}) is None
  assert interval(0.5) is None


def test_an_evaluation_of_nothing_is_empty():
  row = evaluation("rl", {"levels": {"two": {}, "2": None}, "n_problems": "x"})
  assert row.measures == {} and row.levels == {} and row.n_problems is None


def test_levels_and_what_lies_beyond(recipe):
  row = evaluations(read_run(recipe))[2]
  assert row.label == "RL"
  assert list(row.levels) == [2, 3, 4, 5, 6]
  assert row.trained == {2, 3, 4, 5} and row.beyond == {6}
  value = row.level_measure(6, "pass_at_1")
  assert value is not None and value.mean == 0.31
  assert row.level_measure(7, "pass_at_1") is None


def test_measures_are_labelled_in_order_for_any_k():
  record = {
    name: {"mean": 0.5}
    for name in ("pass_at_16", "format", "maj_at_16", "pass_at_1", "length")
  }
  assert list(measure_labels([evaluation("rl", record)]).values()) == [
    "pass@1",
    "maj@16",
    "pass@16",
    "good format",
  ]


def test_figures_hold_every_stage_and_level(recipe):
  rows = evaluations(read_run(recipe))
  with svg.drawing():
    stages = stage_figure(rows)
    levels = level_figure(rows[2], rows[1], [2, 3, 4, 5, 6])
    level_figure(rows[0], None, list(range(1, 40)))
  for row in rows:
    assert f">{row.label}</text>" in stages
  assert "var(--beyond)" in levels and "var(--faint)" in levels
  assert ">6</text>" in levels
