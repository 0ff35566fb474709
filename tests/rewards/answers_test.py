import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.rewards.answers import (
  Response,
  answers_match,
  parse_boxed,
  parse_number,
  parse_response,
)

ILL = Response("", "", False)


@pytest.mark.parametrize(
  ("text", "thinking", "answer"),
  [
    ("<think>a</think><answer>b</answer>", "a", "b"),
    ("<think>a\n\nb</think><answer> 5 </answer>", "a\n\nb", " 5 "),
    ("<think></think><answer></answer>", "", ""),
    ("<think>1<2>0 </ think></think><answer><b></answer>", "1<2>0 </ think>",
     "<b>"),
  ],
)  # fmt: skip
def test_the_format(text, thinking, answer):
  assert parse_response(text) == Response(thinking, answer, True)


@pytest.mark.parametrize(
  ("text", "thinking", "answer"),
  [
    (r"<think>a</think>\boxed{b}", "a", "b"),
    ("<think>\na\n</think>\n\nSo: $\\boxed{\\frac{1}{2}}$.", "\na\n",
     r"\frac{1}{2}"),
    (r"<think>\boxed{1}</think>\boxed{2} or \boxed{3}.", r"\boxed{1}", "3"),
    (r"no thinking: \boxed{}", "", ""),
    (r" <think>a</think>\boxed{5}", "a", "5"),
    (r"\boxed{a}}{", "", "a"),
  ],
)  # fmt: skip
def test_boxed_answers(text, thinking, answer):
  assert parse_boxed(text) == Response(thinking, answer, True)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "5",
    r"<think>\boxed{5}",  # in the thinking, which never ends
    r"<think>\boxed{5}</think>",
    r"<think>a</think>5",
    r"<think>a</think>\boxed{5",
    r"<think>a</think>\boxed{4} \boxed{{5}",
    r"a</think>\boxed{5}",
    r"<think>a<think>b</think>\boxed{5}",
    r"<think>a</think>\boxed{5}</think>",
    r"<think>a</think><think>\boxed{5}",
    r"<think>a</think>\fbox{5} \boxed 5",
  ],
)
def test_without_a_box_after_the_thinking_there_is_no_answer(text):
  assert parse_boxed(text) == ILL


@given(st.text("<>think/boxed{}\\ab", max_size=60))
def test_a_boxed_answer_is_of_the_text_and_balanced(text):
  response = parse_boxed(text)
  if response.well_formed:
    assert f"\\boxed{{{response.answer}}}" in text
    assert response.answer.count("{") == response.answer.count("}")


@pytest.mark.parametrize(
  "text",
  [
    "",
    "5",
    "<think>",
    "<think></answer>",
    "<think>a</think>",
    "<answer>b</answer>",
    "<think>a</think><answer>b",
    "<think>a<answer>b</answer>",
    "a</think><answer>b</answer>",
    "<think>a</think><answer>b</answer> ",
    " <think>a</think><answer>b</answer>",
    "<think>a</think>\n<answer>b</answer>",
    "<think>a</think><answer>b</answer><answer>c</answer>",
    "<think>a</think><answer>b</answer>c</answer>",
    "<think>a</think><answer>b</think><answer>c</answer>",
    "<think>a</think><answer>b<answer>c</answer>",
    "<think><think>a</think><answer>b</answer>",
    "<think>a</answer></think><answer>b</answer>",
    "<think>a</think><think>a</think><answer>b</answer>",
    "<answer>b</answer><think>a</think>",
    "<THINK>a</THINK><ANSWER>b</ANSWER>",
    "<think>a</think><answer>b</answer><eos>",
  ],
)
def test_everything_else_is_ill_formed_and_has_no_answer(text):
  assert parse_response(text) == ILL


@pytest.mark.parametrize(
  "piece",
  ["<think>", "</think><answer>", "</answer>", "</think>", "<", "<think"],
)
def test_long_hostile_text_ends(piece):
  text = piece * 200_000
  assert parse_response(text) == ILL
  assert parse_response(f"<think>{text}</answer>") == ILL


# Hypothesis tries the strings of our own source too, the markers among them.
TEXT = (st.text(st.sampled_from("ab 1<>/\n")) | st.text()).filter(
  lambda text: not re.search("</?(think|answer)>", text)
)


@given(TEXT, TEXT)
def test_round_trip(thinking, answer):
  text = f"<think>{thinking}</think><answer>{answer}</answer>"
  assert parse_response(text) == Response(thinking, answer, True)


@given(
  st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a"]),
    max_size=7,
  )
)
def test_well_formed_means_the_four_markers_in_order(pieces):
  markers = [p for p in pieces if p != "a"]
  expected = (
    markers == ["<think>", "</think>", "<answer>", "</answer>"]
    and pieces[0] != "a"
    and pieces[-1] != "a"
    and pieces.index("<answer>") == pieces.index("</think>") + 1
  )
  assert parse_response("".join(pieces)).well_formed == expected


@pytest.mark.parametrize(
  ("expected", "given"),
  [
    ("42", " 42\n"),
    ("42", "42.0"),
    ("42", "+42"),
    ("42", "042"),
    ("1/2", "0.5"),
    ("0.5", ".50"),
    ("-3/6", "-1/2"),
    ("3.", "3"),
    ("a  b", "a b"),
    ("0.1", "1/10"),
    ("1/0", "1/0"),  # as text
    ("12345678901234567890.5", "24691357802469135781/2"),
    ("9" * 1000, "9" * 1000),  # as text
  ],
)
def test_equal_answers(expected, given):
  assert answers_match(expected, given)
  assert answers_match(given, expected)


@pytest.mark.parametrize(
  ("expected", "given"),
  [
    ("42", "43"),
    ("42", ""),
    ("42", "42 or 43"),
    ("42", "4 2"),
    ("42", "x=42"),
    ("0.1", "0.1000000000000000055511151231257827"),  # equal as floats
    ("1/3", "0.3333333333333333"),
    ("1000", "1,000"),
    ("1000", "1e3"),
    ("1000", "1_000"),
    ("42", "٤٢"),
    ("42", "--42"),
    ("1/2", "1/2/1"),
    ("1/2", "1.0/2"),
    ("0", "1/0"),
    ("9" * 1000, "9" * 1000 + ".0"),  # beyond the length of numbers
    ("a", "A"),
    ("5", "9" * 100_000),
    ("5", "__import__('os')"),
    ("5", "." * 100_000),
    ("5", "1/" * 100_000),
  ],
)
def test_different_answers(expected, given):
  assert not answers_match(expected, given)
  assert not answers_match(given, expected)


@given(st.fractions(), st.integers(1, 9))
def test_fractions_equal_their_expansions(value, k):
  if len(str(value)) > 25:
    return
  text = f"{value.numerator * k}/{value.denominator * k}"
  assert parse_number(text) == value
  assert answers_match(str(value), text)


@given(st.text(), st.text())
def test_comparing_never_raises(a, b):
  answers_match(a, b)
  assert answers_match(a, a)
