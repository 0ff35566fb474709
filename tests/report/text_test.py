import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.report import text


@given(st.text(st.characters(exclude_categories=())))
def test_visible_leaves_nothing_unseen_and_always_encodes(raw):
  shown = text.visible(raw)
  shown.encode("utf-8")
  unseen = {c for c in shown if unicodedata.category(c)[0] == "C"}
  assert unseen <= {"\n", "\t"}


def test_visible_spells_out_and_keeps():
  assert text.visible("\x1b[2J") == r"\x1b[2J"
  assert text.visible("a\u202eb\ud800") == r"a\u202eb\ud800"
  assert text.visible("\U000e0041") == r"\U000e0041"  # a tag character
  assert text.visible("two\n\tlines, é, 数") == "two\n\tlines, é, 数"


def test_shorten_says_how_much_it_left_out():
  assert text.shorten("abc", 3) == "abc"
  assert text.shorten("a" * 1500, 300).endswith(" … (1,200 more characters)")


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (0.0123456, "0.0123"),
    (1234.5, "1,234"),
    (100.0, "100"),
    (3.2e-5, "3.20e-05"),
    (0, "0"),
    (-0.5, "-0.5"),
    (float("nan"), "–"),
    (None, "–"),
    ("7", "–"),
    (True, "–"),
  ],
)
def test_significant(value, shown):
  assert text.significant(value) == shown


def test_quantities():
  assert text.percent(0.8312) == "83.1"
  assert text.percent(None) == "–"
  assert text.seconds(4.24) == "4.2 s"
  assert text.seconds(104) == "1 min 44 s"
  assert text.seconds(7260) == "2 h 1 min"
  assert text.count(512) == "512"
  assert text.count(214_000) == "214 k"
  assert text.count(8_460_000) == "8.46 M"
  assert text.count(1.43e13) == "14.3 T"
  assert text.count(3.1e24) == "3.10 × 10²⁴"
