"""Splits what a model writes into thinking and answer, while it streams.

The text alternates: `<think>` opens thinking, `</think>` ends it, and both
leave the text. Only the marker that changes the state counts; the other one,
such as a `<think>` within thinking, is ordinary text, and so is an unfinished
marker at the end. Whitespace stays as it came.

Where a completion starts depends on the prompt. R1's ends with `<think>`, so
that the completion starts inside (`starts_inside=True`); R1-0528 opens thinking
itself; V3.1 without thinking has `</think>` in the prompt and starts outside.
`opens_thinking` tells by the rendered prompt.
"""

from typing import Literal

from rlm.data.tokenizer import END_THINK, THINK

Kind = Literal["thinking", "answer"]


class ThinkingParser:
  """Tells thinking from answer in a text that arrives in pieces.

  Only a possible beginning of a marker is held back, at most seven characters;
  everything else comes out of the `push` that brought it.

  pieces = [piece for text in texts for piece in parser.push(text)]
  pieces += parser.finish()

  Args:
    starts_inside: the prompt has opened thinking already.
  """

  def __init__(self, starts_inside: bool):
    self._starts_inside = starts_inside
    self._inside = starts_inside
    self._held = ""

  @property
  def inside(self) -> bool:
    """Whether the text that comes next is thinking, as far as is known."""
    return self._inside

  def push(self, text: str) -> list[tuple[Kind, str]]:
    """What this text completes: (kind, text) in order, without empty texts."""
    pieces: list[tuple[Kind, str]] = []
    rest = self._held + text
    while True:
      marker = END_THINK if self._inside else THINK
      before, found, after = rest.partition(marker)
      if not found:
        break
      pieces += self._piece(before)
      self._inside = not self._inside
      rest = after
    held = _marker_prefix(rest, marker)
    pieces += self._piece(rest[: len(rest) - held])
    self._held = rest[len(rest) - held :]
    return pieces

  def finish(self) -> list[tuple[Kind, str]]:
    """What was held back, as text; ready for the next completion."""
    pieces = self._piece(self._held)
    self._inside, self._held = self._starts_inside, ""
    return pieces

  def _piece(self, text: str) -> list[tuple[Kind, str]]:
    return [("thinking" if self._inside else "answer", text)] if text else []


def split_thinking(text: str, starts_inside: bool = False) -> tuple[str, str]:
  """(thinking, answer) of a whole completion; each joined if it comes in parts.

  Args:
    text: the completion.
    starts_inside: the prompt has opened thinking already.
  """
  parser = ThinkingParser(starts_inside)
  pieces = [*parser.push(text), *parser.finish()]
  thinking = "".join(part for kind, part in pieces if kind == "thinking")
  answer = "".join(part for kind, part in pieces if kind == "answer")
  return thinking, answer


def opens_thinking(prompt: str) -> bool:
  """Whether a rendered prompt ends inside thinking, as R1's does."""
  return prompt.rstrip().endswith(THINK)


def _marker_prefix(text: str, marker: str) -> int:
  """Length of the longest end of a text that a marker may begin with."""
  for length in range(min(len(text), len(marker) - 1), 0, -1):
    if text.endswith(marker[:length]):
      return length
  return 0
