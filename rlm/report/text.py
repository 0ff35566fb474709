"""Text that strangers wrote, made safe to show; figures, made short to read.

Model output and user prompts may hold anything: terminal escapes, characters
that reverse the line, halves of surrogate pairs that no encoder accepts.
`visible` spells those out. Escaping for HTML is the template's job (jinja2
autoescape), and rich markup is avoided by using rich.text.Text.
"""

import math
import unicodedata
from typing import TypeGuard

# Cc control, Cf format (bidirectional overrides, zero width), Cs lone
# surrogate, Co private use, Cn unassigned, Zl and Zp separators: unseen, or
# able to change what is seen around them.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_KEPT = frozenset("\n\t")


def visible(text: str) -> str:
  r"""`text` with every unseen character spelt as an escape.

  Newlines and tabs stay; an escape character becomes the four characters
  `\x1b`, a right-to-left override `\u202e`. The result encodes as UTF-8 and
  cannot move a cursor, colour a terminal or reorder a line.
  """
  if text.isprintable():
    return text
  return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
  if character in _KEPT or unicodedata.category(character) not in _UNSEEN:
    return character
  code = ord(character)
  if code < 0x100:
    return f"\\x{code:02x}"
  return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shorten(text: str, limit: int) -> str:
  """The first `limit` characters, and a count of those left out."""
  if len(text) <= limit:
    return text
  return f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def is_number(value: object) -> TypeGuard[float]:
  """A finite int or float; null, NaN, text and booleans are not."""
  return (
    isinstance(value, (int, float))
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def percent(fraction: object) -> str:
  """0.8312 -> "83.1"; "–" for what was not measured."""
  return f"{100 * fraction:.1f}" if is_number(fraction) else "–"


def significant(value: object, digits: int = 3) -> str:
  """A figure with `digits` significant digits: 0.0123, 1,234, 3.2e-05."""
  if not is_number(value):
    return "–"
  if value == 0:
    return "0"
  magnitude = math.floor(math.log10(abs(value)))
  if magnitude < -4 or magnitude > 6:
    return f"{value:.{digits - 1}e}"
  text = f"{value:,.{max(0, digits - 1 - magnitude)}f}"
  return text.rstrip("0").rstrip(".") if "." in text else text


def seconds(value: object) -> str:
  """4.2 -> "4.2 s", 104 -> "1 min 44 s", 7260 -> "2 h 1 min"."""
  if not is_number(value):
    return "–"
  if value < 10:
    return f"{value:.1f} s"
  whole = round(value)
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    return f"{whole // 60} min {whole % 60} s"
  return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(value: object) -> str:
  """1234567 -> "1.23 M"; for tokens, parameters and FLOPs."""
  if not is_number(value):
    return "–"
  if abs(value) >= 1e18:
    mantissa, exponent = f"{value:.2e}".split("e")
    superscript = str(int(exponent)).translate(
      str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    )
    return f"{mantissa} × 10{superscript}"
  for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
    if abs(value) >= size:
      return f"{value / size:.3g} {unit}"
  if abs(value) >= 1e4:
    return f"{value / 1e3:.3g} k"
  return f"{value:,.0f}"
