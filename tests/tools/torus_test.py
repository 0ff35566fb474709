import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import torus as links
from tools.torus import Torus


def walk(torus, source, target):
  """The links of one message by hand: [(link, share)], both ways at a tie."""
  found, at = [], list(source)
  for d, (side, wrap) in enumerate(zip(torus.shape, torus.wraps, strict=True)):
    ahead = target[d] - at[d]
    ways = [(1 if ahead > 0 else -1, abs(ahead), 1.0)] if ahead else []
    if wrap and ahead:
      up = ahead % side
      ways = [(1, up, 1.0)] if 2 * up < side else [(-1, side - up, 1.0)]
      if 2 * up == side:
        ways = [(1, up, 0.5), (-1, up, 0.5)]
    for step, hops, share in ways:
      place = list(at)
      for _ in range(hops):
        found.append(((d, 0 if step > 0 else 1, *place), share))
        place[d] = (place[d] + step) % side
    at[d] = target[d]
  return found


def loads_by_hand(torus, messages):
  loads = np.zeros((len(torus.shape), 2, *torus.shape))
  for source, target, size in messages:
    for link, share in walk(torus, source, target):
      loads[link] += share * size
  return loads


shapes = st.lists(st.integers(1, 4), min_size=2, max_size=3)


@settings(max_examples=30)
@given(shapes, st.integers(0, 7), st.integers(0, 9))
def test_loads_are_those_of_routing_by_hand(shape, wraps, seed):
  torus = Torus(
    tuple(shape), tuple(bool(wraps >> k & 1) for k in range(len(shape)))
  )
  rng = np.random.default_rng(seed)
  coords = links.all_coords(torus)
  source, target = (rng.choice(coords, 20) for _ in range(2))
  size = rng.integers(1, 9, 20)
  expected = loads_by_hand(torus, zip(source, target, size, strict=True))
  np.testing.assert_allclose(
    links.link_loads(torus, source, target, size), expected
  )


@pytest.mark.parametrize(
  ("shape", "wraps"),
  [
    ((4, 4), (True, True)),
    ((8, 4), (True, True)),
    ((4, 4), (False, False)),
    ((2, 4), (False, True)),
    ((4, 4, 4), (True, True, True)),
    ((2, 2, 4), (False, False, True)),
  ],
)
def test_all_to_all_is_bound_by_its_bisection(shape, wraps):
  torus = Torus(shape, wraps)
  coords = links.all_coords(torus)
  sent = 10.0
  messages = [
    (a, b, sent / len(coords)) for a, b in itertools.product(coords, coords)
  ]
  busiest = loads_by_hand(torus, messages).max()
  everyone = np.arange(len(coords))[None]
  assert links.exchange_load(torus, coords, everyone, sent) == pytest.approx(
    busiest
  )
  # V s / 8 over each link of a ring of s, V s / 4 over the middle of a line.
  assert links.all_to_all_load(torus, sent) == pytest.approx(busiest)


def test_slices_that_wrap_around():
  assert Torus.of((8, 8, 8), 3).wraps == (True,) * 3
  assert Torus.of((2, 2, 4), 3).wraps == (False, False, True)
  assert Torus.of((4, 16), 2).wraps == (False, True)
  with pytest.raises(ValueError, match="2 or 3"):
    Torus.of((8,), 1)


def groups_over(torus, dims):
  ids = np.arange(np.prod(torus.shape)).reshape(torus.shape)
  rest = [d for d in range(ids.ndim) if d not in dims]
  n = int(np.prod([torus.shape[d] for d in dims]))
  return ids.transpose([*rest, *dims]).reshape(-1, n)


@pytest.mark.parametrize("dims", [(0,), (1, 2), (0, 1, 2)])
def test_gathers_use_both_ways_of_each_ring(dims):
  torus = Torus.of((4, 4, 4), 3)
  coords = links.all_coords(torus)
  groups = groups_over(torus, dims)
  assert links.gather_links(torus, coords, groups) == 2 * len(dims)
  line = Torus((4, 4, 4), (False,) * 3)
  assert links.gather_links(line, coords, groups) == len(dims)


def test_gathers_over_a_part_of_a_ring():
  torus = Torus.of((8, 4, 4), 3)
  coords = links.all_coords(torus)
  column = np.arange(8) * 16
  halves = np.concatenate([column[:4, None], column[4:, None]], axis=1).T
  others = np.arange(16)
  blocks = (halves[:, None] + others[None, :, None]).reshape(-1, 4)
  assert links.gather_links(torus, coords, blocks) == 1.0  # lines of 4
  even = np.stack([column[::2], column[1::2]])
  strided = (even[:, None] + others[None, :, None]).reshape(-1, 4)
  # Rings of 4 with two hops each, of which two share every link.
  assert links.gather_links(torus, coords, strided) == 1.0
  pairs = (column.reshape(4, 2)[:, None] + others[None, :, None]).reshape(-1, 2)
  assert links.gather_links(torus, coords, pairs) == 1.0


def test_groups_that_are_no_blocks_gather_in_a_ring():
  torus = Torus.of((4, 4), 2)
  coords = links.all_coords(torus)
  ids = np.arange(16).reshape(4, 4)
  diagonals = np.stack(
    [[ids[k, (k + shift) % 4] for k in range(4)] for shift in range(4)]
  )
  assert 0 < links.gather_links(torus, coords, diagonals) <= 2.0


def test_a_shift_by_one_loads_each_link_once():
  torus = Torus.of((4, 4, 4), 3)
  coords = links.all_coords(torus)
  ids = np.arange(64).reshape(4, 4, 4)
  pairs = np.stack([ids.ravel(), np.roll(ids, -1, axis=2).ravel()], axis=1)
  assert links.permute_load(torus, coords, pairs, 3.0) == 3.0
  pairs = np.stack([ids.ravel(), np.roll(ids, -2, axis=2).ravel()], axis=1)
  # Two hops, half of the messages each way: two halves meet on every link.
  assert links.permute_load(torus, coords, pairs, 3.0) == 3.0
