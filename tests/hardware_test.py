import dataclasses
import math

import pytest
from jax.experimental.pallas import tpu as pltpu

from rlm import hardware

KINDS = {
  "v4": ("TPU v4",),
  "v5e": ("TPU v5 lite", "TPU v5e"),
  "v5p": ("TPU v5", "TPU v5p"),
  "v6e": ("TPU v6 lite", "TPU v6e"),
  "tpu7x": ("TPU7x",),
}


@pytest.mark.parametrize("name", hardware.CHIPS)
def test_a_chip_is_whole(name):
  chip = hardware.find_chip(name)
  assert chip.name == name and chip.source
  for field in dataclasses.fields(chip):
    value = getattr(chip, field.name)
    if field.name not in ("name", "source", "torus_dims") and value is not None:
      assert math.isfinite(value) and value > 0, field.name
  # Two neighbours in each dimension of a torus.
  assert chip.torus_dims == 0 or chip.links == 2 * chip.torus_dims
  # Units: a chip's own memory is the fastest, its network the slowest.
  network = chip.network_bandwidth or 0
  assert chip.hbm_bandwidth > chip.fabric_bandwidth > network
  assert 1e9 < network < 1e11
  assert 1e10 < chip.hbm_bytes < 1e12
  assert 1e14 < chip.peak_flops < 1e16


@pytest.mark.parametrize("name", KINDS)
def test_tpus_are_as_jax_has_them(name):
  chip = hardware.CHIPS[name]
  for kind in KINDS[name]:
    assert hardware.chip_of_device_kind(kind) is chip
  version = pltpu.ChipVersion(name.removeprefix("tpu"))
  info = pltpu.get_tpu_info_for_chip(version, 1)  # of each TensorCore
  cores = version.num_physical_tensor_cores_per_chip
  assert math.isclose(
    cores * info.bf16_ops_per_second, chip.peak_flops, rel_tol=0.01
  )
  # jax rounds the v5p's bandwidth down by a ninth.
  bandwidth = cores * info.mem_bw_bytes_per_second
  assert math.isclose(bandwidth, chip.hbm_bandwidth, rel_tol=0.12)
  # The compiler keeps a few hundredths for itself.
  built_in = cores * info.hbm_capacity_bytes
  assert 0.9 * built_in < chip.hbm_bytes < 1.01 * built_in


def test_devices_that_are_not_in_the_table():
  assert hardware.chip_of_device_kind("NVIDIA H200").name == "h200"
  for kind in ("cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"):
    assert hardware.chip_of_device_kind(kind) is None
  with pytest.raises(ValueError, match="'h801' is unknown.*h800"):
    hardware.find_chip("h801")


def test_the_h800_is_that_of_deepseek_v3():
  h800 = hardware.CHIPS["h800"]
  assert h800.dollars_per_hour == 2
  # Section 3.2: NVLink is about 3.2 times as fast as InfiniBand.
  assert h800.fabric_bandwidth / h800.network_bandwidth == 3.2


def test_the_v5p_holds_what_its_compiler_allows():
  assert round(hardware.CHIPS["v5p"].hbm_bytes / 1e9, 1) == 102.8
