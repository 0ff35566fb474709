import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlm.report import svg


def draw(label="a figure", ylabel="y"):
  with svg.drawing():
    figure, axes = svg.make_axes()
    axes.plot([0, 1, 2], [1.0, 3.0, 2.0], color=svg.COLOURS["line1"])
    axes.imshow(np.zeros((2, 2, 4), np.uint8), extent=(0, 1, 0, 1))
    axes.set_ylabel(ylabel)
    svg.style_values(axes, log=False, fraction=True)
    svg.style_steps(axes)
    return svg.to_svg(figure, label)


def test_a_figure_follows_the_theme_and_loads_nothing():
  drawn = draw()
  assert "var(--line1)" in drawn
  assert not re.search(r"#[0-9a-f]{6}", drawn), "a colour of no theme"
  assert "http" not in drawn
  assert "font-family" not in drawn
  assert "<text" in drawn  # text, not outlines
  assert 'href="data:image/png' in drawn


def test_hostile_labels_are_escaped_and_no_mathematics():
  drawn = draw('"><script>alert(1)</script>', "<b>$x_1$</b>")
  assert "<script" not in drawn
  assert "&lt;b&gt;$x_1$&lt;/b&gt;" in drawn
  ET.fromstring(drawn)  # still well-formed


def test_drawing_leaves_the_users_settings_alone():
  before = dict(matplotlib.rcParams)
  draw()
  assert dict(matplotlib.rcParams) == before


def test_figures_of_one_page_do_not_share_clip_paths():
  ids = [set(re.findall(r' id="(.*?)"', draw(label))) for label in ("a", "b")]
  assert ids[0] and not ids[0] & ids[1]


@given(st.floats(1e-9, 1e6), st.floats(1.5, 1e12))
def test_log_ticks_are_few_and_inside(low, ratio):
  ticks = svg.log_ticks(low, low * ratio)
  assert len(ticks) <= 5
  assert all(low <= tick <= low * ratio for tick in ticks)
  if ratio > 10:
    assert ticks


def test_ramp_is_distinct_as_far_as_it_can_be():
  assert svg.ramp(0) == []
  for n in range(2, 9):
    assert len(set(svg.ramp(n))) == n
  assert len(svg.ramp(20)) == 20
