"""What one device's part of a program knows of the other parts.

The model is written for the rows, tokens and heads of one device. A `Shard`
hands it the few things that need other devices: whole matrices from their
pieces, the other parts of a row, sums over heads, experts elsewhere. `Whole` is
the shard that is everything; `MeshShard` lives inside a `jax.shard_map` that is
manual over all axes of `rlm.parallel.mesh`.

Two rules make derivatives right. The loss that is differentiated is the sum of
the losses of the devices that hold different tokens, so that collectives over
these axes are transposed as they are. Devices of a tensor group repeat each
other outside of heads and widths, in the backward pass as well: `enter_tensor`
and `leave_tensor` stand where they begin and end to differ (Megatron's f and
g).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlm.parallel.config import ALL_PIECES, PIECES, ROWS, TOKENS
from rlm.parallel.expert import NO_EXCHANGE, Exchange
from rlm.parallel.sharding import parameter_axes

# Kept as they are stored: norms and biases are small, the gate is float32.
_UNCAST = frozenset({"router"})


@dataclasses.dataclass(frozen=True)
class Whole:
  """The only device. The base class of shards, whose methods it documents.

  Attributes:
    exchange: how tokens travel to their experts.
  """

  exchange: Exchange = NO_EXCHANGE

  @property
  def context(self) -> int:
    """Parts into which rows are divided."""
    return 1

  @property
  def gathers(self) -> bool:
    """Whether parameters come in pieces."""
    return False

  def matrices(self, params: Any, dtype: Any) -> Any:
    """Whole matrices of a subtree of params, each cast to `dtype` before."""
    del dtype
    return params

  def lookup(self, embedding: jax.Array, tokens: jax.Array, dtype: Any):
    """Rows of the embedding [V, D] for int32 ids [...]: dtype [..., D]."""
    return jnp.take(embedding, tokens, axis=0).astype(dtype)

  def whole_rows(self, x: jax.Array) -> jax.Array:
    """[B, T, ...] of this device's tokens -> [B, S, ...] of the whole rows."""
    return x

  def own_tokens(self, x: jax.Array, axis: int) -> jax.Array:
    """The part of whole rows, along `axis`, that is this device's."""
    del axis
    return x

  def sum_row(self, x: jax.Array) -> jax.Array:
    """A sum over tokens of a row, of all the parts of the row."""
    return x

  def enter_tensor(self, x: jax.Array) -> jax.Array:
    """Marks what devices of a tensor group hold alike and use differently."""
    return x

  def leave_tensor(self, x: jax.Array) -> jax.Array:
    """Adds up what devices of a tensor group made of their heads or widths."""
    return x

  def any_device(self, flag: jax.Array) -> jax.Array:
    """Whether a bool [] is True on any device that works along with this."""
    return flag

  def gather_rows(self, x: jax.Array, axis: int) -> jax.Array:
    """The rows of all devices, along `axis`."""
    del axis
    return x

  def over_tokens(self, x: jax.Array, reduce: Callable) -> jax.Array:
    """`jax.lax.psum`, pmax or pmin over devices with different tokens."""
    del reduce
    return x

  def sum_tokens(self, x: jax.Array) -> jax.Array:
    """A sum over all devices that hold different tokens."""
    return self.over_tokens(x, jax.lax.psum)

  def sum_gradients(self, grads: Any) -> Any:
    """Adds up what the transposed gathers have not: copies' gradients."""
    return grads


WHOLE = Whole()


@dataclasses.dataclass(frozen=True)
class MeshShard(Whole):
  """A device of a mesh; see the module.

  Attributes:
    sizes: (axis, size) of the mesh's axes larger than 1.
    dense_over_expert: of the `MeshConfig`.
    gradient_dtype: in which pieces of gradients are summed.
  """

  sizes: tuple[tuple[str, int], ...] = ()
  dense_over_expert: bool = True
  gradient_dtype: str = "float32"

  def _present(self, axes: tuple[str, ...]) -> tuple[str, ...]:
    names = dict(self.sizes)
    return tuple(axis for axis in axes if axis in names)

  @property
  def context(self) -> int:
    return dict(self.sizes).get("context", 1)

  @property
  def gathers(self) -> bool:
    pieces = ALL_PIECES if self.dense_over_expert else PIECES
    return bool(self._present(pieces))

  def _axes(self, path, rank):
    return parameter_axes(path, rank, dense_over_expert=self.dense_over_expert)

  def matrices(self, params, dtype):
    def whole(path, leaf):
      name = str(path[-1].key) if hasattr(path[-1], "key") else ""
      if leaf.ndim > 1 and name and name not in _UNCAST:
        leaf = leaf.astype(dtype)  # int8 stays, and is a field, not a key
      for axis, names in enumerate(self._axes(path, leaf.ndim)):
        present = self._present(names) if isinstance(names, tuple) else ()
        if present:
          leaf = _gather(present, axis, self.gradient_dtype, leaf)
      return leaf

    return jax.tree.map_with_path(whole, params)

  def lookup(self, embedding, tokens, dtype):
    names = self._present(PIECES)
    if not names:
      return super().lookup(embedding, tokens, dtype)
    # Each device looks up its columns for all, and each receives its tokens':
    # as many bytes as the result has, where the table has many times that.
    everyone = jax.lax.all_gather(tokens, names)
    columns = jnp.take(embedding.astype(dtype), everyone, axis=0)
    last = columns.ndim - 1
    return jax.lax.all_to_all(
      columns, names, split_axis=0, concat_axis=last, tiled=True
    )[0]

  def whole_rows(self, x):
    names = self._present(("context",))
    if not names:
      return x
    return jax.lax.all_gather(x, names, axis=1, tiled=True)

  def own_tokens(self, x, axis):
    if self.context == 1:
      return x
    length = x.shape[axis] // self.context
    start = jax.lax.axis_index("context") * length
    return jax.lax.dynamic_slice_in_dim(x, start, length, axis)

  def sum_row(self, x):
    names = self._present(("context",))
    return jax.lax.psum(x, names) if names else x

  def enter_tensor(self, x):
    names = self._present(("tensor",))
    return _enter(names, x) if names else x

  def leave_tensor(self, x):
    names = self._present(("tensor",))
    return _leave(names, x) if names else x

  def any_device(self, flag):
    names = self._present(("fsdp", "expert", "context", "tensor"))
    return jax.lax.pmax(flag.astype(jnp.int32), names) > 0 if names else flag

  def gather_rows(self, x, axis):
    names = self._present(ROWS)
    if not names:
      return x
    return jax.lax.all_gather(x, names, axis=axis, tiled=True)

  def over_tokens(self, x, reduce):
    names = self._present(TOKENS)
    return reduce(x, names) if names else x

  def sum_gradients(self, grads):
    def total(path, grad):
      axes = self._axes(path, grad.ndim)
      summed = {
        name for a in axes for name in (a if type(a) is tuple else (a,))
      }
      names = self._present(tuple(n for n in TOKENS if n not in summed))
      return jax.lax.psum(grad, names) if names else grad

    return jax.tree.map_with_path(total, grads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(names, axis, gradient_dtype, piece):
  # One mesh axis after the other, the innermost first, as many bytes in all: a
  # TPU's collectives over a whole slice are sums of everything everywhere.
  for name in reversed(names):
    piece = jax.lax.all_gather(piece, name, axis=axis, tiled=True)
  return piece


def _gather_bwd(names, axis, gradient_dtype, _, grad):
  dtype = grad.dtype
  # Summed in float32 unless told otherwise: a bfloat16 sum over 64 devices
  # rounds 63 times.
  wide = jnp.promote_types(dtype, gradient_dtype)
  grad = grad.astype(wide)
  for name in names:
    grad = jax.lax.psum_scatter(grad, name, scatter_dimension=axis, tiled=True)
  return (grad.astype(dtype),)


_gather.defvjp(lambda *args: (_gather(*args), None), _gather_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enter(names, x):
  return x


_enter.defvjp(
  lambda names, x: (x, None),
  lambda names, _, grad: (jax.lax.psum(grad, names),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _leave(names, x):
  return jax.lax.psum(x, names)


_leave.defvjp(
  lambda names, x: (jax.lax.psum(x, names), None),
  lambda names, _, grad: (grad,),
)
