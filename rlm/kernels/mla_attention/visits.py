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
  tiles = jnp.arange(visited.shape[1], dtype=jnp.int32)
  # Counted by comparing all with all, a fusion each: a sort or a scan of so few
  # is a kernel, or several, that each decoded token would wait for.
  up_to = tiles[:, None] >= tiles[None]
  rank = (visited[:, None] & up_to[None]).sum(axis=-1, dtype=jnp.int32)
  below = rank[:, None] <= tiles[None, :, None]
  ids = below.sum(axis=-1, dtype=jnp.int32)  # the list's length beyond its end
  last = jnp.where(visited, tiles[None], 0).max(axis=-1, keepdims=True)
  return jnp.minimum(ids, last), rank[:, -1]
