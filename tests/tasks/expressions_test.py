import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.tasks.expressions import evaluate


@pytest.mark.parametrize(
  ("text", "value", "numbers"),
  [
    ("7", 7, [7]),
    ("1+2*3", 7, [1, 2, 3]),
    ("(1+2)*3", 9, [1, 2, 3]),
    ("9-4-3", 2, [9, 4, 3]),
    ("12/4/3", 1, [12, 4, 3]),
    ("1/3*3", 1, [1, 3, 3]),
    ("7/2", Fraction(7, 2), [7, 2]),
    ("((2))*((3))", 6, [2, 3]),
    (" 1 +\n2 ", 3, [1, 2]),
    ("3-5", -2, [3, 5]),
    ("999999", 999999, [999999]),
  ],
)
def test_values(text, value, numbers):
  assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
  "text",
  [
    "",
    " ",
    "()",
    "1+",
    "+1",
    "-1",
    "1 2",
    "1)(2",
    "(1",
    "1)",
    "(1)(2)",
    "2(3)",
    "1++2",
    "2**3",
    "9**9**9**9",
    "7//2",
    "1.5",
    "1e5",
    "0x10",
    "1_000",
    "1/0",
    "1/(2-2)",
    "1234567",  # more digits than any number of a problem
    "9" * 100_000,
    "(" * 100_000,
    "(" * 100 + "1" + ")" * 100,
    "1+" * 100_000 + "1",
    "-" * 100_000,
    "__import__('os').system('true')",
    "1 if 1 else 2",
    "١+٢",  # digits that int() would take
    "1\u00d72",
    "1\x00",
    "1;2",
  ],
)
def test_everything_else_is_refused(text):
  assert evaluate(text) is None


def test_bounds_are_where_they_say():
  deepest = "(" * 16 + "1" + ")" * 16
  assert evaluate(deepest) == (1, [1])
  assert evaluate(f"({deepest})") is None
  longest = "1+" * 127 + "12"
  assert len(longest) == 256
  assert evaluate(longest) is not None
  assert evaluate(longest + "3") is None


@given(
  st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
      lambda parts: f"({''.join(parts)})"
    ),
    max_leaves=8,
  )
)
def test_agrees_with_python_on_exact_fractions(text):
  exact = re.sub(r"(\d+)", r"Fraction(\1)", text)
  try:
    expected = eval(exact, {"Fraction": Fraction})
  except ZeroDivisionError:
    expected = None
  found = evaluate(text)
  assert (found[0] if found else None) == expected


@given(st.text())
def test_never_raises(text):
  evaluate(text)


@given(st.text("0123456789+-*/() ", max_size=60))
def test_never_raises_on_near_misses(text):
  evaluate(text)
