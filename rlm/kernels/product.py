"""How exact a product is: one decision, for every matrix product of rlm.

A product takes its operands as they are and sums in float32; those of float64,
which only references are made of, in float64. One of float32 is exact: by
default a GPU would round its operands to TF32 and a TPU to bfloat16, and then
the trainer and the sampler, whose shapes differ, would not agree within 1e-4.
The CPU multiplies in float32 either way.
"""

from typing import Any

import jax
import jax.numpy as jnp


def exact_sums(dtype: Any) -> dict[str, Any]:
  """Keywords of a product of operands of `dtype`, for any function of jax."""
  sums = jnp.promote_types(dtype, jnp.float32)
  exact = sums == jnp.dtype(dtype)
  return {
    "precision": jax.lax.Precision.HIGHEST if exact else None,
    "preferred_element_type": sums,
  }


def exact_rounded(dtype: Any) -> dict[str, Any]:
  """As `exact_sums`, for a product that gives `dtype`, rounded once.

  The sums are float32 inside; asked for them, XLA would write them out.
  """
  return exact_sums(dtype) | {"preferred_element_type": jnp.dtype(dtype)}


def einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """`jnp.einsum` of two arrays of one dtype; float32 (or 64), as it was summed.

  Raises:
    TypeError: the dtypes differ, so that neither says how exact it must be.
  """
  if x.dtype != y.dtype:
    raise TypeError(
      f"einsum {subscripts} of {x.dtype} and {y.dtype}. Cast one of them."
    )
  return jnp.einsum(subscripts, x, y, **exact_sums(x.dtype))


# Which axis of x and of y `contract` sums over: x y, x y^T, x^T y.
ROWS_BY_COLUMNS = (1, 0)
ROWS_BY_ROWS = (1, 1)
COLUMNS_BY_COLUMNS = (0, 0)


def contract(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
  """A product of two matrices of one dtype, for kernels; float32, as summed.

  Args:
    x: a matrix.
    y: another.
    axes: of x and y, which are summed over.
  """
  over = (axes[:1], axes[1:])
  return jax.lax.dot_general(x, y, (over, ((), ())), **exact_sums(x.dtype))
