"""The platform that programs are made for: jax's, or one compiled for ahead.

Forms of a computation are chosen by platform. Whoever compiles for a machine
that is not at hand (`tools/compile_only`) says which.
"""

import contextlib
from collections.abc import Iterator

import jax

_ahead: list[str] = []


def backend() -> str:
  """The name of the platform: cpu, gpu or tpu."""
  return _ahead[-1] if _ahead else jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Within it, what is traced is made for `platform`."""
  _ahead.append(platform)
  try:
    yield
  finally:
    _ahead.pop()
