"""Arithmetic expressions in model text: parsed by hand, never executed.

  sum     = product (("+" | "-") product)*
  product = atom (("*" | "/") atom)*
  atom    = digits | "(" sum ")"

Length, digits and depth are bounded before any work, so that hostile text
costs nothing; there are no powers, names, signs or functions.
White space may stand between tokens.
"""

import re
from fractions import Fraction

_MAX_CHARS = 256
_MAX_DIGITS = 6
_MAX_DEPTH = 16
_TOKEN = re.compile(r"[0-9]+|[-+*/()]|\s+|.", re.DOTALL)


class _Malformed(ValueError):
  """The text is no expression of the grammar."""


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
  """Exact value of an expression and the numbers written in it.

  Args:
    text: any text.

  Returns:
    The value and the numbers, left to right; None if `text` is no
    expression, exceeds a bound or divides by zero.
  """
  text = text.strip()
  if len(text) > _MAX_CHARS:
    return None
  parser = _Parser([t for t in _TOKEN.findall(text) if not t.isspace()])
  try:
    value = parser.sum(depth=0)
    parser.expect_end()
  except (_Malformed, ZeroDivisionError):
    return None
  return value, parser.numbers


class _Parser:
  """Recursive descent over a list of tokens."""

  def __init__(self, tokens: list[str]):
    self._tokens = [*tokens, ""]
    self._at = 0
    self.numbers: list[int] = []

  def sum(self, depth: int) -> Fraction:
    value = self._product(depth)
    while (sign := self._take("+-")) is not None:
      term = self._product(depth)
      value = value + term if sign == "+" else value - term
    return value

  def expect_end(self) -> None:
    if self._tokens[self._at]:
      raise _Malformed

  def _product(self, depth: int) -> Fraction:
    value = self._atom(depth)
    while (sign := self._take("*/")) is not None:
      factor = self._atom(depth)
      value = value * factor if sign == "*" else value / factor
    return value

  def _atom(self, depth: int) -> Fraction:
    if self._take("(") is not None:
      if depth == _MAX_DEPTH:
        raise _Malformed
      value = self.sum(depth + 1)
      if self._take(")") is None:
        raise _Malformed
      return value
    token = self._tokens[self._at]
    # The token rule admits ASCII digits only; int() would take others too.
    if token[:1] not in set("0123456789") or len(token) > _MAX_DIGITS:
      raise _Malformed
    self._at += 1
    self.numbers.append(int(token))
    return Fraction(self.numbers[-1])

  def _take(self, choices: str) -> str | None:
    """The next token if it is one of the characters `choices`."""
    token = self._tokens[self._at]
    if token and token in choices:
      self._at += 1
      return token
    return None
