"""A model and its weights from a folder, whoever wrote it."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from rlm import files
from rlm.checkpoint.initial import array_layout, drop_mtp, shapes
from rlm.checkpoint.manager import open_variables
from rlm.checkpoint.published import PublishedWeights
from rlm.checkpoint.published_names import without_mtp
from rlm.checkpoint.stored_arrays import StoredArrays
from rlm.config import build, id_list
from rlm.data.chat_formats import load_chat
from rlm.models.config import ModelConfig
from rlm.models.published_config import read_published_config
from rlm.models.quantized import quantized_shapes
from rlm.models.transformer import Transformer


def load_checkpoint(
  folder: str | os.PathLike,
  *,
  dtype: str | None = None,
  quantize: str | None = None,
  mtp: bool = True,
  shardings: Callable[[Any], Any] | None = None,
  on_read: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Transformer, Any]:
  """The model of a published folder, or of a run of ours.

  A published folder (config.json with model_type, safetensors) is streamed
  tensor by tensor to the devices; FP8 is dequantised on the way. Of a run the
  newest checkpoint is taken, and streamed block by block.

  Args:
    folder: either of them; of a recipe, one of its stages' folders.
    dtype: "float32" or "bfloat16", of parameters and activations alike; None
      keeps what the folder says.
    quantize: "int8" keeps the matrices of attention and feed-forward, experts
      included, as int8 with a scale per output channel (`Int8Matrix`), which
      takes about a quarter of float32's memory; no float copy is made. For
      sampling and evaluation, not for training.
    mtp: False leaves the MTP modules out, which transformers does when it
      saves.
    shardings: shapes of the variables -> a tree of `jax.sharding.Sharding`;
      None puts all on the default device.
    on_read: is told (bytes read, bytes in all) of a published folder's tensors.

  Returns:
    The Transformer and its variables.

  Raises:
    ValueError: the folder is neither, or does not hold what it says; every
      tensor that is missing, surplus, misshapen or truncated is named.
  """
  if quantize not in (None, "int8"):
    raise ValueError(f"{quantize=} is unknown. Choose None or 'int8'.")
  root = pathlib.Path(folder)
  if not (root / "config.json").is_file():
    raise ValueError(
      f"{folder} holds no config.json: it is neither a published model's folder"
      " nor a run's."
    )
  config = files.read_json(root / "config.json")
  if "model_type" in config:
    return _load_published(root, dtype, quantize, mtp, shardings, on_read)
  if "order" in config:
    raise ValueError(
      f"{folder} is a recipe's folder. Name one of its stages:"
      f" {', '.join(str(root / stage) for stage in config['order'])}."
    )
  if "model" not in config:
    raise ValueError(
      f"{root / 'config.json'} has neither model_type, as published models"
      " have, nor model, as our training runs have."
    )
  return _load_run(root, config, dtype, quantize, mtp, shardings)


def _load_published(root, dtype, quantize, mtp, shardings, on_read):
  cfg = read_published_config(root, dtype=dtype, param_dtype=dtype)
  generation = root / "generation_config.json"
  if generation.is_file():
    given = files.read_json(generation).get("eos_token_id")
    eos = id_list(given, f"{generation}: eos_token_id")
    cfg = dataclasses.replace(cfg, eos_token_id=eos or cfg.eos_token_id)
  ignored: list[str] = []
  if not mtp:
    cfg, ignored = without_mtp(cfg)
  model = Transformer(cfg)
  weights = PublishedWeights(
    root,
    cfg,
    shapes(model),
    ignored=ignored,
  )
  done, total = 0, weights.total_bytes()

  def count(size):
    nonlocal done
    done += size
    on_read(done, total)

  wanted = shapes(model)
  if quantize:
    wanted = quantized_shapes(wanted)
  variables = weights.load(
    wanted,
    shardings=None if shardings is None else shardings(wanted),
    on_read=count,
  )
  return model, variables


def open_run(
  root: pathlib.Path,
  config: Mapping[str, Any],
  *,
  dtype: str | None = None,
  mtp: bool = True,
) -> tuple[Transformer, StoredArrays]:
  """The model of a run's folder, and its variables before they are read.

  Args:
    root: the folder.
    config: its config.json.
    dtype: as in `load_checkpoint`.
    mtp: as in `load_checkpoint`.

  Raises:
    ValueError: the folder holds other arrays than its config.json describes.
  """
  cfg = build(ModelConfig, config["model"], "config.model")
  changes: dict[str, Any] = {}
  if dtype is not None:
    changes = {"dtype": dtype, "param_dtype": dtype}
  if not cfg.eos_token_id and "tokenizer" in config:
    changes["eos_token_id"] = load_chat(config["tokenizer"]).stop_tokens
  stored = open_variables(root / "checkpoints")
  held = stored.shapes
  if not mtp and cfg.num_nextn_predict_layers:
    changes["num_nextn_predict_layers"] = 0
    held = drop_mtp(held)
  model = Transformer(dataclasses.replace(cfg, **changes))
  names = array_layout(held).keys(), array_layout(shapes(model)).keys()
  if names[0] != names[1]:
    raise ValueError(
      f"{root} holds other arrays than its config.json describes:"
      f" {', '.join(sorted(names[0] ^ names[1]))}. An older version wrote it."
    )
  return model, stored


def _load_run(root, config, dtype, quantize, mtp, shardings):
  model, stored = open_run(root, config, dtype=dtype, mtp=mtp)
  wanted = shapes(model)
  if shardings is not None:
    shardings = shardings(quantized_shapes(wanted) if quantize else wanted)
  variables = stored.load(
    wanted, quantize=quantize is not None, shardings=shardings
  )
  return model, variables
