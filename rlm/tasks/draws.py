"""Uniform draws from a hash: the same on every machine and version.

A problem must be a pure function of (seed, index), cheap enough to be made
tens of thousands of times at start-up. One SHA-256 holds 256 random bits,
enough for most problems, and costs about a microsecond; seeding a numpy
Generator costs fifteen, and its streams may change between numpy versions.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")

_BLOCK_BITS = 256
_SPARE_BITS = 64  # bias of `below` stays under 2**-64


class RandomSource(Protocol):
  """Anything with `random()`: Draws, numpy's Generator, random.Random."""

  def random(self) -> float:
    """A float in [0, 1)."""


class Draws:
  """A stream of uniform draws named by its key.

  Two streams of different keys are independent; equal keys give equal
  streams. Keys are compared by their text, so 3 and numpy.int64(3) agree.
  """

  __slots__ = ("_bits", "_block", "_key", "_range")

  def __init__(self, *key: object):
    self._key = "\x1f".join(map(str, key)).encode()
    self._block = 0
    self._bits = 0  # uniform in [0, _range)
    self._range = 1

  def below(self, n: int) -> int:
    """A uniform integer in [0, n).

    Args:
      n: at least 1 and below 2**192.
    """
    if self._range >> _SPARE_BITS < n:
      digest = hashlib.sha256(b"%s\x1f%d" % (self._key, self._block)).digest()
      self._block += 1
      self._bits = int.from_bytes(digest, "big")
      self._range = 1 << _BLOCK_BITS
    self._range //= n
    self._bits, value = divmod(self._bits, n)
    return value

  def random(self) -> float:
    """A uniform float in [0, 1) of 53 random bits."""
    return self.below(1 << 53) / (1 << 53)

  def shuffled(self, items: Sequence[T]) -> list[T]:
    """A copy of `items` in random order (Fisher-Yates)."""
    copy = list(items)
    for i in range(len(copy) - 1, 0, -1):
      j = self.below(i + 1)
      copy[i], copy[j] = copy[j], copy[i]
    return copy
