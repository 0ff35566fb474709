"""What rounding to bfloat16 took from an output, in half a byte a number.

A backward pass needs delta, the sum of d_out * out. Of a rounded `out` it is
off by up to 2^-8 of its terms, which is noise in the gradient of a query that
looks at one key, where nothing should be. With four bits more it is off by a
fourteenth of that.
"""

import jax
import jax.numpy as jnp

# Steps of what is kept, to each side, up to half a unit in the last place.
_STEPS = 7
# A bfloat16 has 8 bits, so half a unit in the last place of 2^e is 2^(e - 8).
_STEPS_OF_POWER = _STEPS * 2.0**8
# Zero has no reciprocal; and of less, what rounding took may be subnormal.
_LEAST = 2.0**-100
_EXPONENT = 0x7F800000


def _power_of_two(out: jax.Array) -> jax.Array:
  """The greatest that is no more than |out|, float32; 0 of 0."""
  bits = jax.lax.bitcast_convert_type(out.astype(jnp.float32), jnp.int32)
  return jax.lax.bitcast_convert_type(bits & _EXPONENT, jnp.float32)


def lost(exact: jax.Array, out: jax.Array) -> jax.Array:
  """What `restored` needs beside `out`.

  Args:
    exact: float32 [L, h], L even.
    out: bfloat16 [L, h], `exact` rounded.

  Returns:
    int8 [L / 2, h]: of row i in the low four bits and of row i + L / 2 in the
    high ones, the difference in steps.
  """
  power = _power_of_two(out)
  rest = (exact - out.astype(jnp.float32)) * _STEPS_OF_POWER
  steps = jnp.round(rest / jnp.where(power > _LEAST, power, 1.0))
  steps = jnp.clip(steps, -_STEPS, _STEPS).astype(jnp.int32)
  half = out.shape[0] // 2
  return (steps[:half] & 15 | steps[half:] << 4).astype(jnp.int8)


def restored(out: jax.Array, kept: jax.Array, tile: int) -> jax.Array:
  """What `out` was before it was rounded, nearly.

  Args:
    out: bfloat16 [.., T, h].
    kept: int8 [.., T / 2, h], of `lost` for each `tile` rows.
    tile: an even divisor of T.

  Returns:
    float32 [.., T, h].
  """
  *outer, t, h = out.shape
  halves = kept.reshape(*outer, t // tile, 1, tile // 2, h).astype(jnp.int32)
  # Four bits at the top of an int32 and down again keep their sign.
  shift = jnp.array([28, 24], jnp.int32).reshape(*[1] * len(outer), 1, 2, 1, 1)
  steps = (halves << shift) >> 28
  step = _power_of_two(out) / _STEPS_OF_POWER
  return out.astype(jnp.float32) + steps.reshape(out.shape) * step
