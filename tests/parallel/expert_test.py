"""Experts on several devices equal experts on one, however rows travel.

Values and gradients agree with the dense form up to the order of sums of a few
float32 terms of size 1: 2e-6 absolutely.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlm.models.experts import routed_experts_dense
from rlm.parallel import expert
from rlm.parallel.mesh import make_mesh
from tests.fast_jit import fast_jit
from tests.parallel import ragged
from tests.tiny_model import mesh_of

TRANSPORTS = ("gather", "padded", "ragged")
D, F, E, K = 6, 5, 16, 3
GROUPS, TOPK_GROUP = 4, 2  # of experts
TOKENS = 6  # of a device


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
  monkeypatch.setattr(expert, "exchange_rows", ragged.exchange_rows)


# Ways to the experts: sizes and settings of the mesh, and of the routing.
WAYS = {
  "one level": dict(expert=4),
  "two levels": dict(expert=8),  # 4 groups of 2 devices
  "one level in spite of groups": dict(expert=8, node_limited=False),
  "groups of experts on a device": dict(expert=2),
  "chunks": dict(expert=4, expert_chunk=2),
  "chunks on two levels": dict(expert=8, expert_chunk=3),
}


def exchange_of(transport, n_group=GROUPS, **sizes):
  return expert.make_exchange(
    mesh_of(transport=transport, **sizes),
    n_group=n_group,
    topk_group=TOPK_GROUP if n_group > 1 else 1,
    n_experts=E,
    k=K,
  )


def on_devices(size, f, in_specs, out_specs):
  mesh = make_mesh(mesh_of(expert=size), "mesh")
  return fast_jit(
    jax.shard_map(
      f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
  )


@functools.cache
def divided(transport, way, **changes):
  """(x, gates, ids, weights, cotangents) -> out, dropped, gradients."""
  sizes = WAYS[way] | changes
  exchange = exchange_of(transport, **sizes)

  def on_device(x, gates, ids, weights, cotangents):
    def scalar(x, gates, weights):
      def run(weights, rows, row_gates, local_ids):
        return routed_experts_dense(rows, row_gates, local_ids, weights)

      out, dropped = expert.exchanged(exchange, run, weights, x, gates, ids, E)
      return (out * cotangents).sum(), (out, dropped[None])

    gradients, aux = jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)(
      x, gates, weights
    )
    return *aux, gradients

  spec = P("expert")
  return on_devices(sizes["expert"], on_device, (spec,) * 5, (spec,) * 3)


@functools.cache
def whole():
  def scalar(x, gates, weights, ids, cotangents):
    out = routed_experts_dense(x, gates, ids, weights)
    return (out * cotangents).sum(), out

  return fast_jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))


def arrays(devices, seed=0):
  """x, gates, weights and cotangents; all of the order of 1."""
  rng = np.random.default_rng(seed)
  n = devices * TOKENS
  shapes = ((n, D), (n, K), (E, D, F), (E, D, F), (E, F, D), (n, D))
  x, gates, *weights, cotangents = (
    rng.standard_normal(shape).astype(np.float32) for shape in shapes
  )
  return x, np.abs(gates), tuple(weights), cotangents


def routes(load, devices):
  """int32 [n, K], at most TOPK_GROUP groups of 4 experts to a token."""
  rng = np.random.default_rng(1)
  n = devices * TOKENS
  ids = np.empty((n, K), np.int32)
  for i in range(n):
    if load == "even":
      group, j = i % 4, i // 4
      experts = (j % 4, (j + 1) % 4, 4 * (group < 3) - 12 * (group == 3))
      ids[i] = 4 * group + np.array(experts)
      ids[i, 2] += (j + 2) % 4
      continue
    groups = rng.permutation(GROUPS)[:TOPK_GROUP]
    if load == "one hot expert":
      groups[:] = 0, 1 + i % 3
    if load == "empty experts":  # those of groups 0 and 2, all but one
      groups[:] = 1, 3
    experts = (4 * groups[:, None] + np.arange(4)).reshape(-1)
    if load == "uneven":  # the later, the rarer
      p = 0.5 ** np.arange(8)
      ids[i] = rng.choice(experts, K, replace=False, p=p / p.sum())
    else:
      ids[i] = rng.choice(experts, K, replace=False)
    if load == "one hot expert" and 2 not in ids[i]:
      ids[i, 0] = 2
    if load == "one device for all":
      ids[i] = [5, 4, 6]
    if load == "tokens stay at home":
      mine = 4 * (i // TOKENS * GROUPS // devices)
      ids[i] = mine + np.arange(K)
  return ids


LOADS = (
  "even",
  "uneven",
  "one hot expert",
  "empty experts",
  "one device for all",
  "tokens stay at home",
)


@pytest.mark.parametrize(
  "way",
  [
    pytest.param(way, marks=pytest.mark.full)
    if way in ("chunks on two levels", "one level in spite of groups")
    else way
    for way in WAYS
  ],
)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_values_and_gradients_are_those_of_one_device(transport, way):
  devices = WAYS[way]["expert"]
  x, gates, weights, cotangents = arrays(devices)
  for load in LOADS:
    ids = routes(load, devices)
    got, dropped, gradients = divided(transport, way)(
      x, gates, ids, weights, cotangents
    )
    expected_gradients, expected = whole()(x, gates, weights, ids, cotangents)
    np.testing.assert_array_equal(dropped, 0)
    assert np.abs(expected).max() > 1
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-5),
      (got, gradients),
      (expected, expected_gradients),
    )


def test_the_loads_are_what_they_are_called():
  loads = {
    load: np.bincount(routes(load, 4).reshape(-1), minlength=E)
    for load in LOADS
  }
  assert loads["even"].max() <= 1.4 * loads["even"].mean()
  assert loads["uneven"].max() > 2 * loads["uneven"].mean()
  assert loads["one hot expert"][2] == 4 * TOKENS
  assert (loads["empty experts"] == 0).sum() >= 8
  assert np.flatnonzero(loads["one device for all"]).tolist() == [4, 5, 6]
  for load in LOADS:
    for ids in routes(load, 4):
      assert len(set(ids)) == K
      assert len(set(ids // 4)) <= TOPK_GROUP


def one_level(transport, devices, **changes):
  (level,) = exchange_of(transport, n_group=1, expert=devices, **changes).levels
  return level


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_giving_back_is_the_transpose_of_sending(transport, capacity):
  """<send(x), y> = <x, give_back(y)>, exactly: small integers.

  Also where y is not zero in rows that nobody sent.
  """
  level = one_level(transport, 4, expert_capacity=capacity)

  def products(choices, x, y):
    plan = level.plan(choices)
    sent, back = level.send(x, plan), level.give_back(y, plan)
    return jnp.stack([(sent * y).sum(), (x * back).sum()])[None]

  rng = np.random.default_rng(0)
  # At most K peers to a token; the last device's want nothing.
  choices = rng.integers(0, 3, (4 * TOKENS, 4)).astype(np.int32)
  choices[np.arange(4 * TOKENS), rng.integers(0, 4, 4 * TOKENS)] = 0
  choices[3 * TOKENS :] = 0
  x = rng.integers(-3, 4, (4 * TOKENS, 2)).astype(np.float32)
  rows = 4 * level.received(TOKENS)
  y = rng.integers(-3, 4, (rows, 2)).astype(np.float32)
  spec = P("expert")
  got = on_devices(4, products, (spec,) * 3, spec)(choices, x, y)
  there, back = np.asarray(got).sum(axis=0)
  assert there == back != 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_row_goes_once_to_each_device_of_its_experts(transport):
  level = one_level(transport, 4)
  share = E // 4

  def counts(ids):
    here = ids[..., None] // share == jnp.arange(4)[None, None]
    return level.plan(here.sum(axis=1, dtype=jnp.int32)).counts[None]

  ids = routes("uneven", 4)
  spec = P("expert")
  got = np.asarray(on_devices(4, counts, spec, spec)(ids))
  expected = np.zeros((4, 4), int)  # from a device, to a device
  for i, row in enumerate(ids):
    for device in set(row // share):
      expected[i // TOKENS, device] += 1
  assert expected.sum() < ids.size  # some experts share a device
  np.testing.assert_array_equal(got, np.broadcast_to(expected, (4, 4, 4)))


def test_with_two_levels_a_row_goes_once_to_each_group(monkeypatch):
  """V3 section 3.2.2: over InfiniBand at most once per node."""
  plans = []
  plan = expert.Level.plan

  def recording(level, choices):
    made = plan(level, choices)
    plans.append((level, made.counts))
    return made

  monkeypatch.setattr(expert.Level, "plan", recording)
  exchange = exchange_of("padded", expert=8)

  def on_device(x, gates, ids):
    plans.clear()
    expert.exchanged(
      exchange, lambda _, rows, *rest: rows, (), x, gates, ids, E
    )
    return tuple(counts[None] for _, counts in plans)

  x, gates, _, _ = arrays(8)
  ids = routes("uneven", 8)
  spec = P("expert")
  outer, inner = on_devices(8, on_device, (spec,) * 3, (spec,) * 2)(
    x, gates, ids
  )
  assert [level.peers for level, _ in plans] == [4, 2]
  # Between the devices of one rank within their groups.
  expected = np.zeros((2, 4, 4), int)  # rank, from a group, to a group
  crossed = np.zeros((8, 2), int)  # device that passes it on, rank to go to
  for i, row in enumerate(ids):
    device = i // TOKENS
    for group in set(row // 4):
      expected[device % 2, device // 2, group] += 1
      for rank in {e % 4 // 2 for e in row if e // 4 == group}:
        crossed[2 * group + device % 2, rank] += 1
  for device in range(8):
    np.testing.assert_array_equal(outer[device], expected[device % 2])
    group = device // 2
    np.testing.assert_array_equal(
      inner[device], crossed[2 * group : 2 * group + 2]
    )
  assert expected.sum() < sum(len(set(row // 2)) for row in ids)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_finds_no_room_is_dropped_and_counted(transport):
  """2 devices; 6 tokens of each want both, 5 the first alone and 1 the other.

  A capacity of 0.5 is room for half the mean, 0.5 * 6 tokens * 2 / 2 = 3.
  """
  n = TOKENS
  ids = np.tile([0, 1, 2], (2 * n, 1)).astype(np.int32)  # device 0
  ids[:n] = [0, 1, E - 1]  # device 0 twice, device 1 once
  ids[2 * n - 1] = [E - 1, E - 2, E - 3]  # device 1
  x, gates, weights, cotangents = arrays(2)
  got, dropped, gradients = divided(
    transport, "groups of experts on a device", expert_capacity=0.5
  )(x, gates, ids, weights, cotangents)
  kept = np.ones((2 * n, K), bool)
  if transport != "gather":  # which has room for everything
    kept[3:n] = False  # the later ones, on both devices
    kept[n + 3 : -1] = False
  lost = (~kept).reshape(2, -1).sum(axis=1)
  assert lost.tolist() == ([0, 0] if transport == "gather" else [9, 6])
  np.testing.assert_array_equal(dropped, lost)
  expected_gradients, expected = whole()(
    x, gates * kept, weights, ids, cotangents
  )
  dx, dgates, dweights = expected_gradients
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-5),
    (got, gradients),
    (expected, (dx, dgates * kept, dweights)),
  )


def test_room_on_both_levels_is_counted_where_it_ends():
  """All of one group's devices of rank 0 want one expert of that group."""
  ids = np.tile([0, 1, 4], (8 * TOKENS, 1)).astype(np.int32)
  x, gates, weights, cotangents = arrays(8)
  _, dropped, _ = divided("padded", "two levels", expert_capacity=0.5)(
    x, gates, ids, weights, cotangents
  )
  # First leg: 0.5 * 6 * 2 / 4 = 1.5, room for 2 of the 6 rows to either group:
  # 4 tokens of each device lose 3 choices.
  first = 8 * 4 * 3
  # Second: 4 devices sent 2 rows each to either device of groups 0 and 1, where
  # there is room for 0.5 * (4 * 2) * 2 / 2 = 4 of these 8. Group 0's lose 2
  # choices each, group 1's one.
  second = 2 * 4 * 2 + 2 * 4 * 1
  assert np.asarray(dropped).sum() == first + second


def test_room_that_is_enough_drops_nothing():
  ids = routes("even", 4)
  x, gates, weights, cotangents = arrays(4)
  _, dropped, _ = divided("padded", "one level", expert_capacity=4.0)(
    x, gates, ids, weights, cotangents
  )
  np.testing.assert_array_equal(dropped, 0)


@pytest.mark.parametrize(
  ("sizes", "rows"),
  [
    (dict(expert=1), 6),
    (dict(expert=4), 4 * 6),
    (dict(expert=8), 4 * 6 * 2),  # two levels: each multiplies
    (dict(expert=4, expert_chunk=2), 4 * 2),
    (dict(expert=4, expert_chunk=100), 4 * 6),
    # 0.5 * 6 * 3 / 4 rounds to 2 slots from each device.
    (dict(expert=4, expert_capacity=0.5), 4 * 2),
    (dict(expert=4, expert_capacity=0.001), 4 * 1),
    (dict(expert=4, expert_capacity=9.0), 4 * 6),
  ],
)
def test_the_worst_case_of_rows(sizes, rows):
  assert exchange_of("padded", **sizes).worst_rows(6) == rows


def test_levels_of_published_v3():
  """8 groups of 32 experts, 4 of them to a token, 8 experts to a token."""

  def levels(size, **changes):
    return expert.make_exchange(
      mesh_of(expert=size, transport="padded", **changes),
      n_group=8,
      topk_group=4,
      n_experts=256,
      k=8,
    ).levels

  assert levels(1) == ()
  assert [(v.peers, v.most) for v in levels(8)] == [(8, 4)]
  assert [(v.peers, v.most) for v in levels(4)] == [(4, 4)]
  assert [(v.peers, v.most) for v in levels(64)] == [(8, 4), (8, 8)]
  outer, inner = levels(16)
  assert outer.groups == (tuple(range(0, 16, 2)), tuple(range(1, 16, 2)))
  assert inner.groups == tuple((i, i + 1) for i in range(0, 16, 2))
  assert [(v.peers, v.most) for v in levels(16, node_limited=False)] == [
    (16, 8)
  ]


def test_transports_by_name_and_by_backend():
  kinds = [type(one_level(name, 2)).__name__ for name in (*TRANSPORTS, None)]
  assert kinds == ["Gather", "Padded", "Ragged", "Padded"]


def test_a_chunk_that_does_not_divide_is_refused():
  exchange = exchange_of("padded", expert=2, expert_chunk=4)
  x, gates = jnp.ones((6, D)), jnp.ones((6, K))
  with pytest.raises(
    ValueError, match="expert_chunk=4 does not divide the 6 tokens"
  ):
    ids = jnp.zeros((6, K), jnp.int32)
    expert.exchanged(exchange, None, (), x, gates, ids, E)


def test_experts_that_do_not_divide_are_refused():
  with pytest.raises(
    ValueError,
    match="mesh.expert=3 does not divide n_routed_experts=16. Make it one of"
    " 1, 2, 4, 8, 16",
  ):
    exchange_of("padded", expert=3)
