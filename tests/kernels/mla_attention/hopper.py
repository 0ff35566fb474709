"""A Hopper GPU for tests that have none: its interpreter, and its lowering."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import (
  RaceDetectionState,
)
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType

from rlm.kernels.backend import compiling_for, interpreting

CHIP = "NVIDIA H200"


def _strict():
  """What a GPU runs into, an interpreter says: races, and memory never written.

  jax 0.10 has the parameters, only not yet in public.
  """
  if not hasattr(plgpu, "InterpretGPUParams"):
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
  else:
    InterpretGPUParams = plgpu.InterpretGPUParams
  return InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


# Heads of the published models, DeepSeek-V3 and V2-Lite; H = h = 128, R = 64.
HEADS = {"V3": 128, "V2-Lite": 16}


def published(model: str, b: int, t: int, s: int) -> tuple:
  """Shapes of `mla_attention`'s operands and of the places after them."""
  n = HEADS[model]
  operands = (
    (b, t, n, 128),
    (b, t, n, 64),
    (b, s, n, 128),
    (b, s, 64),
    (b, s, n, 128),
  )
  places = ((b, t), (b, s), (b, t), (b, s))
  return (
    *(jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in operands),
    *(jax.ShapeDtypeStruct(x, jnp.int32) for x in places),
  )


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
  """Within it, kernels for GPUs are interpreted as on an H200.

  Raises:
    AssertionError: at its end, where one of them had a race, or none ran.
  """
  found: list[RaceDetectionState] = []

  def remembered(**arguments):
    found.append(RaceDetectionState(**arguments))
    return found[-1]

  with (
    interpreting("gpu", CHIP, _strict()),
    mock.patch.object(gpu_callbacks, "RaceDetectionState", remembered),
  ):
    yield
  assert found and not any(races.races_found for races in found)


@contextlib.contextmanager
def _device() -> Iterator[None]:
  if jax.__version_info__ < (0, 11):
    yield
    return
  from jax.sharding import AbstractDevice

  device = AbstractDevice(device_kind=CHIP, num_cores=132, platform="cuda")
  mesh = AbstractMesh(
    (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh):
    yield


def lowered(function: Callable, *shapes: jax.ShapeDtypeStruct) -> str:
  """The program for an H200, kernels told apart, laid out and measured."""
  with compiling_for("gpu", CHIP), _device():
    traced = jax.jit(function).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).as_text()
