"""The weights that a run starts from: another's, published ones, or random."""

import dataclasses
import functools
import pathlib
import warnings
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm import files
from rlm.checkpoint.manager import open_variables
from rlm.checkpoint.published import PublishedWeights
from rlm.checkpoint.published_names import without_mtp
from rlm.config import plain
from rlm.models.config import ModelConfig
from rlm.models.layout import Layout
from rlm.models.published_config import read_published_config
from rlm.models.transformer import Transformer
from rlm.workdir import differences

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
  """CRC-32 of all arrays, to tell whether a run starts from the same ones."""
  crc = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    crc = zlib.crc32(jax.tree_util.keystr(path).encode(), crc)
    # Viewed as bytes, as numpy has no buffers of bfloat16.
    array = np.ascontiguousarray(np.asarray(leaf)).reshape(-1)
    crc = zlib.crc32(array.view(np.uint8).data, crc)
  return f"{crc:08x}"


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
