"""Devices by their axes, and what is said where sizes do not fit them."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from rlm.parallel.config import AXES, replicas
from rlm.parallel.mesh import make_mesh
from tests.tiny_model import mesh_of


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as far as a mesh asks."""

  id: int
  process_index: int = 0
  slice_index: int = 0
  platform: str = "tpu"
  device_kind: str = "imagined"


def test_the_first_devices_share_the_rows():
  mesh = make_mesh(replicas(3), "mesh")
  assert mesh.axis_names == AXES
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert mesh.devices.reshape(-1).tolist() == jax.devices()[:3]


def test_axes_have_their_sizes():
  mesh = make_mesh(mesh_of(fsdp=2, expert=2, tensor=2), "mesh")
  assert dict(mesh.shape) == dict(data=1, fsdp=2, expert=2, context=1, tensor=2)
  assert len(set(mesh.devices.reshape(-1).tolist())) == 8


def test_too_few_devices_are_named():
  with pytest.raises(
    ValueError,
    match=r"sampling_mesh needs data=3 x fsdp=3 x expert=1 x context=1 x"
    r" tensor=1 = 9 devices, but jax has 8 \(cpu\)\. Make the product at most"
    r" 8, or JAX_NUM_CPU_DEVICES=9 before jax starts\.",
  ):
    make_mesh(mesh_of(data=3, fsdp=3), "sampling_mesh")


def test_a_process_without_work_is_refused():
  chips = [Chip(i, process_index=i // 2) for i in range(4)]
  with pytest.raises(
    ValueError,
    match="mesh uses .* = 2 of the 4 devices of 2 processes, which leaves some"
    " without work. Make the product 4",
  ):
    make_mesh(replicas(2), "mesh", chips)


@dataclasses.dataclass(frozen=True)
class TorusChip(Chip):
  """One of 4x4x4."""

  device_kind: str = "TPU v5p"
  core_on_chip: int = 0

  @property
  def coords(self):
    return (self.id % 4, self.id // 4 % 4, self.id // 16)


def cube():
  """Its 64 chips, in no order of theirs."""
  order = np.random.default_rng(0).permutation(64)
  return [TorusChip(int(i)) for i in order]


def places(mesh):
  """int [*mesh, 3], where each device stands."""
  at = [device.coords for device in mesh.devices.flat]
  return np.array(at).reshape(*mesh.devices.shape, 3)


def test_axes_are_sides_of_the_torus():
  at = places(make_mesh(mesh_of(fsdp=16, expert=4), "mesh", cube()))
  # Groups of `expert` lie along one side.
  assert (np.ptp(at, axis=2) > 0).sum(axis=-1).max() == 1


def test_an_axis_may_be_a_side_and_a_half():
  mesh = make_mesh(mesh_of(fsdp=2, expert=4, context=8), "mesh", cube())
  at = places(mesh)
  assert len({tuple(place) for place in at.reshape(-1, 3)}) == 64
  # Groups of `context` are blocks of 4 x 2.
  sides = np.sort(np.ptp(at, axis=3) + 1, axis=-1)
  assert (sides.reshape(-1, 3) == [1, 2, 4]).all()


def test_slices_are_divided_by_replicas_alone():
  chips = [Chip(i, slice_index=i // 4) for i in range(8)]
  with pytest.raises(
    ValueError, match=r"mesh\.data=1 is no multiple of the 2 slices"
  ):
    make_mesh(mesh_of(fsdp=8), "mesh", chips)
