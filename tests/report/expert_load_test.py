import numpy as np

from rlm.report import svg
from rlm.report.expert_load import heatmaps, load_colours, load_over_even


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
