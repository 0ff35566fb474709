"""Which tiles of keys a tile of queries may see, before any score is made.

A tile is described by a few numbers, so that nothing of size T x S exists. The
answer errs to the side of visiting: a tile visited in vain gives only masked
scores. Rows packed as documents with rising segment ids and positions from 0
are told exactly.
"""

import dataclasses

import jax
import jax.numpy as jnp

_FAR = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class TileBounds:
  """Segments and positions of the tiles of [B, L] tokens; padding left out.

  Attributes:
    low: int32 [B, tiles], the least segment id; the largest int if all is
      padding.
    high: the greatest; 0 if all is padding.
    first: the least position of all tokens.
    last: the greatest.
    first_of_low: the least position in segment `low`.
    last_of_high: the greatest in segment `high`.
  """

  low: jax.Array
  high: jax.Array
  first: jax.Array
  last: jax.Array
  first_of_low: jax.Array
  last_of_high: jax.Array


def tile_bounds(
  positions: jax.Array, segment_ids: jax.Array, tile: int
) -> TileBounds:
  """Bounds of each tile of `tile` tokens, a divisor of L; int32 [B, L] both."""
  shape = (positions.shape[0], -1, tile)
  positions, segments = positions.reshape(shape), segment_ids.reshape(shape)
  real = segments != 0

  def least(keep):
    return jnp.where(keep, positions, _FAR).min(axis=-1)

  def greatest(keep):
    return jnp.where(keep, positions, -1).max(axis=-1)

  low = jnp.where(real, segments, _FAR).min(axis=-1)
  high = jnp.where(real, segments, 0).max(axis=-1)
  return TileBounds(
    low,
    high,
    least(real),
    greatest(real),
    least(real & (segments == low[..., None])),
    greatest(real & (segments == high[..., None])),
  )


def tiles_that_meet(queries: TileBounds, keys: TileBounds) -> jax.Array:
  """Bool [B, query tiles, key tiles]: whether any query may see any key."""
  q = {f.name: getattr(queries, f.name)[:, :, None] for f in _FIELDS}
  k = {f.name: getattr(keys, f.name)[:, None, :] for f in _FIELDS}
  low = jnp.maximum(q["low"], k["low"])
  high = jnp.minimum(q["high"], k["high"])
  # Of one common segment, only its own tokens count: a document that the keys
  # begin and the queries end is one.
  one = (low == high) & (low == q["high"]) & (low == k["low"])
  last = jnp.where(one, q["last_of_high"], q["last"])
  first = jnp.where(one, k["first_of_low"], k["first"])
  return (low <= high) & (first <= last)


_FIELDS = dataclasses.fields(TileBounds)


def hull(meet: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The least range [start, stop) that holds every True of the last axis.

  Args:
    meet: bool [..., tiles].

  Returns:
    start and stop, int32 [...]; 0 and 0 where nothing is True.
  """
  tiles = meet.shape[-1]
  any_meets = meet.any(axis=-1)
  start = jnp.argmax(meet, axis=-1)
  stop = tiles - jnp.argmax(meet[..., ::-1], axis=-1)
  start = jnp.where(any_meets, start, 0)
  return start.astype(jnp.int32), jnp.where(any_meets, stop, 0).astype(
    jnp.int32
  )
