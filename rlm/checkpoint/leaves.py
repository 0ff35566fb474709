"""Leaves of a state and the plain arrays that Orbax can store for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def flatten(tree: Any) -> list[tuple[str, Any]]:
  """(path such as "variables/params/embed", leaf) of each leaf."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(path_text(path), leaf) for path, leaf in flat]


def path_text(path: Any) -> str:
  """A key path of jax.tree_util, such as "variables/params/embed"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def describe(leaf: Any) -> dict[str, Any]:
  """What identifies a leaf beside its values, as JSON data.

  Args:
    leaf: an array, a typed key, or the `jax.ShapeDtypeStruct` of one.

  Returns:
    {"shape", "dtype"}, and "key_impl" of a typed key.
  """
  described = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
  if is_key(leaf):
    impls: list[Any] = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), leaf)
    described["key_impl"] = str(impls[0])
  return described


def is_key(leaf: Any) -> bool:
  """Whether a leaf is a typed PRNG key, which no file format knows."""
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored(leaf: Any) -> Any:
  """The array that is saved for a leaf.

  A typed key's data; for an array without elements, which Orbax refuses, one
  zero of its dtype.
  """
  data = jax.random.key_data(leaf) if is_key(leaf) else leaf
  # Of numpy, which process 0 writes: no device holds any of it.
  return data if data.size else np.zeros((1,), data.dtype)


def as_leaf(data: jax.Array, described: dict[str, Any]) -> jax.Array:
  """The leaf with this description whose `stored` array is `data`."""
  if "key_impl" in described:
    return jax.random.wrap_key_data(data, impl=described["key_impl"])
  shape = tuple(described["shape"])
  return jnp.zeros(shape, data.dtype) if 0 in shape else data


def stored_bytes(tree: Any) -> int:
  """Bytes of the arrays that are saved for a state or its template."""
  shapes = jax.eval_shape(lambda tree: jax.tree.map(stored, tree), tree)
  return sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
  )


def target(leaf: Any) -> Any:
  """What Orbax shall read for a template's leaf.

  Args:
    leaf: an array or `jax.ShapeDtypeStruct`.

  Returns:
    An abstract array with the sharding of a committed leaf; else a host array,
    which `placed` takes to the default device.
  """
  data = jax.eval_shape(stored, leaf)
  if not _is_placed(leaf) or 0 in leaf.shape:
    return np.empty(data.shape, data.dtype)
  # A typed key's data has one more axis than the key, so its own sharding.
  place = stored(leaf) if isinstance(leaf, jax.Array) else leaf
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=place.sharding)


def placed(data: Any, leaf: Any) -> jax.Array:
  """The template's leaf with the values read for its `target`."""
  if _is_placed(leaf) and 0 in leaf.shape:
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
  if not _is_placed(leaf):
    # Uncommitted, as the template; and a copy: the device must own what a
    # donating step will reuse.
    data = jnp.array(data)
  return as_leaf(data, describe(leaf))


def _is_placed(leaf: Any) -> bool:
  """Whether the template says on which devices the leaf lives."""
  if isinstance(leaf, jax.Array):
    return leaf.committed
  return getattr(leaf, "sharding", None) is not None
