"""Rotary positions: interleaved RoPE and YaRN's stretched frequencies.

Pairs are interleaved as DeepSeek releases them: dims (2i, 2i + 1) form one
complex number that turns by `position * frequency_i`. YaRN is arXiv:2309.00071.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rlm.models.config import RopeScaling


def rope_frequencies(
  dim: int, theta: float, scaling: RopeScaling | None
) -> np.ndarray:
  """Angle per position of each pair.

  With YaRN, pairs that turn more than `beta_fast` times over the original
  length keep their frequency, those below `beta_slow` turns are slowed by
  `factor`, and a linear ramp joins them (YaRN eq. 22-23).

  Args:
    dim: R, even.
    theta: base of the geometric series.
    scaling: YaRN's settings, or None for plain RoPE.

  Returns:
    float32 [R / 2], radians per position.
  """
  frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
  if scaling is None:
    return frequencies.astype(np.float32)

  def pair_turning(turns: float) -> float:
    length = scaling.original_max_position_embeddings
    return dim * math.log(length / (turns * 2 * math.pi)) / 2 / math.log(theta)

  low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
  high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
  # As released: a ramp of no width would divide by zero.
  width = max(high - low, 0.001)
  ramp = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
  slowed = frequencies / scaling.factor
  return (frequencies * (1 - ramp) + slowed * ramp).astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
  """YaRN's magnitude, 0.1 * mscale * ln(factor) + 1; 1 at factor <= 1."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(qk_head_dim: int, scaling: RopeScaling | None) -> float:
  """Factor on the attention scores, qk_head_dim^-0.5 times YaRN's m^2.

  The magnitude m(mscale_all_dim) counts once for the query and once for the
  key, and for the part without positions too (reference code of V3).
  """
  scale = qk_head_dim**-0.5
  if scaling is not None and scaling.mscale_all_dim:
    scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
  return scale


def rope_magnitude(scaling: RopeScaling | None) -> float:
  """Factor on cos and sin, m(mscale) / m(mscale_all_dim): 1 in V2 and V3."""
  if scaling is None:
    return 1.0
  return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
    scaling.factor, scaling.mscale_all_dim
  )


def rope_rotations(
  positions: jax.Array, dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of every pair at every position.

  Args:
    positions: int32 [B, T].
    dim: R.
    theta: base.
    scaling: YaRN's settings or None.

  Returns:
    cos, sin: float32 [B, T, R / 2].
  """
  frequencies = jnp.asarray(rope_frequencies(dim, theta, scaling))
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  magnitude = rope_magnitude(scaling)
  return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates interleaved pairs, in float32.

  Args:
    x: [B, T, R] or [B, T, N, R].
    cos: float32 [B, T, R / 2] of `rope_rotations`.
    sin: likewise.

  Returns:
    The rotated `x`, in its dtype.
  """
  if x.ndim == 4:
    cos, sin = cos[:, :, None], sin[:, :, None]
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
  return rotated.reshape(x.shape).astype(x.dtype)
