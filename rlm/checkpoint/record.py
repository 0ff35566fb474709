"""What a checkpoint says of its arrays: paths, shapes, dtypes, checksums."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class CorruptError(Exception):
  """The checkpoint's bytes are not those that were saved."""


def make_record(
  state: Any, extra: dict[str, Any], config: Any
) -> dict[str, Any]:
  """The JSON that is saved beside a state.

  Args:
    state: a pytree of jax arrays.
    extra: JSON data of the training loop.
    config: JSON data of the run, or None.

  Returns:
    {"extra", "config", "arrays": path -> shape, dtype, crc32, "crc32"}, the
    last one over all the others.
  """
  record = {
    "extra": extra,
    "config": config,
    "arrays": {
      path: {**_describe(leaf), "crc32": _crc32(stored(leaf))}
      for path, leaf in leaves(state)
    },
  }
  return {**record, "crc32": _digest(record)}


def check_record(record: dict[str, Any]) -> None:
  """Raises CorruptError unless the record is as `make_record` made it."""
  rest = {key: value for key, value in record.items() if key != "crc32"}
  if record.get("crc32") != _digest(rest):
    raise CorruptError("the record's checksum differs")


def check_arrays(state: Any, record: dict[str, Any]) -> None:
  """Raises CorruptError unless each stored array is the one saved.

  Args:
    state: a pytree of stored arrays, paths as saved, perhaps a part.
    record: the checkpoint's record.
  """
  for path, leaf in leaves(state):
    saved, found = record["arrays"][path]["crc32"], _crc32(leaf)
    if saved is not None and found is not None and saved != found:
      raise CorruptError(f"the bytes of {path} are not those saved")


def saved_layout(record: dict[str, Any]) -> dict[str, str]:
  """What a checkpoint holds: path -> "dtype [shape]"."""
  return {
    path: f"{array['dtype']} {array['shape']}"
    for path, array in record["arrays"].items()
  }


def layout(tree: Any) -> dict[str, str]:
  """What a state or template holds: path -> "dtype [shape]"."""
  return saved_layout(
    {"arrays": {path: _describe(leaf) for path, leaf in leaves(tree)}}
  )


def leaves(tree: Any) -> list[tuple[str, Any]]:
  """(path such as "variables/params/embed", leaf) of each leaf."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(path_text(path), leaf) for path, leaf in flat]


def path_text(path: Any) -> str:
  """A key path of jax.tree_util, such as "variables/params/embed"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def is_key(leaf: Any) -> bool:
  """Whether a leaf is a typed PRNG key, which no file format knows."""
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_impl(leaf: Any) -> str:
  """Name of a typed key's generator; the leaf may be abstract."""
  impls: list[Any] = []
  jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), leaf)
  return str(impls[0])


def stored(leaf: Any) -> Any:
  """The array that is saved for a leaf: a typed key's data."""
  return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _describe(leaf: Any) -> dict[str, Any]:
  described = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
  if is_key(leaf):
    described["key_impl"] = key_impl(leaf)
  return described


def _crc32(array: Any) -> int | None:
  """CRC-32 of an array's bytes (2 GB/s); None where other hosts hold a part."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    return None
  data = np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)
  return zlib.crc32(data.data)


def _digest(record: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())
