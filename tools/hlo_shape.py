"""Shapes of HLO text: element types, layouts, tiles and memory spaces."""

import dataclasses
import math
import re

# Bits of an element; XLA packs those of less than 8 where the layout says so.
_BITS = {
  "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4,
  "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
  "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
  "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
ARRAY = re.compile(
  r"(?P<dtype>[a-z]\w*)\[(?P<dims>[^\]]*)\](?:\{(?P<layout>[^{}]*)\})?"
)
COMMENT = re.compile(r"/\*.*?\*/")


class HloError(ValueError):
  """Text, or a construct in it, that is not understood."""


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array's or a tuple's shape.

  Attributes:
    dtype: XLA's name, such as `bf16`; "tuple" for a tuple.
    dims: sizes; of a dynamic dimension, its bound.
    minor_to_major: dimensions from the fastest to the slowest in memory.
    tiles: of the layout, outermost first: (8, 128), (2, 1) for bfloat16.
    memory_space: 0 is HBM; on TPU 1 is VMEM, 2 sync flags, 5 host, 6 SMEM.
    elements: shapes of a tuple's elements.
  """

  dtype: str
  dims: tuple[int, ...] = ()
  minor_to_major: tuple[int, ...] = ()
  tiles: tuple[tuple[int, ...], ...] = ()
  memory_space: int = 0
  elements: tuple["Shape", ...] = ()

  @property
  def arrays(self) -> tuple["Shape", ...]:
    """The arrays in it, nested tuples opened."""
    if self.dtype != "tuple":
      return (self,)
    return tuple(a for e in self.elements for a in e.arrays)

  @property
  def size(self) -> int:
    """Elements, of all arrays."""
    if self.dtype == "tuple":
      return sum(a.size for a in self.arrays)
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Bytes of all arrays without the padding of tiles."""
    return sum(-(-a.size * _bits(a.dtype) // 8) for a in self.arrays)

  @property
  def padded_bytes(self) -> int:
    """Bytes of all arrays as they lie in memory, padded to whole tiles."""
    return sum(_padded_bytes(a) for a in self.arrays)

  @property
  def rows_and_lanes(self) -> tuple[int, int]:
    """Sizes of the second fastest and the fastest dimension, else 1."""
    order = self.minor_to_major or tuple(reversed(range(len(self.dims))))
    sizes = [self.dims[d] for d in order[:2]] + [1, 1]
    return sizes[1], sizes[0]

  def __str__(self) -> str:
    if self.dtype == "tuple":
      return f"({', '.join(map(str, self.elements))})"
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def parse_shape(text: str) -> Shape:
  """A shape as HLO prints it, such as `(s32[], bf16[8,128]{1,0:T(8,128)})`.

  Raises:
    HloError: it is no shape.
  """
  shape, rest = _shape(COMMENT.sub("", text).strip())
  if rest:
    raise HloError(f"not a shape: {text!r}")
  return shape


def _shape(text: str) -> tuple[Shape, str]:
  """A shape at the start of the text, and the rest of the text."""
  if text.startswith("("):
    elements, rest = [], text[1:].lstrip()
    while not rest.startswith(")"):
      element, rest = _shape(rest)
      elements.append(element)
      rest = rest.lstrip().removeprefix(",").lstrip()
    return Shape("tuple", elements=tuple(elements)), rest[1:]
  array = ARRAY.match(text)
  if not array:
    raise HloError(f"not a shape: {text[:80]!r}")
  _bits(array["dtype"])
  layout = array["layout"] or ""
  order, _, properties = layout.partition(":")
  tiles = re.search(r"T((?:\([\d,*-]*\))+)", properties)
  space = re.search(r"S\((\d+)\)", properties)
  dims = array["dims"].replace("<=", "").replace("?", "")
  return Shape(
    dtype=array["dtype"],
    dims=tuple(int(d) for d in dims.split(",") if d.strip()),
    minor_to_major=tuple(int(d) for d in order.split(",") if d.strip()),
    tiles=tuple(
      tuple(int(d) for d in t.split(",") if d.strip().isdigit())
      for t in re.findall(r"\(([^)]*)\)", tiles[1] if tiles else "")
    ),
    memory_space=int(space[1]) if space else 0,
  ), text[array.end() :]


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  if dtype.startswith("f8e"):  # f8e4m3fn, f8e5m2, f8e8m0fnu, ...
    return 8
  raise HloError(f"unknown element type {dtype!r}")


def _padded_bytes(a: Shape) -> int:
  if not a.tiles or not a.dims:
    return -(-a.size * _bits(a.dtype) // 8)
  order = a.minor_to_major or tuple(reversed(range(len(a.dims))))
  sizes = [a.dims[d] for d in reversed(order)]  # slowest first
  tile = a.tiles[0]
  # A tile longer than the shape covers dimensions of size 1 in front of it.
  sizes = [1] * (len(tile) - len(sizes)) + sizes
  for k, t in enumerate(reversed(tile), 1):
    if t:
      sizes[-k] = -(-sizes[-k] // t) * t
  return -(-math.prod(sizes) * _bits(a.dtype) // 8)
