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
  assert (full.mean, full.ends, full.n) == (0.5, (0.4, 0.6), 100)
  assert str(full) == "50.0% [40.0, 60.0]" and full.bounds == "40.0 – 60.0"
  bare = interval({"mean": 0.5})
  assert bare is not None and (bare.ends, bare.n) == (None, None)
  assert str(bare) == "50.0%" and bare.bounds == ""
  half = interval({"mean": 0.5, "low": 0.4, "high": None})
  assert half is not None and half.ends is None
  assert interval({"mean": None, "low": None}) is None
  assert interval({"mean": math.nan}) is None
  assert interval(0.5) is None


def test_an_evaluation_of_nothing_is_empty():
  row = evaluation("rl", {"levels": {"two": {}, "2": None}, "n_problems": "x"})
  assert row.measures == {} and row.levels == {} and row.n_problems is None


def test_levels_and_those_of_the_headline(recipe):
  row = evaluations(read_run(recipe))[2]
  assert row.label == "RL"
  assert list(row.levels) == [2, 3, 4, 5, 6, 7]
  assert row.headline == {2, 3, 4, 5}
  value = row.level_measure(6, "pass_at_1")
  assert value is not None and value.mean == 0.31
  assert row.level_measure(8, "pass_at_1") is None


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
    levels = level_figure(
      rows[2], rows[1], [2, 3, 4, 5, 6], shaded=[6], unseen=[6]
    )
    plain = level_figure(
      rows[0], None, list(range(1, 40)), shaded=[], unseen=[]
    )
  for row in rows:
    assert f">{row.label}</text>" in stages
  assert "var(--beyond)" in levels and "var(--faint)" in levels
  assert ">6</text>" in levels
  assert "var(--beyond)" not in plain


def test_without_bounds_no_interval_is_drawn():
  row = evaluation(
    "rl",
    {"pass_at_1": {"mean": 0.5}, "levels": {"2": {"pass_at_1": {"mean": 0.5}}}},
  )
  with svg.drawing():
    drawn = [
      stage_figure([row]),
      level_figure(row, None, [2], shaded=[], unseen=[]),
    ]
  # Intervals are the only thick strokes.
  assert not any("stroke-width: 2.5" in figure for figure in drawn)
