"""Which tiles of a cache a row visits, told from its mask."""

import jax
import jax.numpy as jnp


def visited_tiles(mask: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
  """The tiles of keys that any query of a row sees, as a list to walk along.

  Args:
    mask: bool [B, T, S], True where a query sees a key.
    tile: keys of a tile, a divisor of S.

  Returns:
    tile_ids int32 [B, S / tile]: those visited, rising; the rest repeats the
    last of them, so that a pipeline that copies by id copies nothing more; 0
    where a row visits none. counts int32 [B], how many are visited.

  Raises:
    ValueError: `tile` does not divide S.
  """
  b, _, s = mask.shape
  if s % tile:
    raise ValueError(
      f"{tile=} does not divide the {s} keys. Pad the mask with False, or take"
      " a divisor."
    )
  visited = mask.any(axis=1).reshape(b, -1, tile).any(axis=-1)  # [B, tiles]
  counts = visited.sum(axis=-1, dtype=jnp.int32)
  ids = jnp.argsort(~visited, axis=-1, stable=True).astype(jnp.int32)
  last = jnp.take_along_axis(ids, jnp.maximum(counts - 1, 0)[:, None], axis=-1)
  last = jnp.where(counts[:, None] > 0, last, 0)
  real = jnp.arange(ids.shape[1])[None] < counts[:, None]
  return jnp.where(real, ids, last), counts
