import numpy as np

from rlm.report import svg
from rlm.report.expert_load import (
  balance_charts,
  heatmaps,
  load_colours,
  load_over_even,
)


def test_load_over_even_counts_in_even_shares():
  ratio = load_over_even(np.array([[1.0, 3.0], [0.25, 0.75], [0.0, 0.0]]))
  np.testing.assert_allclose(ratio[:2], [[0.5, 1.5], [0.5, 1.5]])
  assert np.isnan(ratio[2]).all()


def test_colours_are_clear_at_even_and_opposite_around_it():
  colours = load_colours(np.array([1.0, 4.0, 100.0, 0.25, 0.0, np.nan]))
  alpha = colours[:, 3]
  assert alpha[0] == 0 and alpha[5] == 0
  assert (alpha[1:5] == 255).all()
  np.testing.assert_array_equal(colours[1], colours[2])
  assert (colours[1, :3] != colours[3, :3]).any()


def test_a_heatmap_per_layer_and_not_too_many():
  rng = np.random.default_rng(0)
  records = [
    {"step": s, "expert_load": rng.random((58, 4)).tolist()} for s in range(300)
  ]
  with svg.drawing():
    drawn = heatmaps(records)
    assert heatmaps([{"step": 1}]) == []
    assert heatmaps([{"step": 1, "expert_load": []}]) == []
    assert len(heatmaps(records[:1])) == 8
  assert len(drawn) == 8
  assert drawn[0].title == "MoE layer 1" and drawn[-1].title == "MoE layer 58"
  assert all(len(chart.svg) < 20_000 for chart in drawn)


def record(step, layers=2, bias=0.01):
  return {
    "step": step,
    "expert_load/max_violation": [1.5 / step] * (layers - 1) + [0.5 / step],
    "expert_bias/mean": [0.0] * layers,
    "expert_bias/std": [bias * step] * layers,
    "expert_bias/lowest": [-2 * bias * step] * layers,
    "expert_bias/highest": [3 * bias * step] * layers,
  }


def keys(chart):
  return [(key.label, key.last) for key in chart.keys]


def test_violation_and_bias_over_training():
  records = [record(step) for step in range(1, 11)]
  with svg.drawing():
    violation, bias, spread = balance_charts(records)
  assert violation.title == "Load violation"
  assert keys(violation) == [("worst layer", "0.15"), ("mean of layers", "0.1")]
  assert bias.title == "Expert bias"
  assert keys(bias) == [("highest", "0.3"), ("mean", "0"), ("lowest", "-0.2")]
  assert spread.title == "Spread of the bias"
  assert keys(spread) == [("MoE layer 1", "0.1"), ("MoE layer 2", "0.1")]


def test_what_was_not_logged_has_no_chart():
  old = {"step": 1, "expert_load": [[0.5, 0.5]]}
  broken = {"step": 2, "expert_load/max_violation": "text"}
  empty = {"step": 1, **{name: [] for name in record(1) if name != "step"}}
  unused = [record(step, bias=0.0) for step in (1, 2)]
  nulls = {"step": 1, **{k: [None] for k in record(1) if k != "step"}}
  with svg.drawing():
    for records in ([], [old], [broken], [empty], [nulls]):
      assert balance_charts(records) == []
    assert [c.title for c in balance_charts(unused)] == ["Load violation"]
    # A run that was continued by a program that logs more.
    later = balance_charts([old, record(2), record(3)])
    assert len(later) == 3
    wide = balance_charts([record(1, layers=58)])
  assert len(wide[2].keys) == 8
