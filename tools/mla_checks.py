"""Whether a way to compute a case of `tools/mla_cases` gives what it must."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tools.mla_cases import Way

# An error, over that of plain jnp in the same dtype.
_TOLERATED = 3.0
# Of what plain jnp computes nearly exactly, such as a log-sum-exp.
_NEGLIGIBLE = 1e-4


def _in_float32(tree: Any) -> Any:
  def widen(x):
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

  return jax.tree.map(widen, tree)


@functools.lru_cache(maxsize=2)
def _expected(make: Callable, baseline: Callable) -> tuple[Any, Any, Any]:
  """Operands; what plain jnp gives of them in float32, and as they are."""
  made = jax.jit(make)(jax.random.key(2, impl="rbg"))
  run = jax.jit(baseline)
  return made, run(*_in_float32(made)), run(*made)


@jax.jit
def _distances(got: Any, truth: Any) -> dict[str, jax.Array]:
  def distance(x, truth):
    error = x.astype(jnp.float32) - truth
    return jnp.linalg.norm(error.ravel()) / jnp.linalg.norm(truth.ravel())

  return {name: distance(x, truth[name]) for name, x in got.items()}


def check(way: Way) -> dict[str, Any]:
  """Compares one call with plain jnp in float32 of the same operands.

  Returns:
    passes: whether each array is as near as plain jnp in its own dtype, thrice
      as far at most; errors: of each array by name, ||x - truth|| / ||truth||
      beside that of plain jnp.
  """
  made, truth, own = _expected(way.make, way.baseline)
  got = jax.jit(way.run)(*made)
  own = {name: own[name] for name in got}
  found, least = jax.device_get(
    (_distances(got, truth), _distances(own, truth))
  )
  errors = {name: [float(found[name]), float(least[name])] for name in got}
  # Of NaN, every comparison is False.
  passes = all(
    error <= max(_TOLERATED * of_baseline, _NEGLIGIBLE)
    for error, of_baseline in errors.values()
  )
  return {"passes": passes, "errors": errors}
