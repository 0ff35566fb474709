"""The platform that programs are made for: jax's, or one compiled for ahead.

Forms of a computation are chosen by platform, tiles of a kernel by chip.
Whoever compiles for a machine that is not at hand (`tools/compile_only`), or
runs a machine's kernels step by step on a CPU (the tests), says which.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class _Target:
  platform: str
  chip: str
  interpret: Any = False


_targets: list[_Target] = []


def backend() -> str:
  """The name of the platform: cpu, gpu or tpu."""
  return _targets[-1].platform if _targets else jax.default_backend()


def chip() -> str:
  """The device kind as jax names it, such as "TPU v5" or "NVIDIA H200"."""
  return _targets[-1].chip if _targets else jax.devices()[0].device_kind


def interpretation() -> Any:
  """What `pallas_call` takes as `interpret`: False, unless `interpreting`."""
  return _targets[-1].interpret if _targets else False


@contextlib.contextmanager
def _target(target: _Target) -> Iterator[None]:
  _targets.append(target)
  try:
    yield
  finally:
    _targets.pop()


def compiling_for(
  platform: str, chip: str
) -> contextlib.AbstractContextManager:
  """Within it, what is traced is made for `platform` and the device `chip`.

  jax knows nothing of it: of a jitted function it takes the trace that it has.
  Who compiles one function for two chips wraps it anew for each.
  """
  return _target(_Target(platform, chip))


def interpreting(
  platform: str, chip: str, interpret: Any = True
) -> contextlib.AbstractContextManager:
  """Within it, the kernels of `platform` are traced to be interpreted here.

  Args:
    platform: gpu or tpu.
    chip: the device kind whose tiles are taken.
    interpret: what `pallas_call` takes: True, or parameters of an interpreter
      that looks for races and reads out of bounds.
  """
  return _target(_Target(platform, chip, interpret))
