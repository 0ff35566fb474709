"""Which tiles meet: never too few, and no more for packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlm.kernels.attention import attention_mask
from rlm.kernels.mla_attention.visible import hull, tile_bounds, tiles_that_meet


def meets(q_positions, kv_positions, q_segments, kv_segments, queries, keys):
  return tiles_that_meet(
    tile_bounds(jnp.asarray(q_positions), jnp.asarray(q_segments), queries),
    tile_bounds(jnp.asarray(kv_positions), jnp.asarray(kv_segments), keys),
  )


def truly(q_positions, kv_positions, q_segments, kv_segments, queries, keys):
  mask = np.asarray(
    attention_mask(
      jnp.asarray(q_positions),
      jnp.asarray(kv_positions),
      jnp.asarray(q_segments),
      jnp.asarray(kv_segments),
    )
  )
  b, t, s = mask.shape
  return mask.reshape(b, t // queries, queries, s // keys, keys).any((2, 4))


@given(st.data())
def test_no_tile_that_sees_a_key_is_left_out(data):
  def draw(low, high, length):
    values = st.lists(st.integers(low, high), min_size=length, max_size=length)
    return np.array([data.draw(values)], np.int32)

  arguments = (draw(0, 6, 12), draw(0, 6, 8), draw(0, 3, 12), draw(0, 3, 8))
  found = np.asarray(meets(*arguments, 3, 2))
  assert not (truly(*arguments, 3, 2) & ~found).any()


@given(st.lists(st.integers(1, 9), max_size=6), st.sampled_from([2, 4, 6]))
def test_rows_packed_in_order_are_told_exactly(documents, tile):
  positions, segments = np.zeros((2, 1, 24), np.int32)
  at = 0
  for i, tokens in enumerate(documents):
    tokens = min(tokens, 24 - at)
    positions[0, at : at + tokens] = np.arange(tokens)
    segments[0, at : at + tokens] = i + 1 if tokens else 0
    at += tokens
  arguments = (positions, positions, segments, segments, 4, tile)
  np.testing.assert_array_equal(meets(*arguments), truly(*arguments))


def test_the_hull_is_the_least_range():
  meet = jnp.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
  start, stop = hull(meet)
  np.testing.assert_array_equal(start, [1, 0, 0])
  np.testing.assert_array_equal(stop, [4, 0, 5])


def test_nothing_of_the_size_of_the_mask_is_made():
  def tiles(*arguments):
    return meets(*arguments, 128, 128)

  tokens = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
  text = jax.jit(tiles).lower(*[tokens] * 4).as_text()
  assert "8192x8192" not in text
