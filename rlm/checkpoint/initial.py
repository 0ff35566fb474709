"""The weights that a run starts from: another's, published ones, or random."""

import dataclasses
import functools
import pathlib
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from rlm import files, processes
from rlm.checkpoint.manager import open_variables
from rlm.checkpoint.published import PublishedWeights
from rlm.checkpoint.published_names import without_mtp
from rlm.config import plain
from rlm.models.config import ModelConfig
from rlm.models.layout import Layout
from rlm.models.published_config import read_published_config
from rlm.models.transformer import Transformer
from rlm.workdir import differences

_WEIGHED_BYTES = 1 << 24  # of what is widened to uint64 at once

# How a model is computed, and what a later stage may change: precision, memory,
# and the context that YaRN widens.
_MAY_DIFFER = frozenset(
  {
    "attention_chunk",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "logits_chunk",
    "max_position_embeddings",
    "remat",
    "rope_scaling",
    "unroll_layers",
  }
)


def initial_variables(
  layout: Layout, init_from: str | None, key: jax.Array
) -> Any:
  """Variables of a run's newest checkpoint, of a published folder, or random.

  Warns of a run that has not finished.

  Args:
    layout: of the model that will use them, which says where they shall lie;
      without MTP modules it may start from a published model that has them.
    init_from: folder of the run or of the published model; None draws random
      weights.
    key: for random weights.

  Returns:
    {"params": ..., "router": ...}.

  Raises:
    ValueError: the folder holds no checkpoint, or one of another model, the
      differing fields or arrays named.
  """
  model = layout.whole
  places = layout.shardings(shapes(model))
  if init_from is None:
    return random_variables(model, key, places)
  folder = pathlib.Path(init_from)
  if (folder / "config.json").exists():
    config = files.read_json(folder / "config.json")
    if "model_type" in config:
      return _published_variables(model, init_from, places)
    saved = dict(config.get("model", {}))
    if not model.cfg.num_nextn_predict_layers:
      saved.pop("num_nextn_predict_layers", None)  # stays behind
    if "converted_from" in config:
      saved.pop("n_vocab_used", None)  # the rows; a tokenizer uses fewer ids
    check_same_model(init_from, saved, model.cfg)
    if not (folder / "summary.json").exists():
      warnings.warn(
        f"config.init_from={init_from!r} is a run that has not finished; this"
        " one starts from its newest checkpoint.",
        stacklevel=2,
      )
  stored, wanted = open_variables(folder / "checkpoints"), shapes(model)
  held = stored.shapes
  if not model.cfg.num_nextn_predict_layers:
    held = drop_mtp(held)
  _refuse(init_from, differences(array_layout(held), array_layout(wanted)))
  return stored.load(wanted, shardings=places)


def _published_variables(model: Transformer, folder: str, places: Any) -> Any:
  """Variables of a published folder, in the model's own dtype."""
  published, c = read_published_config(folder), model.cfg
  ignored: list[str] = []
  if not c.num_nextn_predict_layers:
    published, ignored = without_mtp(published)
  saved = files.to_json(plain(dataclasses.asdict(published)))
  for name in ("param_dtype", "n_vocab_used"):  # of no weight's meaning
    del saved[name]
  check_same_model(folder, saved, c)
  wanted = shapes(model)
  weights = PublishedWeights(folder, c, wanted, ignored=ignored)
  return weights.load(wanted, shardings=places)


def drop_mtp(variables: Any) -> Any:
  """Variables without those of the MTP modules."""
  return {
    collection: {k: v for k, v in tree.items() if k != "mtp_modules"}
    for collection, tree in variables.items()
  }


def check_same_model(
  init_from: str, saved: dict[str, Any], cfg: ModelConfig
) -> None:
  """Checks that a run's weights are of the model that shall start from them.

  Args:
    init_from: folder of the run, for the message.
    saved: the section `model` of its config.
    cfg: the model.

  Raises:
    ValueError: fields differ that change the weights or what they mean.
  """
  given = files.to_json(plain(dataclasses.asdict(cfg)))
  changed = differences(
    {k: v for k, v in saved.items() if k not in _MAY_DIFFER},
    {k: v for k, v in given.items() if k not in _MAY_DIFFER and k in saved},
  )
  _refuse(init_from, changed)


def _refuse(init_from: str, changed: str) -> None:
  if changed:
    raise ValueError(
      f"config.init_from={init_from!r} holds another model; saved -> needed:\n"
      f"{changed}\nGive config.model the values of that run."
    )


def random_variables(
  model: Transformer, key: jax.Array, shardings: Any = None
) -> Any:
  """The variables as the model draws them, the same wherever they lie."""
  options = {}
  if jax.default_backend() == "cpu":
    # It runs once: 3.7 s of CPU time to compile instead of 8.3 (laptop model).
    options["xla_backend_optimization_level"] = 0
  init = jax.jit(
    functools.partial(_init, model),
    compiler_options=options,
    out_shardings=shardings,
  )
  return init(key)


@functools.lru_cache(maxsize=8)  # a stage asks several times: a second each
def shapes(model: Transformer) -> Any:
  """The variables as `jax.ShapeDtypeStruct`s; nothing is computed."""
  return jax.eval_shape(functools.partial(_init, model), jax.random.key(0))


def digest(variables: Any) -> str:
  """A checksum of all arrays, to tell whether a run starts from the same ones.

  The same wherever they lie: of each bit pattern, times a weight of its place,
  the sum modulo 2^64.  All processes call it.
  """
  names, sums = [], []
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    names.append(jax.tree_util.keystr(path))
    sums.append(sum(_weighed_parts(leaf)) % 2**64)
  # By halves, as jax has no uint64 unless told; a sum of them cannot overflow.
  halves = np.asarray([[n >> 32, n & (2**32 - 1)] for n in sums], np.uint32)
  if processes.joined():
    halves = multihost_utils.process_allgather(halves)
  high, low = halves.reshape(-1, len(sums), 2).astype(object).sum(axis=0).T
  totals = [int(h * 2**32 + n) % 2**64 for h, n in zip(high, low, strict=True)]
  return f"{zlib.crc32(repr((names, totals)).encode()):08x}"


def _weighed_parts(leaf: Any) -> Iterator[int]:
  """The sum of each part of a leaf of which this process has the first copy."""
  if not isinstance(leaf, jax.Array):
    yield _weighed(np.asarray(leaf), [0] * np.ndim(leaf))
    return
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      yield _weighed(
        np.asarray(shard.data), [s.start or 0 for s in shard.index]
      )


def _weighed(part: np.ndarray, starts: list[int]) -> int:
  """Sum of the bit patterns of an array, each times a weight of its place."""
  if part.ndim > 1 and part.nbytes > _WEIGHED_BYTES:
    rows = (_weighed(row, starts[1:]) for row in part)
    weights = _weights(part.ndim, starts[0], len(part)).tolist()
    return sum(w * row for w, row in zip(weights, rows, strict=True)) % 2**64
  bits = np.ascontiguousarray(part).view(f"u{part.itemsize}").astype(np.uint64)
  sums = bits.reshape(part.shape)
  for axis, start in enumerate(reversed(starts), 1):  # the last axis first
    sums = sums @ _weights(axis, start, part.shape[-axis])
  return int(sums)


def _weights(axis: int, start: int, size: int) -> np.ndarray:
  """Odd numbers, as if at random: the finalizer of splitmix64 of the index."""
  x = np.arange(start + 1, start + size + 1, dtype=np.uint64)
  x = (x + np.uint64(axis << 48)) * np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def _init(model: Transformer, key: jax.Array) -> Any:
  row = jnp.ones((1, 4), jnp.int32)
  return model.init(key, row, row, row)


def array_layout(tree: Any) -> dict[str, str]:
  """Name, type and shape of every array of a tree."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): (
      f"{leaf.dtype} {tuple(leaf.shape)}"
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
