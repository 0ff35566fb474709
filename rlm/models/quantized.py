"""Weight-only int8: a matrix as 8-bit integers and a scale per output channel.

Linen unboxes `AxisMetadata` where a module asks for its parameter, so that the
modules compute with floats and know nothing of this: what is unboxed is one
layer's, inside the scan over the stack, and lives while it is used.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

# The matrices of attention and feed-forward. The router's choices and what
# every token passes (embedding, head, norms, biases, the MTP projection) keep
# their floats: they are few, and their errors go everywhere.
QUANTIZED = frozenset(
  {
    *("q_proj", "k_proj", "v_proj", "out_proj"),
    *("q_a", "q_b", "kv_a", "kv_b"),
    *("gate_proj", "up_proj", "down_proj"),
  }
)


@flax.struct.dataclass
class Int8Matrix(nn.meta.AxisMetadata[Any]):
  """W = values * scale.

  Attributes:
    values: int8 [..., in, out], from -127 to 127.
    scale: float32 [..., 1, out], the largest of |W| over `in`, by 127.
  """

  values: Any
  scale: Any

  def unbox(self) -> jax.Array:
    """The matrix, float32 [..., in, out]."""
    return self.values.astype(jnp.float32) * self.scale

  def replace_boxed(self, val: Any) -> "Int8Matrix":
    raise ValueError(
      "an int8 matrix cannot take other values. Load without quantize to change"
      " the parameters."
    )

  def add_axis(self, index: int, params: dict[Any, Any]) -> "Int8Matrix":
    return self

  def remove_axis(self, index: int, params: dict[Any, Any]) -> "Int8Matrix":
    return self


def is_quantized(leaf: Any) -> bool:
  """For `is_leaf` of tree functions, too."""
  return isinstance(leaf, Int8Matrix)


def quantized_shapes(shapes: Any) -> Any:
  """Variables' shapes with an Int8Matrix of shapes for each such matrix.

  Args:
    shapes: `jax.ShapeDtypeStruct`s.
  """

  def convert(path, leaf):
    if path[-1].key not in QUANTIZED:
      return leaf
    scale = (*leaf.shape[:-2], 1, leaf.shape[-1])
    return Int8Matrix(
      values=jax.ShapeDtypeStruct(leaf.shape, jnp.int8),
      scale=jax.ShapeDtypeStruct(scale, jnp.float32),
    )

  return jax.tree.map_with_path(convert, shapes)


def refuse_quantized(params: Any) -> None:
  """Raises ValueError where parameters are int8, which no gradient can move."""
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
  found = [jax.tree_util.keystr(p) for p, x in leaves if is_quantized(x)]
  if found:
    raise ValueError(
      f"{len(found)} matrices are int8, {found[0]} the first: weight-only int8"
      " is for sampling and evaluation. To train, load without quantize."
    )
