"""Small programs, compiled for the CPU or ahead of time for a TPU slice."""

import functools
import os

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tools import hlo_loops, hlo_program, hlo_traffic
from tools.hlo_groups import MeshAxes


def cpu_mesh(**axes):
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    axis_types=(AxisType.Auto,) * len(axes),
  )


@functools.cache
def _slice(topology):
  pytest.importorskip("libtpu", reason="needs pip install 'rlm[tpu]'")
  from jax.experimental import topologies

  settings = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
  }
  for key, value in settings.items():
    os.environ.setdefault(key, value)
  described = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  )
  return np.array(described.devices)


def tpu_mesh(topology, **axes):
  """A mesh of described devices; skips the test where libtpu is missing."""
  return Mesh(
    _slice(topology).reshape(tuple(axes.values())),
    tuple(axes),
    axis_types=(AxisType.Auto,) * len(axes),
  )


def array(mesh, shape, dtype, *spec):
  return jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, P(*spec))
  )


def manual(function, mesh, in_specs, out_specs):
  return jax.jit(
    jax.shard_map(
      function,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )
  )


def follow(jitted, *arguments, **how):
  """Compiles, parses and follows."""
  compiled = jitted.lower(*arguments).compile()
  return hlo_loops.follow(hlo_program.parse(compiled.as_text()), **how)


def traffic(mesh, jitted, *arguments, ragged_rows=None, **how):
  return hlo_traffic.read_traffic(
    follow(jitted, *arguments, **how),
    MeshAxes.of(mesh),
    ragged_rows=ragged_rows,
  )
