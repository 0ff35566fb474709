"""The rows of a batch among processes: which to read, and the whole they make.

A process reads the rows that its devices need and no others; together they are
one jax array, the same whatever the number of processes.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlm.parallel.config import ROWS
from rlm.parallel.sharding import batch_specs


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
  """Which rows of a batch this process's devices need.

  Args:
    mesh: the devices of all processes.
    rows: B, of the whole batch.

  Returns:
    int [n], ascending; all of 0..B-1 where there is one process.
  """
  sharding = NamedSharding(mesh, P(ROWS))
  places = sharding.addressable_devices_indices_map((rows,)).values()
  every = np.arange(rows)
  return np.unique(np.concatenate([every[index] for index in places]))


def place_rows(
  mesh: Mesh,
  batch: dict[str, Any],
  own: np.ndarray,
  *,
  rows: int,
  leading: int,
) -> dict[str, Any]:
  """The batch of all processes, on the devices.

  Args:
    mesh: the devices of all processes.
    batch: arrays of this process's rows, [..., n, ...], and scalars, which stay
      as they are.
    own: int [n], the rows that these are, from `own_rows`.
    rows: B, of the whole batch.
    leading: axes in front of the rows, such as that of the microbatches.

  Returns:
    Arrays [..., B, ...], each device with its part.
  """
  specs = batch_specs(batch, leading=leading)
  first = dict(zip(own.tolist(), range(len(own)), strict=True))

  def place(name, x):
    if np.ndim(x) <= leading:
      return x
    shape = (*x.shape[:leading], rows, *x.shape[leading + 1 :])

    def part(index):
      begin, end, _ = index[leading].indices(rows)
      held = slice(first[begin], first[begin] + end - begin)
      return x[(*index[:leading], held, *index[leading + 1 :])]

    # Of one process too: it costs a third of what device_put does.
    sharding = NamedSharding(mesh, specs[name])
    return jax.make_array_from_callback(shape, sharding, part)

  return {name: place(name, x) for name, x in batch.items()}
