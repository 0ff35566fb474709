"""The FP8 of published DeepSeek weights: e4m3 in blocks that share a scale.

V3 section 3.3; README_WEIGHTS and inference/kernel.py of the released code. A
weight [out, in] is stored as float8_e4m3fn with `weight_scale_inv` [ceil(out /
128), ceil(in / 128)]. Despite its name the scale is a multiplier: w = e4m3 *
scale.

Everything goes by slabs of one row of blocks, so that float32 copies stay the
size of a slab and not of the tensor.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt

BLOCK = (128, 128)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448.0
# 448 * 2^119 is the last such product within float32 and bfloat16.
_SCALE_MAX = np.float32(2.0**119)
# The released code's floor of a block's largest value: a block of zeros gets a
# scale that can divide. Below it a block uses less than e4m3's whole range.
AMAX_FLOOR = 1e-4

_UE8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Looking values up takes 60% of the time of ml_dtypes' cast.
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def dequantize(
  blocks: np.ndarray,
  scale_inv: np.ndarray,
  dtype: npt.DTypeLike,
  *,
  block: tuple[int, int] = BLOCK,
  first_row: int = 0,
  first_column: int = 0,
  shape: tuple[int, ...] | None = None,
) -> np.ndarray:
  """Weights of stored blocks, e4m3 * scale in float32, cast once.

  A part of a tensor, read alone, takes the scales of the whole tensor with
  `first_row`, `first_column` and `shape`; it may begin anywhere in a block.

  Args:
    blocks: float8_e4m3fn [out, in], or a part of it.
    scale_inv: float32 or float8_e8m0fnu [ceil(out / 128), ceil(in / 128)], of
      the whole tensor.
    dtype: of the result, such as float32 or bfloat16.
    block: rows and columns that share a scale.
    first_row: row of the tensor that is row 0 of `blocks`.
    first_column: likewise for columns.
    shape: (out, in) of the whole tensor where `blocks` is a part; None where
      `blocks` ends with the tensor's last row and column.

  Returns:
    `dtype`, the shape of `blocks`. NaN where the code is e4m3's NaN.

  Raises:
    ValueError: another dtype or shape, a part outside of the tensor, or a
      scale that is not finite or beyond 2^119.
  """
  _check_matrix("blocks", blocks, (E4M3,))
  first = (first_row, first_column)
  ends = (first_row + blocks.shape[0], first_column + blocks.shape[1])
  whole = ends if shape is None else tuple(shape)
  if (
    len(whole) != 2
    or min(first) < 0
    or any(end > size for end, size in zip(ends, whole, strict=True))
  ):
    raise ValueError(
      f"blocks {blocks.shape} that begin at row {first_row} and column"
      f" {first_column} do not lie in a tensor of shape {whole}. Correct"
      " first_row, first_column or shape."
    )
  scale = _checked_scale(scale_inv, whole, block)
  w = np.empty(blocks.shape, dtype)
  codes = blocks.view(np.uint8)
  for rows, multiplier in _slabs(blocks.shape, scale, block, first):
    w[rows] = _VALUES[codes[rows]] * multiplier
  return w


def quantize(
  w: np.ndarray, *, scale_fmt: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Blocks of 128x128 whose largest value becomes e4m3's largest, 448.

  scale = max(amax, 1e-4) / 448 with the floor of the released code, so that a
  block of zeros gives codes 0 and the scale 1e-4 / 448. Values beyond 448,
  which rounding of the scale can give, become 448: the cast would make NaN.

  Args:
    w: float32 or bfloat16 [out, in], finite.
    scale_fmt: "ue8m0" rounds each scale up to a power of two, as V3.1 and
      later; None keeps it (V3, R1).

  Returns:
    float8_e4m3fn [out, in] and float32 [ceil(out / 128), ceil(in / 128)].

  Raises:
    ValueError: another dtype, rank or `scale_fmt`, or values not finite.
  """
  _check_matrix("w", w, (np.dtype(np.float32), _BFLOAT16))
  if scale_fmt not in (None, "ue8m0"):
    raise ValueError(f"{scale_fmt=} is unknown: use None or 'ue8m0'.")
  amax = np.zeros(_scale_shape(w.shape, BLOCK), np.float32)
  starts = np.arange(0, w.shape[1], BLOCK[1])
  for i, row in enumerate(range(0, w.shape[0], BLOCK[0])):
    columns = np.abs(w[row : row + BLOCK[0]].astype(np.float32)).max(axis=0)
    if columns.size:
      amax[i] = np.maximum.reduceat(columns, starts)
  if not np.isfinite(amax).all():
    raise ValueError(
      f"{(~np.isfinite(amax)).sum()} of {amax.size} blocks of w hold values"
      " that are not finite, for which FP8 has no scale. Export an earlier"
      " checkpoint, or in bfloat16."
    )
  scale = np.maximum(amax, np.float32(AMAX_FLOOR)) / np.float32(E4M3_MAX)
  if scale_fmt == "ue8m0":
    fraction, exponent = np.frexp(scale)  # fraction in [0.5, 1)
    exponent -= fraction == 0.5
    scale = np.ldexp(np.float32(1), exponent)
  blocks = np.empty(w.shape, E4M3)
  for rows, multiplier in _slabs(w.shape, scale, BLOCK, (0, 0)):
    blocks[rows] = _rounded(w[rows], multiplier)
  return blocks, scale


def stored_blocks(
  w: np.ndarray,
  scale_inv: np.ndarray,
  *,
  block: tuple[int, int] = BLOCK,
) -> np.ndarray | None:
  """The blocks that w was dequantised from, if no entry changed since.

  So a published FP8 checkpoint goes in and out byte by byte, where a new amax
  would give other scales and other codes.

  Why rounding w / scale is enough: neighbouring e4m3 values differ by at least
  1 / 16 of the larger, and w differs from code * scale by at most 2^-9 of it
  (the rounding to bfloat16; 2^-24 to float32). That holds while code * scale is
  a normal number of w's dtype, so for all codes (the least is 2^-9) if the
  scale is at least 2^-117; published ones are near 1e-4. Below it, and for
  scale 0, several codes may give one w, and the result holds one of them. In
  any case the result is compared, so it dequantises to w bit for bit.

  Args:
    w: float32 or bfloat16 [out, in], from `dequantize(.., w.dtype)`.
    scale_inv: the scales it was dequantised with.
    block: rows and columns that share a scale.

  Returns:
    float8_e4m3fn [out, in] with `dequantize(result, scale_inv, w.dtype)` equal
    to w in every bit; None where no blocks do: an entry changed to what no code
    gives. (A NaN that came from a code is one of the two that e4m3 has.)

  Raises:
    ValueError: another dtype or shape, or a scale that is not finite or
      beyond 2^119.
  """
  _check_matrix("w", w, (np.dtype(np.float32), _BFLOAT16))
  scale = _checked_scale(scale_inv, w.shape, block)
  blocks = np.empty(w.shape, E4M3)
  codes, bits = blocks.view(np.uint8), np.dtype(f"u{w.dtype.itemsize}")
  for rows, multiplier in _slabs(w.shape, scale, block, (0, 0)):
    blocks[rows] = _rounded(w[rows], multiplier)
    again = (_VALUES[codes[rows]] * multiplier).astype(w.dtype, copy=False)
    if not np.array_equal(again.view(bits), w[rows].view(bits)):
      return None
  return blocks


def _slabs(
  shape: tuple[int, ...],
  scale: np.ndarray,
  block: tuple[int, int],
  first: tuple[int, int],
) -> Iterator[tuple[slice, np.ndarray]]:
  """(rows of a part, their scale of each column) per row of blocks."""
  columns = (np.arange(shape[1]) + first[1]) // block[1]
  row = 0
  while row < shape[0]:
    i, offset = divmod(first[0] + row, block[0])
    stop = min(row + block[0] - offset, shape[0])
    yield slice(row, stop), scale[i, columns][None]
    row = stop


def _rounded(w: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
  """The e4m3 nearest to w / scale; a scale 0 has zeros of w's sign."""
  divisor = np.where(multiplier == 0, np.float32(np.inf), multiplier)
  # A weight that training changed may be anything: beyond float32, inf or NaN.
  with np.errstate(over="ignore", invalid="ignore"):
    quotient = w.astype(np.float32) / divisor
    np.clip(quotient, -E4M3_MAX, E4M3_MAX, out=quotient)
    return quotient.astype(E4M3)


def _check_matrix(
  name: str, array: np.ndarray, dtypes: tuple[np.dtype, ...]
) -> None:
  if array.ndim != 2 or array.dtype not in dtypes:
    needed = " or ".join(str(dtype) for dtype in dtypes)
    raise ValueError(
      f"{name} is {array.dtype} {list(array.shape)}; FP8 blocks need {needed}"
      " [out, in]."
    )


def _scale_shape(
  shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, ...]:
  return tuple(-(-size // b) for size, b in zip(shape, block, strict=True))


def _checked_scale(
  scale_inv: np.ndarray, shape: tuple[int, ...], block: tuple[int, int]
) -> np.ndarray:
  """float32 scales of a whole tensor, or why they are not."""
  if scale_inv.dtype not in (np.dtype(np.float32), _UE8M0):
    raise ValueError(
      f"scale_inv is {scale_inv.dtype}; float32 or {_UE8M0} is needed."
    )
  needed = _scale_shape(shape, block)
  if scale_inv.shape != needed:
    raise ValueError(
      f"scale_inv has shape {scale_inv.shape}; a tensor {tuple(shape)} in"
      f" blocks of {block[0]}x{block[1]} needs {needed}. Give shape= where the"
      " blocks are a part of a larger tensor."
    )
  scale = scale_inv.astype(np.float32)
  bad = ~(np.abs(scale) <= _SCALE_MAX)
  if bad.any():
    raise ValueError(
      f"{bad.sum()} of {scale.size} values of scale_inv are not finite or"
      " beyond 2^119. The file is damaged, or was written by a diverged run."
    )
  return scale
