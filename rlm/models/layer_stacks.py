"""Stacked layers taken apart once, for a loop that reads them many times.

The CPU's products want an operand of their own: a layer sliced from its stack
is copied first, in every step of a decode loop, which costs a third of it.
`split_layers` makes those copies before the loop. Inside, `join_layers` gives
the tree that the model knows; XLA sees a slice of a concatenation and reads the
part itself (`tests/sampling/programs_test.py` looks).
"""

from typing import Any

import jax
import jax.numpy as jnp

from rlm.kernels.backend import backend
from rlm.models.quantized import is_quantized

_STACKS = ("dense_layers", "moe_layers")
# The split layers are a second copy of the weights. Larger models keep their
# memory and slice in every step.
MAX_BYTES = 1 << 30


def split_layers(variables: Any) -> Any:
  """The variables, each stacked leaf a tuple of its layers' arrays.

  They stay as they are where the backend reads slices in place (GPU, TPU),
  above `MAX_BYTES` of layers, and in int8, which is for want of memory.

  Args:
    variables: of a Transformer.
  """
  small = 0 < _layer_bytes(variables) <= MAX_BYTES
  if backend() != "cpu" or not small:
    return variables
  return jax.tree.map_with_path(
    lambda path, leaf: tuple(leaf) if _is_stacked(path) else leaf, variables
  )


def join_layers(split: Any) -> Any:
  """What `split_layers` took apart."""
  return jax.tree.map(
    lambda leaf: jnp.stack(leaf) if isinstance(leaf, tuple) else leaf,
    split,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def _is_stacked(path: tuple) -> bool:
  return path[1].key in _STACKS


def _layer_bytes(variables: Any) -> int:
  """Bytes of all stacked leaves; 0 if one is int8."""
  leaves = jax.tree_util.tree_leaves_with_path(variables, is_leaf=is_quantized)
  if any(is_quantized(leaf) for _, leaf in leaves):
    return 0
  return sum(leaf.nbytes for path, leaf in leaves if _is_stacked(path))
