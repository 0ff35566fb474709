"""Hopper's forward kernel: interpreted, lowered; on a GPU if there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.kernels.attention import attention_mask
from rlm.kernels.mla_attention import gpu_forward, mla_attention
from tests.kernels.mla_attention import cases, hopper

attend = functools.partial(mla_attention, scale=0.1, implementation="gpu")

# Few blocks, for the interpreter of jax 0.10 compiles each of them anew.
SOME = {
  # A document's last tokens, one token, 60 tokens.
  "odd lengths": cases.Attention(((100, 1, 60),), 70, 161, n=1),
  # Tiles of keys of two documents, of one seen whole, and on the diagonal.
  "a tile that needs no mask": cases.Attention(((20, 428),), 128, 448, n=1),
}
ALL = cases.ATTENTION | {
  "more queries than keys": cases.Attention(((40, 170),), 210, 128, n=1),
  "tokens of one document alone": cases.Attention(((1,) * 130,), 130, 130, n=1),
}


def values(case, dtype):
  operands = case.operands(jnp.bfloat16)
  out, lse = jax.jit(lambda *x: attend(*x, *case.places()))(
    *(x.astype(dtype) for x in operands)
  )
  return {"out": np.asarray(out), "lse": np.asarray(lse)}


def check(got, case, dtype):
  """`cases.check` of the values; gradients are taken as they should be."""
  cases.check(cases.exact(case) | got, case, dtype)


# The output leaves through SMEM of the queries where both are as wide.
@pytest.mark.parametrize(
  "name, width",
  [
    ("odd lengths", 64),
    pytest.param("a tile that needs no mask", 128, marks=pytest.mark.full),
  ],
)
def test_values(name, width, monkeypatch):
  monkeypatch.setattr(cases, "NOPE", width)
  with hopper.interpreted():
    check(values(SOME[name], jnp.bfloat16), SOME[name], jnp.bfloat16)


# Those of bfloat16 are checked with their gradients, in gpu_backward_test.
@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_values_of_all_cases_in_float16(name):
  with hopper.interpreted():
    check(values(ALL[name], jnp.float16), ALL[name], jnp.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("name", ALL)
def test_values_on_a_gpu(name, dtype):
  case = ALL[name]
  check(values(case, dtype), case, dtype)


@pytest.mark.parametrize("model", hopper.HEADS)
def test_lowers_for_hopper_at_published_sizes(model):
  program = hopper.lowered(attend, *hopper.published(model, 2, 4096, 8192))
  assert program.count("@mosaic_gpu_v2") == 1


def rows(draw, length, b=2):
  """Positions and segments of any kind, and with them some that are packed."""
  whole = st.integers(0, 3)
  segments = [
    sorted(draw(st.lists(whole, min_size=length, max_size=length)))
    if draw(st.booleans())
    else draw(st.lists(whole, min_size=length, max_size=length))
    for _ in range(b)
  ]
  place = st.sampled_from([0, 1, 2, 3, 9, -1, 2**31 - 1, -(2**31)])
  positions = [
    list(range(length))
    if draw(st.booleans())
    else draw(st.lists(place, min_size=length, max_size=length))
    for _ in range(b)
  ]
  return np.array(positions, np.int32), np.array(segments, np.int32)


@st.composite
def places(draw, t=16, s=24):
  q_positions, q_segments = rows(draw, t)
  kv_positions, kv_segments = rows(draw, s)
  return q_positions, kv_positions, q_segments, kv_segments


def masked(places):
  q_positions, kv_positions, q_segments, kv_segments = places
  return gpu_forward.masked_places(
    jnp.stack([q_positions, q_segments], 1),
    jnp.stack([kv_positions, kv_segments], 1),
  )


@settings(max_examples=50)
@given(places())
def test_a_tile_s_mask_is_the_mask(places):
  mask = np.asarray(attention_mask(*places))
  q_places, kv_places = masked(places)
  for row in range(2):
    got = gpu_forward.seen(
      (q_places[row, 0], q_places[row, 1]),
      (kv_places[row, 0], kv_places[row, 1]),
      mask.shape[1:],
      query_axis=0,
    )
    np.testing.assert_array_equal(got, mask[row])


@settings(max_examples=50)
@given(places(), st.booleans())
def test_visits_hold_all_that_is_seen_and_mask_all_that_is_not(places, by_keys):
  queries, keys = 4, 8
  mask = np.asarray(attention_mask(*places))
  visits = np.asarray(
    gpu_forward.visits(*masked(places), queries, keys, by_keys=by_keys)
  )
  tiled = mask.reshape(2, 4, queries, 3, keys).transpose(0, 1, 3, 2, 4)
  if by_keys:
    tiled = tiled.swapaxes(1, 2)
  b, tiles, others = tiled.shape[:3]
  assert visits.shape == (b, tiles, 4)
  for row, tile, other in np.ndindex(b, tiles, others):
    start, stop, whole_start, whole_stop = visits[row, tile]
    if tiled[row, tile, other].any():
      assert start <= other < stop
    if whole_start <= other < whole_stop:
      assert tiled[row, tile, other].all()


@pytest.mark.parametrize("by_keys", (False, True))
def test_a_document_is_masked_on_its_diagonal_alone(by_keys):
  positions, segments = np.arange(32)[None], np.ones((1, 32), np.int32)
  places = jnp.asarray(np.stack([positions, segments], 1), jnp.int32)
  visits = gpu_forward.visits(
    *gpu_forward.masked_places(places, places), 8, 8, by_keys=by_keys
  )
  want = (
    [[0, 4, 1, 4], [1, 4, 2, 4], [2, 4, 3, 4], [3, 4, 0, 0]]
    if by_keys
    else [[0, 1, 0, 0], [0, 2, 0, 1], [0, 3, 0, 2], [0, 4, 0, 3]]
  )
  np.testing.assert_array_equal(visits[0], want)
