"""Responses as text: R1's format, and when two short answers are equal.

Everything here reads untrusted model text in linear time and executes
nothing: no regular expression backtracks and no number is parsed whose length
is not bounded.
"""

import dataclasses
import re
from fractions import Fraction

THINK = "<think>"
END_THINK = "</think>"
ANSWER = "<answer>"
END_ANSWER = "</answer>"
_MARKERS = (THINK, END_THINK, ANSWER, END_ANSWER)

_MAX_NUMBER_CHARS = 64
_NUMBER = re.compile(
  r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+|[0-9]+/[0-9]+)", re.ASCII
)


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
  """A response, taken apart.

  Attributes:
    thinking: text between the think markers; "" if not well formed.
    answer: text between the answer markers; "" if not well formed.
    well_formed: whether the response is R1's format and nothing else.
  """

  thinking: str
  answer: str
  well_formed: bool


def parse_response(text: str) -> Response:
  """Takes `<think>...</think><answer>...</answer>` apart, strictly.

  The four markers must occur once each, in this order, with nothing before,
  between or after: no space, no second answer. What stands between the
  markers may be anything, or nothing. A response of another form has no
  answer at all, so that one cannot be smuggled in.

  Args:
    text: the completion, from its opening `<think>` on, without EOS.
  """
  body = text.removeprefix(THINK).removesuffix(END_ANSWER)
  thinking, middle, answer = body.partition(END_THINK + ANSWER)
  if (
    len(body) != len(text) - len(THINK) - len(END_ANSWER)
    or not middle
    or any(marker in thinking or marker in answer for marker in _MARKERS)
  ):
    return Response("", "", False)
  return Response(thinking, answer, True)


def answers_match(expected: str, given: str) -> bool:
  """Whether two answers are the same text, or the same plain number.

  Text is compared after stripping and joining runs of white space; case
  counts. Integers, decimals and fractions of integers (`-7`, `.50`, `3/4`)
  are compared exactly, as rationals, up to 64 characters; other number forms
  (exponents, thousands separators, percent) are text.

  Args:
    expected: the reference.
    given: any text.
  """
  expected, given = " ".join(expected.split()), " ".join(given.split())
  if expected == given:
    return True
  number = parse_number(expected)
  return number is not None and number == parse_number(given)


def parse_number(text: str) -> Fraction | None:
  """The exact value of a plain number; None for anything else.

  Args:
    text: without surrounding white space.
  """
  if len(text) > _MAX_NUMBER_CHARS or not _NUMBER.fullmatch(text):
    return None
  try:
    return Fraction(text)
  except ZeroDivisionError:  # "1/0"
    return None
