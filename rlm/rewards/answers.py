"""Responses as text: where their answer is, and when two answers are equal.

Everything here reads untrusted model text in linear time and executes
nothing: no regular expression backtracks and no number is parsed whose length
is not bounded.
"""

import dataclasses
import re
from collections.abc import Callable
from fractions import Fraction

THINK = "<think>"
END_THINK = "</think>"
ANSWER = "<answer>"
END_ANSWER = "</answer>"
_BOXED = r"\boxed{"
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
    answer: the final answer; "" if not well formed.
    well_formed: whether the response has its format and nothing else.
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


def parse_boxed(text: str) -> Response:
  r"""Takes `<think>...</think> ... \boxed{answer} ...` apart.

  The form of the published R1 models and of Qwen's. The thinking may be left
  out, for models that do not think; begun, it must end, once. What stands in
  the last `\boxed{}` after it is the answer, its braces balanced; a box within
  the thinking is none, and one that does not end spoils those before it.

  Args:
    text: the response, what the prompt opened of it included, without EOS.
  """
  text = text.lstrip()
  thinking, ended, rest = text.partition(END_THINK)
  if not ended:
    thinking, rest = "", text
  elif not thinking.startswith(THINK):
    return Response("", "", False)
  thinking = thinking.removeprefix(THINK)
  answer = _last_boxed(rest)
  if answer is None or any(m in thinking + rest for m in (THINK, END_THINK)):
    return Response("", "", False)
  return Response(thinking, answer, True)


def _last_boxed(text: str) -> str | None:
  """What the last box of a text holds; None where it has none, or no end."""
  start = text.rfind(_BOXED)
  if start < 0:
    return None
  start += len(_BOXED)
  depth = 1
  for i, character in enumerate(text[start:], start):
    depth += (character == "{") - (character == "}")
    if depth == 0:
      return text[start:i]
  return None


# Answer format -> what takes a response of it apart.
PARSERS: dict[str, Callable[[str], Response]] = {
  "tags": parse_response,
  "boxed": parse_boxed,
}


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
