import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlm.report.series import Series, decimate, nested, series, smooth


def make(values):
  return Series(np.arange(len(values), dtype=float), np.array(values, float))


def test_series_skips_what_is_no_finite_number():
  records = [
    {"step": 1, "kl": 0.5},
    {"step": 2, "kl": None},
    {"step": 3, "kl": float("nan")},
    {"step": 4},
    {"step": 5, "kl": "0.5"},
    {"step": 6, "kl": True},
    {"kl": 0.5},
    {"step": 7, "kl": 2},
  ]
  data = series(records, "kl")
  np.testing.assert_array_equal(data.steps, [1, 7])
  np.testing.assert_array_equal(data.values, [0.5, 2])
  assert len(series(records, "other")) == 0


def test_nested_reads_lists_and_drops_other_shapes():
  records = [
    {"step": 1, "load": [[1, 2], [3, None]]},
    {"step": 2, "load": [[1, 2, 3]]},
    {"step": 3, "load": [[1], [2, 3]]},
    {"step": 4, "load": [[5, 6], [7, 8]]},
    {"step": 5, "load": 3},
  ]
  steps, values = nested(records, "load")
  np.testing.assert_array_equal(steps, [1, 4])
  assert values.shape == (2, 2, 2)
  assert np.isnan(values[0, 1, 1])
  assert nested(records, "absent")[1].size == 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=500))
def test_decimate_is_short_and_keeps_the_extremes(values):
  data = make(values)
  thin = decimate(data, 20)
  assert len(thin) <= 40
  assert thin.values.max() == data.values.max()
  assert thin.values.min() == data.values.min()
  assert (np.diff(thin.steps) > 0).all()


@given(st.integers(1, 400), st.floats(-5, 5))
def test_smooth_keeps_a_constant_and_stays_within_range(n, constant):
  np.testing.assert_allclose(
    smooth(make([constant] * n), 50).values, constant, atol=1e-9
  )


def test_smooth_is_a_moving_average_over_a_twentieth():
  values = np.zeros(200)
  values[100] = 11.0  # window: 5 on each side
  drawn = smooth(make(values), 1000)
  assert drawn.values.max() == 1.0
  assert (drawn.values > 0.5).sum() == 11
  assert len(smooth(make(values), 50)) == 50
