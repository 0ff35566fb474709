"""Rotary positions, with YaRN's and Llama 3's stretched frequencies.

Two layouts of the pairs that turn by `position * frequency_i`: DeepSeek
releases them interleaved, dims (2i, 2i + 1); Qwen and Llama in halves, dims
(i, R / 2 + i). YaRN is arXiv:2309.00071.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rlm.models.config import Llama3Scaling, YarnScaling

Scaling = YarnScaling | Llama3Scaling | None


def rope_frequencies(dim: int, theta: float, scaling: Scaling) -> np.ndarray:
  """Angle per position of each pair.

  Args:
    dim: R, even.
    theta: base of the geometric series.
    scaling: how the context was stretched, or None for plain RoPE.

  Returns:
    float32 [R / 2], radians per position.
  """
  frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
  if isinstance(scaling, YarnScaling):
    frequencies = _yarn(frequencies, dim, theta, scaling)
  elif isinstance(scaling, Llama3Scaling):
    frequencies = _llama3(frequencies, scaling)
  return frequencies.astype(np.float32)


def _yarn(frequencies, dim: int, theta: float, scaling: YarnScaling):
  """YaRN eq. 22-23.

  Pairs that turn more than `beta_fast` times over the original length keep
  their frequency, those below `beta_slow` turns are slowed by `factor`, and a
  ramp that is linear in the pair's index joins them.
  """

  def pair_turning(turns: float) -> float:
    length = scaling.original_max_position_embeddings
    return dim * math.log(length / (turns * 2 * math.pi)) / 2 / math.log(theta)

  low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
  high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
  # As released: a ramp of no width would divide by zero.
  width = max(high - low, 0.001)
  ramp = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
  return frequencies * (1 - ramp) + frequencies / scaling.factor * ramp


def _llama3(frequencies, scaling: Llama3Scaling):
  """Llama 3.1's released rule: as YaRN, but the ramp is linear in the turns."""
  length = scaling.original_max_position_embeddings
  turns = length * frequencies / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  keep = np.clip((turns - low) / (high - low), 0, 1)
  return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def yarn_mscale(factor: float, mscale: float) -> float:
  """YaRN's magnitude, 0.1 * mscale * ln(factor) + 1; 1 at factor <= 1."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(qk_head_dim: int, scaling: Scaling) -> float:
  """Factor on the attention scores, qk_head_dim^-0.5 times YaRN's m^2.

  The magnitude m(mscale_all_dim) counts once for the query and once for the
  key, and for the part without positions too (reference code of V3).
  """
  scale = qk_head_dim**-0.5
  if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
    scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
  return scale


def rope_magnitude(scaling: Scaling) -> float:
  """Factor on cos and sin, m(mscale) / m(mscale_all_dim): 1 in V2 and V3."""
  if not isinstance(scaling, YarnScaling):
    return 1.0
  return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
    scaling.factor, scaling.mscale_all_dim
  )


def rope_rotations(
  positions: jax.Array, dim: int, theta: float, scaling: Scaling
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of every pair at every position.

  Args:
    positions: int32 [B, T].
    dim: R.
    theta: base.
    scaling: how the context was stretched, or None.

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


def apply_half_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates pairs whose members lie half a head apart, in float32.

  Args:
    x: [B, T, N, R].
    cos: float32 [B, T, R / 2] of `rope_rotations`.
    sin: likewise.

  Returns:
    The rotated `x`, in its dtype.
  """
  cos, sin = cos[:, :, None], sin[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, first * sin + second * cos]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
