"""Loops over parts, each recomputed in the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def map_recomputed(
  f: Callable[[Any, Any], Any], shared: Any, parts: Any
) -> Any:
  """`f(shared, part)` of each part, holding what one of them needs at a time.

  As `jax.lax.map` of a `jax.checkpoint`, but for the gradient of `shared`: what
  the parts give, each in its own dtype, is added in float32 and rounded once.
  Left to autodiff, bfloat16 would round after every addition, and the last of
  many parts would hardly count.

  Args:
    f: gives arrays of a floating type. It must not close over arrays.
    shared: arrays that every part reads.
    parts: arrays of which the leading axis counts the parts.

  Returns:
    What `f` gives, with the same leading axis.
  """
  return jax.lax.map(lambda part: f(shared, part), parts)


def _forward(f, shared, parts):
  return map_recomputed(f, shared, parts), (shared, parts)


def _backward(f, inputs, d_out):
  shared, parts = inputs

  def add(total, part_and_d_out):
    part, d_part_out = part_and_d_out
    _, vjp = jax.vjp(f, shared, part)
    d_shared, d_part = map(_of_floats, vjp(d_part_out))
    total = jax.tree.map(lambda x, d: x + d.astype(x.dtype), total, d_shared)
    return total, d_part

  zeros = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, jnp.promote_types(x.dtype, jnp.float32)
    ),
    _of_floats(shared),
  )
  zeros = zeros_within(d_out, zeros)
  total, d_parts = jax.lax.scan(add, zeros, (parts, d_out))
  d_shared = jax.tree.map(
    lambda d, x: d.astype(x.dtype), total, _of_floats(shared)
  )
  return d_shared, d_parts


def zeros_within(x: Any, shapes: Any) -> Any:
  """Zeros to add to, made where the arrays `x` are.

  XLA lifts plain zeros out of the loop over layers around them, and then they
  take memory for the whole of it: of a layer's experts, gigabytes.

  Args:
    x: arrays of the body of the innermost loop.
    shapes: what to make, anything with `shape` and `dtype`.
  """
  zero, _ = jax.lax.optimization_barrier((jnp.float32(0), x))
  return jax.tree.map(
    lambda leaf: jnp.full(leaf.shape, zero.astype(leaf.dtype)), shapes
  )


def _of_floats(tree):
  """None for what has no gradient: integers, and the gradients of integers."""
  return jax.tree.map(
    lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree
  )


map_recomputed.defvjp(_forward, _backward)
