"""The devices of a `MeshConfig` as a jax mesh."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rlm.parallel.config import AXES, MeshConfig


def make_mesh(
  cfg: MeshConfig, key: str, devices: Sequence[Any] | None = None
) -> Mesh:
  """The mesh of a config, over the first devices that it needs.

  Neighbours on an axis are neighbours in the machine where jax knows how;
  `data` runs between slices.

  Args:
    cfg: sizes of the axes.
    key: of the config that asks for them, for the message.
    devices: to use; None is jax's.

  Raises:
    ValueError: there are fewer devices, several slices or processes that
      the axes do not divide into; the message says which sizes would do.
  """
  there = list(jax.devices() if devices is None else devices)
  if cfg.devices > len(there):
    kind = there[0].platform
    more = f", or JAX_NUM_CPU_DEVICES={cfg.devices} before jax starts"
    raise ValueError(
      f"{key} needs {_product(cfg)} = {cfg.devices} devices, but jax has"
      f" {len(there)} ({kind}). Make the product at most {len(there)}"
      f"{more if kind == 'cpu' else ''}."
    )
  processes = {device.process_index for device in there}
  if len(processes) > 1 and cfg.devices != len(there):
    raise ValueError(
      f"{key} uses {_product(cfg)} = {cfg.devices} of the {len(there)} devices"
      f" of {len(processes)} processes, which leaves some without work. Make"
      f" the product {len(there)}."
    )
  shape = tuple(cfg.sizes.values())
  types = (AxisType.Auto,) * len(AXES)
  slices = collections.Counter(
    getattr(device, "slice_index", 0) or 0 for device in there
  )
  if len(slices) > 1:
    if cfg.data % len(slices):
      raise ValueError(
        f"{key}.data={cfg.data} is no multiple of the {len(slices)} slices,"
        " between which only replicas are worth their traffic. Make it one."
      )
    within = (cfg.data // len(slices), *shape[1:])
    between = (len(slices),) + (1,) * (len(AXES) - 1)
    grid = _arranged(
      mesh_utils.create_hybrid_device_mesh, within, between, there
    )
  else:
    grid = _arranged(mesh_utils.create_device_mesh, shape, there[: cfg.devices])
  return Mesh(np.asarray(grid), AXES, axis_types=types)


def _arranged(arrange: Callable, *args: Any) -> np.ndarray:
  """Whole sides of the torus for every axis, or parts of one if need be."""
  try:
    return arrange(*args)
  except NotImplementedError:
    # How jax says that an axis fills no whole sides, as 16 does in a slice of
    # 8x8x8. Parts are its second choice: their rings are shared.
    return arrange(*args, allow_split_physical_axes=True)


def _product(cfg: MeshConfig) -> str:
  return " x ".join(f"{axis}={size}" for axis, size in cfg.sizes.items())
