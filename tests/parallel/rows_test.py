"""Rows of one process's devices; tests/parallel/processes_test.py has two."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlm.parallel.config import MeshConfig
from rlm.parallel.mesh import make_mesh
from rlm.parallel.rows import own_rows, place_rows


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1, 1), (1, 2, 1, 2, 2)])
def test_the_only_process_reads_and_places_every_row(sizes):
  mesh = make_mesh(MeshConfig(*sizes), "mesh")
  own = own_rows(mesh, 16)
  np.testing.assert_array_equal(own, np.arange(16))
  batch = {
    "tokens": np.arange(3 * 16 * 4, dtype=np.int32).reshape(3, 16, 4),
    "rewards": np.ones((3, 16), np.float32),
    "num_live": np.int32(2),
  }
  placed = place_rows(mesh, batch, own, rows=16, leading=1)
  assert placed["num_live"] is batch["num_live"]
  rows = ("data", "fsdp", "expert")
  assert placed["tokens"].sharding.spec == P(None, rows, "context")
  assert placed["rewards"].sharding.spec == P(None, rows)
  for name in ("tokens", "rewards"):
    np.testing.assert_array_equal(placed[name], batch[name])
    assert placed[name].sharding.num_devices == 8


def test_an_array_of_more_dimensions_lies_as_its_name_says():
  mesh = make_mesh(MeshConfig(2, 1, 1, 4, 1), "mesh")
  x = np.arange(4 * 3 * 8).reshape(4, 3, 8)
  placed = place_rows(
    mesh, {"mtp_weights": x}, own_rows(mesh, 4), rows=4, leading=0
  )["mtp_weights"]
  assert placed.sharding.shard_shape(placed.shape) == (2, 3, 2)
  np.testing.assert_array_equal(jax.device_get(placed), x)
