"""Our variables -> a published folder, such as transformers loads."""

import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from rlm import files
from rlm.checkpoint import fp8
from rlm.checkpoint.published import SCALE_SUFFIX
from rlm.checkpoint.published_names import Tensor, copies, published_tensors
from rlm.checkpoint.tensor_writer import TensorWriter
from rlm.models.config import ModelConfig
from rlm.models.published_config import (
  read_published_config,
  write_published_config,
)
from rlm.models.published_families import INERT

Stored = Literal["float32", "bfloat16", "fp8"]

# Beside config.json and the weights; copied as they are.
CARRIED_FILES = (
  "generation_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "chat_template.jinja",
)
CARRIED_FOLDERS = ("additional_chat_templates",)
SHARD_BYTES = 5 * 10**9
# What the published FP8 files quantise (sheet, section 4).
_QUANTIZED = re.compile(
  r"model\.layers\.\d+\.(self_attn|mlp(\.experts\.\d+|\.shared_experts)?)\."
  r"\w+_proj(_with_mqa)?\.weight"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def export_published(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  shapes: Any,
  read: Callable[[str, Tensor], np.ndarray],
  *,
  stored: Stored,
  original: Mapping[str, Any] | None = None,
  scales: Mapping[str, np.ndarray] | None = None,
  max_shard_bytes: int = SHARD_BYTES,
  on_write: Callable[[int, int], None] = lambda done, total: None,
) -> None:
  """Writes config.json, the shards and their index.

  Args:
    folder: to write to; holds no weights yet.
    cfg: the model's sizes.
    shapes: its variables or their shapes.
    read: (leaf, tensor) -> the tensor as published, [out, in], of any float
      dtype.
    stored: how; fp8 keeps embeddings, head, norms, gate and eh_proj bfloat16.
      Expert biases are float32 in any case.
    original: the config.json that the model came with; its inert fields are
      kept.
    scales: of the FP8 file that the model came from; the stored blocks of a
      weight that is still what they gave are written again, and any other is
      quantised anew.
    max_shard_bytes: of one file.
    on_write: is told (bytes written, bytes in all).

  Raises:
    ValueError: no published family computes this model; a weight is not
      finite; or the folder holds weights.
    DiskFullError: no room.
  """
  config = _config(cfg, stored, original)
  tensors = {
    tensor.name: (leaf, tensor)
    for leaf, parts in published_tensors(cfg, shapes).items()
    for tensor in parts
  }
  repeated = {} if cfg.tie_word_embeddings else copies(cfg)
  names = sorted([*tensors, *repeated], key=_reading_order)
  quantized = set()
  if stored == "fp8":
    quantized = set(scales or filter(_QUANTIZED.fullmatch, tensors))
  plan: list[tuple[str, Any, tuple[int, ...]]] = []
  for name in names:
    shape = tensors[repeated.get(name, name)][1].shape
    plan.append((name, _dtype(name, stored, quantized), shape))
    if name in quantized:
      scale = tuple(-(-n // b) for n, b in zip(shape, fp8.BLOCK, strict=True))
      plan.append((name + SCALE_SUFFIX, _scale_dtype(name, scales), scale))
  scale_fmt = config.get("quantization_config", {}).get("scale_fmt")
  folder = pathlib.Path(folder)
  _refuse_other(folder, config)
  done = 0
  with TensorWriter(folder, plan, max_shard_bytes=max_shard_bytes) as writer:
    files.write_json(folder / "config.json", config)
    total = writer.total_bytes
    for name in names:
      array = read(*tensors[repeated.get(name, name)])
      if name in quantized:
        came_with = (scales or {}).get(name)
        array, scale_now = _blocks(array, came_with, scale_fmt == "ue8m0")
        scale_now = scale_now.astype(_scale_dtype(name, scales), copy=False)
        writer.write(name + SCALE_SUFFIX, scale_now)
      array = array.astype(_dtype(name, stored, quantized), copy=False)
      writer.write(name, np.ascontiguousarray(array))
      done += array.nbytes
      on_write(done, total)


def _config(cfg, stored: Stored, original) -> dict[str, Any]:
  """config.json, with what the original one says beside the model."""
  config = write_published_config(cfg)
  config["torch_dtype"] = "float32" if stored == "float32" else "bfloat16"
  for name, value in (original or {}).items():
    # Code that is not in our folder would be asked for by auto_map.
    if name in INERT and name != "auto_map":
      config.setdefault(name, value)
  scaling = dict((original or {}).get("rope_scaling") or {})
  scaling |= (original or {}).get("rope_parameters") or {}
  if "attn_factor" in scaling and config["rope_scaling"]:
    # Ignored by us and by transformers, but not by vLLM.
    config["rope_scaling"]["attn_factor"] = scaling["attn_factor"]
  if stored == "fp8":
    kept = (original or {}).get("quantization_config")
    config["quantization_config"] = kept or {
      "quant_method": "fp8",
      "fmt": "e4m3",
      "activation_scheme": "dynamic",
      "weight_block_size": list(fp8.BLOCK),
    }
  with warnings.catch_warnings(action="ignore"):  # told when it was read
    # What we write must be what we would read.
    read_published_config(json.loads(json.dumps(config)))
  return config


def _refuse_other(folder: pathlib.Path, config: dict[str, Any]) -> None:
  """A run's folder, or another model's, is never written over."""
  other = (folder / "config.json").is_file() and (
    files.read_json(folder / "config.json") != config
  )
  if other or (folder / "checkpoints").exists():
    raise ValueError(
      f"{folder} holds a run or another model. Export to a folder of its own."
    )


def _dtype(name: str, stored: Stored, quantized: set[str]) -> Any:
  if name in quantized:
    return ml_dtypes.float8_e4m3fn
  if stored == "float32" or name.endswith("e_score_correction_bias"):
    return np.float32
  return ml_dtypes.bfloat16


def _reading_order(name: str) -> tuple[int, str]:
  """Embedding, layers by number, then the rest."""
  match = _LAYER.match(name)
  if match:
    return int(match[1]), name
  return (-1 if "embed_tokens" in name else 1 << 30), name


def _scale_dtype(name: str, scales) -> Any:
  """Scales are stored again in the dtype they came in."""
  return scales[name].dtype if scales and name in scales else np.float32


def _blocks(w, scale, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
  """The stored blocks of an untouched weight, new ones of another."""
  if scale is not None:
    kept = fp8.stored_blocks(w, scale)
    if kept is not None:
      return kept, scale
    power_of_two |= scale.dtype != np.float32
  return fp8.quantize(w, scale_fmt="ue8m0" if power_of_two else None)
