"""The devices that share a batch of rows."""

import jax
from jax.sharding import AxisType, Mesh


def data_mesh(devices: int, key: str) -> Mesh:
  """A mesh of jax's first `devices` devices, axis "data".

  Args:
    devices: how many.
    key: of the config that asks for them, for the message.

  Raises:
    ValueError: there are not so many; the message says how to get them.
  """
  there = jax.devices()
  if devices > len(there):
    kind = there[0].platform
    more = f", or JAX_NUM_CPU_DEVICES={devices} before jax starts"
    raise ValueError(
      f"{key}={devices}, but jax has {len(there)} devices ({kind}). Set it to"
      f" at most {len(there)}{more if kind == 'cpu' else ''}."
    )
  return jax.make_mesh(
    (devices,), ("data",), axis_types=(AxisType.Auto,), devices=there[:devices]
  )
