import collections
import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlm.tasks.draws import Draws


def test_first_draw_is_the_hash_modulo_n():
  digest = hashlib.sha256(b"a\x1f7\x1f0").digest()
  assert Draws("a", 7).below(1000) == int.from_bytes(digest, "big") % 1000


def test_equal_keys_give_equal_streams_and_others_do_not():
  def stream(*key):
    draws = Draws(*key)
    return [draws.below(10**6) for _ in range(50)]  # more than one hash

  assert stream("x", 3) == stream("x", np.int64(3))
  assert stream("x", 3) != stream("x", 4)
  assert stream("x", 1, 23) != stream("x", 12, 3)
  assert len(set(stream("x", 3))) == 50


@given(st.integers(1, 1 << 190), st.integers())
def test_below_stays_below(n, key):
  draws = Draws(key)
  assert all(0 <= draws.below(n) < n for _ in range(20))


def test_draws_are_uniform():
  draws = Draws("uniform")
  counts = collections.Counter(draws.below(10) for _ in range(20_000))
  # Standard deviation of a count is 42.
  assert all(abs(counts[i] - 2000) < 200 for i in range(10))
  floats = [draws.random() for _ in range(20_000)]
  assert 0 <= min(floats) < 0.01 and 0.99 < max(floats) < 1
  assert abs(np.mean(floats) - 0.5) < 0.01


def test_shuffled_keeps_the_items_and_reaches_every_order():
  items = [1, 2, 3]
  orders = collections.Counter(
    tuple(Draws("s", i).shuffled(items)) for i in range(6000)
  )
  assert items == [1, 2, 3]
  assert len(orders) == 6
  assert all(abs(count - 1000) < 150 for count in orders.values())
