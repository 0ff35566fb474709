import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools import hlo_programs
from tools.hlo_groups import OTHER, MeshAxes, parse_groups
from tools.hlo_program import HloError

MESH = MeshAxes(("data", "expert", "model"), (4, 8, 2))


def members(groups):
  return sorted(tuple(sorted(map(int, g))) for g in groups)


@given(st.sets(st.sampled_from(MESH.names), min_size=1))
def test_groups_of_axes_are_found_again(axes):
  groups = MESH.groups(tuple(axes))
  assert set(MESH.axes_of(groups)) == axes
  shuffled = np.random.default_rng(0).permuted(groups, axis=1)[::-1]
  assert set(MESH.axes_of(shuffled)) == axes
  where = np.array(np.unravel_index(groups[0], MESH.sizes))
  differs = {n for n, w in zip(MESH.names, where, strict=True) if np.ptp(w)}
  assert differs == axes


def test_groups_that_are_no_axes():
  assert MESH.axes_of(np.arange(64).reshape(4, 16)) == ("expert", "model")
  assert MESH.axes_of(np.arange(64).reshape(16, 4)) == OTHER
  assert MESH.axes_of(np.arange(8).reshape(1, 8)) == OTHER  # not all devices
  assert MESH.axes_of(np.arange(64).reshape(64, 1)) == ()


def test_axes_of_size_one_are_left_out():
  mesh = MeshAxes(("a", "b", "c"), (1, 8, 1))
  assert mesh.axes_of(np.arange(8).reshape(1, 8)) == ("b",)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("{{0,2},{1,3}}", [(0, 2), (1, 3)]),
    ("{}", [(0, 1, 2, 3)]),
    ("[2,2]<=[4]", [(0, 1), (2, 3)]),
    ("[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
    ("mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
    ("mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
    ("mesh['a'=4] {'a':(2)2}", [(0, 1), (2, 3)]),
    ("mesh['a'=4] {'a':(1)2}", [(0, 2), (1, 3)]),
    ("mesh['a'=1,'b'=4], device_ids=(0,2,1,3) {'b':(2)2}", [(0, 2), (1, 3)]),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 2), (1, 3)]),
  ],
)
def test_forms_of_groups(text, expected):
  assert members(parse_groups(text, 4)) == expected


def test_an_iota_of_many_devices():
  groups = parse_groups("[64,8]<=[8,64]T(1,0)", 512)
  assert groups.shape == (64, 8)
  assert list(groups[1]) == list(range(1, 512, 64))
  mesh = MeshAxes(("slow", "fast"), (8, 64))
  assert mesh.axes_of(groups) == ("slow",)


@pytest.mark.parametrize(
  "text", ["{{0,1},{2}}", "mesh['a'=4]", "[4]<=4", "all of them"]
)
def test_forms_that_are_not_known(text):
  with pytest.raises(HloError):
    parse_groups(text, 4)


def test_axes_of_pairs():
  ids = np.arange(64).reshape(MESH.sizes)
  ring = np.stack([ids.ravel(), np.roll(ids, 1, axis=1).ravel()], axis=1)
  assert MESH.axes_of_pairs(ring) == ("expert",)
  both = np.roll(ids, (1, 1), axis=(0, 2))
  pairs = np.stack([ids.ravel(), both.ravel()], axis=1)
  assert MESH.axes_of_pairs(pairs) == ("data", "model")
  assert MESH.axes_of_pairs(np.array([[3, 3]])) == ()


def test_partitions_count_along_the_mesh_whatever_the_ids():
  devices = np.array(jax.devices()[:4])[[2, 0, 3, 1]].reshape(2, 2)
  mesh = jax.sharding.Mesh(devices, ("a", "b"))
  axes = MeshAxes.of(mesh)
  assert (axes.names, axes.sizes, axes.coords) == (("a", "b"), (2, 2), None)
  x = hlo_programs.array(mesh, (4, 4), "float32", "a", "b")
  for axis in axes.names:
    found = hlo_programs.traffic(
      mesh,
      hlo_programs.manual(
        lambda x, axis=axis: jax.lax.psum(x, axis),
        mesh,
        jax.P("a", "b"),
        jax.P("a", "b"),
      ),
      x,
    )
    assert [c.axes for c in found.collectives] == [(axis,)]


def test_all_subsets_of_a_cube():
  mesh = MeshAxes(("x", "y", "z"), (2, 2, 2))
  for k in (1, 2, 3):
    for axes in itertools.combinations(mesh.names, k):
      assert mesh.axes_of(mesh.groups(axes)) == axes
