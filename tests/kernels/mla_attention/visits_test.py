"""Which tiles of a cache a row visits."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.kernels.mla_attention.visits import visited_tiles


def test_a_list_by_hand():
  mask = np.zeros((4, 2, 12), bool)
  mask[0, 0, 11] = mask[0, 1, 3] = True  # tiles 0 and 2, by two queries
  mask[1, 0, 4:8] = True  # one tile, whole
  mask[3] = True  # all; row 2 sees nothing
  ids, counts = visited_tiles(jnp.asarray(mask), 4)
  np.testing.assert_array_equal(
    ids, [[0, 2, 2], [1, 1, 1], [0, 0, 0], [0, 1, 2]]
  )
  np.testing.assert_array_equal(counts, [2, 1, 0, 3])
  assert ids.dtype == counts.dtype == jnp.int32


@given(
  st.sampled_from([(3, 2, 5, 4), (1, 1, 1, 8), (2, 3, 9, 1)]),
  st.floats(0, 0.3),
  st.integers(0, 99),
)
def test_the_list_holds_every_tile_that_is_seen_once(sizes, share, seed):
  b, t, tiles, tile = sizes
  mask = np.random.default_rng(seed).random((b, t, tiles * tile)) < share
  ids, counts = visited_tiles(jnp.asarray(mask), tile)
  assert ids.shape == (b, tiles)
  for row in range(b):
    seen = np.flatnonzero(mask[row].any(0)) // tile
    expected = np.unique(seen)
    n = int(counts[row])
    np.testing.assert_array_equal(ids[row, :n], expected)
    rest = expected[-1] if n else 0
    np.testing.assert_array_equal(ids[row, n:], rest)


def test_a_tile_that_does_not_divide_the_keys_is_told():
  with pytest.raises(ValueError, match="tile=5 does not divide the 12 keys"):
    visited_tiles(jnp.ones((1, 1, 12), bool), 5)
