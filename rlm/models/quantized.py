"""Weight-only int8: a matrix as 8-bit integers and a scale per output channel.

Modules take an `Int8Matrix` wherever they take a matrix, since all of them turn
their parameters into operands of products by `operand`.

The error against float32, on random models with logits of std 1 (3 layers of
width 64), as `tests/checkpoint/int8_test.py` measures and bounds it:

| model | largest and mean change of a logit | KL, nats | same likeliest token |
|---|---|---|---|
| V3, routes of float32 replayed | 0.09, 0.011 | 1.1e-4 | 97% |
| Qwen2 | 0.08, 0.010 | 0.9e-4 | 97% |

Where routes are chosen anew, a token whose experts were nearly tied may go to
another one, and then changes by far more.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

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
class Int8Matrix:
  """W = values * scale.

  Attributes:
    values: int8 [..., in, out], from -127 to 127. The first field, whose shape
      Linen compares with the parameter's.
    scale: float32 [..., 1, out], the largest of |W| over `in`, by 127.
  """

  values: Any
  scale: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape


def operand(w: Any, x: jax.Array) -> jax.Array:
  """A parameter as an array in the dtype of the activations it will meet.

  Args:
    w: an array or an Int8Matrix.
    x: the activations.

  Returns:
    [..., in, out] in the dtype of `x`.
  """
  if not is_quantized(w):
    return w.astype(x.dtype)
  # XLA must not make the floats of all layers first, nor once for all steps of
  # a decode loop, which would take the memory that int8 saves. It undoes
  # optimization barriers too early for that, but cannot know this condition:
  # that an activation is finite. Where it is not, the product is NaN.
  ready = jnp.isfinite(x[(0,) * x.ndim])
  values = jnp.where(ready, w.values, jnp.int8(0))
  scale = jnp.where(ready, w.scale, jnp.nan)
  return (values.astype(jnp.float32) * scale).astype(x.dtype)


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
