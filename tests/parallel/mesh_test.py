"""Devices that share rows, and what is said where there are too few."""

import jax
import pytest

from rlm.parallel.mesh import data_mesh


def test_the_first_devices_share_the_rows():
  mesh = data_mesh(3, "training_devices")
  assert mesh.axis_names == ("data",)
  assert mesh.devices.tolist() == jax.devices()[:3]


def test_too_few_devices_are_named():
  with pytest.raises(
    ValueError,
    match=r"sampling_devices=9, but jax has 8 devices \(cpu\)\. Set it to at"
    r" most 8, or JAX_NUM_CPU_DEVICES=9 before jax starts\.",
  ):
    data_mesh(9, "sampling_devices")
