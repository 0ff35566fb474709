"""What one rendering of a chat template may still do, and what is too large.

Sizes are characters as text, about; costs are bytes of memory, about. A list
is measured with all that it holds, so one text in it a thousand times is
counted a thousand times, as it would be written.
"""

import collections
import contextvars
import re
import string
import types
from collections.abc import Iterable, Iterator, Mapping, MappingView
from typing import Any

import jinja2
import jinja2.sandbox

MAX_WORK = 250_000_000  # of one rendering: 250,000 passes, a second or two
POINTER_COST = 8
OBJECT_COST = 100  # of a text beside its characters, or of an item of a dict

_LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_MAX_BITS = 16_384  # of a whole number; Python writes out 4300 digits, no more
_MAX_WIDTH = 999  # that a format may ask for
_FIELD_CHARS = 400  # of a number in a format, beside the width asked for
_PERCENT = re.compile(  # name, width, precision, kind
  r"%(?:\(([^()]*)\))?[#0\- +]*(\*|[0-9]*)(?:\.(\*|[0-9]*))?[hlL]?(.)", re.S
)


class RunawayError(jinja2.TemplateRuntimeError):
  """The template does more work, or builds more, than it may."""


class SizedList(list):
  """A list that knows its size, so that appending in a loop stays cheap."""

  __slots__ = ("size",)

  def __init__(self, values: list, size: int):
    super().__init__(values)
    self.size = size


class Purse:
  """What one rendering may still do.

  Attributes:
    max_chars: the largest value or output, in characters.
    work: what is left, in bytes built.
  """

  def __init__(self, max_chars: int, variables: Mapping[str, Any]):
    self.max_chars = max_chars
    self.work = max(MAX_WORK, 100 * max_chars)
    self._given: dict[int, int] = {}  # id -> size, of what outlives the purse
    for value in variables.values():
      self._remember(value)

  def _remember(self, value: Any) -> None:
    if isinstance(value, list | tuple | dict):
      for part in value.values() if isinstance(value, dict) else value:
        self._remember(part)
      self._given[id(value)] = self.size(value)

  def pay(self, cost: int) -> None:
    self.work -= cost
    if self.work < 0:
      raise RunawayError("its loops do not come to an end")

  def check(self, size: int) -> None:
    if size > self.max_chars:
      raise RunawayError(
        f"it builds a value of {size} characters or more, where"
        f" {self.max_chars} are allowed"
      )

  def size(self, value: Any) -> int:
    """About the characters of a value as text, with all that it holds."""
    if isinstance(value, str):
      return len(value) + 4
    if isinstance(value, SizedList):
      return value.size
    if isinstance(value, list | tuple | dict):
      if (known := self._given.get(id(value))) is not None:
        return known
      parts = [*value, *value.values()] if isinstance(value, dict) else value
      self.pay(POINTER_COST * len(parts))
      total = 2
      for part in parts:
        total += self.size(part)
        self.check(total)
      return total
    if isinstance(value, int):
      return 8 + value.bit_length() // 3
    if isinstance(value, types.MethodType | types.BuiltinMethodType):
      # Its text has the text of its object inside, which is not seen here.
      raise jinja2.sandbox.SecurityError("it keeps a method that is not called")
    return 16

  def charge(self, value: Any) -> Any:
    """`value`, paid for if it is a text or holds others."""
    if isinstance(value, str):
      self.pay(OBJECT_COST + len(value) * (1 if value.isascii() else 4))
    elif isinstance(value, list | tuple):
      self.pay(OBJECT_COST + POINTER_COST * len(value))
    elif isinstance(value, dict):
      self.pay(OBJECT_COST * (1 + len(value)))
    return value

  def admit(self, value: Any) -> Any:
    """A new value, or one that does the same: measured and paid for."""
    if isinstance(value, Iterator | MappingView):
      value = self._drained(value)
    if id(value) in self._given:
      return value
    if isinstance(value, str):
      self.check(len(value))
    elif isinstance(value, int):
      self.check_bits(value.bit_length())
    elif isinstance(value, list | tuple | dict):
      size = self.size(value)
      self.check(size)
      if type(value) is list:
        value = SizedList(value, size)
    return self.charge(value)

  def check_bits(self, bits: int) -> None:
    if bits > _MAX_BITS:
      raise RunawayError(f"it builds a number of {bits} bits")

  def _drained(self, values: Any) -> list:
    found: list[Any] = []
    for value in values:
      self.pay(OBJECT_COST)
      found.append(value)
      self.check(len(found))
    return found

  def join(self, between: str, texts: Iterable[str]) -> str:
    """`between.join(texts)`, stopped as soon as it is too long."""
    found: list[str] = []
    length = 0
    for text in texts:
      length += len(text) + (len(between) if found else 0)
      self.check(length)
      found.append(text)
    return self.admit(between.join(found))

  def check_replace(
    self, text: str, old: str, new: str, count: int = -1
  ) -> None:
    """Checks the length of `text.replace(old, new, count)`."""
    found = text.count(old)
    if count >= 0:
      found = min(found, count)
    self.check(len(text) + found * (len(new) - len(old)))

  def check_format(
    self, text: str, fields: Iterable[tuple[str, list[str]]], values: Any
  ) -> None:
    """Refuses a format whose result would be too large.

    Args:
      text: the format.
      fields: the name of each, "" if it has none, and its widths.
      values: that are formatted.
    """
    total, names = len(text), collections.Counter[str]()
    for name, widths in fields:
      total += _FIELD_CHARS
      names[str(int(name)) if name.isdecimal() else name] += 1
      for width in filter(None, widths):
        if not width.isdecimal() or len(width) > 9 or int(width) > _MAX_WIDTH:
          raise RunawayError(f"it formats with a width over {_MAX_WIDTH}")
        total += int(width)
    del names[""]  # a value without a name is written once
    repeats = max(names.values(), default=1)
    self.check(total + repeats * self.size(values))


# The purse of the rendering under way; there is none while one compiles.
current: contextvars.ContextVar[Purse] = contextvars.ContextVar("purse")


def count_lines(text: str) -> int:
  """How many pieces `text.splitlines()` has, at most."""
  return 1 + sum(map(text.count, _LINE_ENDS))


def percent_fields(text: str) -> Iterator[tuple[str, list[str]]]:
  """Name and widths of each field of a format with %."""
  for name, width, precision, kind in _PERCENT.findall(text):
    if kind not in "diouxXeEfFgGcrsa%":
      raise ValueError(f"no format that is known: {kind!r}")
    yield name, [width, precision]


def brace_fields(text: str) -> Iterator[tuple[str, list[str]]]:
  """Name and widths of each field of a format with {}."""
  for _, name, spec, _ in string.Formatter().parse(text):
    if name is not None:  # the widths of {:{}} are "{", which is no number
      yield re.split(r"[.\[]", name)[0], re.findall(r"\d+|\{", spec or "")
