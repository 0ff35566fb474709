import numpy as np
import pytest

from rlm.config import build
from rlm.optim.config import ScheduleConfig
from rlm.optim.schedule import batch_rows, make_schedule

V3 = dict(
  peak=2.2e-4,
  phases=(
    dict(shape="linear", steps=4, factor=1.0),
    dict(shape="constant", steps=3, factor=1.0),
    dict(shape="cosine", steps=4, factor=0.1),
    dict(shape="constant", steps=2, factor=0.1),
    dict(shape="constant", steps=1, factor=7.3e-6 / 2.2e-4),
  ),
)


def test_the_shape_of_deepseek_v3():
  schedule = make_schedule(build(ScheduleConfig, V3))
  rates = [float(schedule(step)) for step in range(20)]
  expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
  expected += [1 - 0.9 * (1 - np.cos(np.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
  expected += [0.1, 0.1]
  np.testing.assert_allclose(rates[:13], 2.2e-4 * np.array(expected), rtol=1e-5)
  np.testing.assert_allclose(rates[13:], 7.3e-6, rtol=1e-5)


def test_rates_are_float32():
  schedule = make_schedule(build(ScheduleConfig, V3))
  assert {schedule(step).dtype for step in range(20)} == {np.dtype("float32")}


def test_a_number_holds_for_ever():
  assert make_schedule(0.25)(7) == 0.25


@pytest.mark.parametrize(
  ("section", "message"),
  [
    (dict(peak=0.1, phases=()), "at least one phase"),
    (
      dict(peak=0.1, phases=(dict(shape="linear", steps=0, factor=1.0),)),
      "steps >= 1",
    ),
    (
      dict(peak=0.1, phases=(dict(shape="cosin", steps=1, factor=1.0),)),
      "did you mean 'cosine'",
    ),
  ],
)
def test_impossible_schedules_are_refused(section, message):
  with pytest.raises(ValueError, match=message):
    build(ScheduleConfig, section)


def test_the_batch_ramps_in_whole_microbatches():
  ramp = dict(first_rows=4, last_rows=12, ramp_steps=8, multiple=4)
  rows = [batch_rows(step, **ramp) for step in range(10)]
  assert rows == [4, 4, 4, 4, 8, 8, 8, 8, 12, 12]
  ramp["ramp_steps"] = 0
  assert batch_rows(0, **ramp) == 12


def test_a_ramp_that_does_not_split_is_refused():
  with pytest.raises(ValueError, match="does not split into microbatches of 4"):
    batch_rows(0, first_rows=6, last_rows=12, ramp_steps=8, multiple=4)
