"""Floats to int8 with a scale per output channel; on the host, by numpy."""

import numpy as np

INT8_MAX = 127


def quantize(w: np.ndarray, *, axis: int) -> tuple[np.ndarray, np.ndarray]:
  """Symmetric absmax: w is about values * scale, and off by scale / 2 at most.

  Args:
    w: of any float dtype.
    axis: the inputs, over which a scale is shared.

  Returns:
    values int8, the shape of `w`; scale float32, of length 1 along `axis`.

  Raises:
    ValueError: w holds numbers that are not finite.
  """
  w = w.astype(np.float32)  # a copy, which is worked in
  largest = np.maximum(
    w.max(axis=axis, keepdims=True), -w.min(axis=axis, keepdims=True)
  )
  if not np.isfinite(largest).all():
    raise ValueError(
      f"{(~np.isfinite(largest)).sum()} of {largest.size} channels hold numbers"
      " that are not finite, for which int8 has no scale. Load without quantize"
      " to look at them."
    )
  # A channel of zeros keeps any scale.
  scale = np.where(largest > 0, largest / np.float32(INT8_MAX), np.float32(1))
  w /= scale
  np.rint(w, out=w)
  # The largest number over its own scale may round to more than 127.
  np.clip(w, -INT8_MAX, INT8_MAX, out=w)
  return w.astype(np.int8), scale.astype(np.float32)
