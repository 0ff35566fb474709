"""The published config.json <-> ModelConfig, for the families that we compute.

A field that `published_families` does not know stops, since it may change what
the weights mean. `rope_theta` with `rope_scaling`, as published, and
`rope_parameters`, as transformers 5 writes it, are read alike.
"""

import dataclasses
import json
import math
import os
import pathlib
import warnings
from collections.abc import Mapping
from types import NoneType
from typing import Any

from rlm.config import build, did_you_mean, id_list
from rlm.models.config import Llama3Scaling, ModelConfig, YarnScaling
from rlm.models.published_families import (
  FAMILIES,
  FIXED,
  INERT,
  QUANTIZATION,
  ROPE,
  Family,
)
from rlm.models.rope import rope_magnitude, yarn_mscale

# How it is computed, which no config.json says.
_COMPUTED = dict(
  remat="none", unroll_layers=False, attention_chunk=0, logits_chunk=0
)


def read_published_config(
  source: str | os.PathLike | Mapping[str, Any],
  *,
  dtype: str | None = None,
  param_dtype: str | None = None,
) -> ModelConfig:
  """The ModelConfig that a config.json describes.

  Args:
    source: the file, a folder that holds it, or its contents.
    dtype: of activations; None takes what the file says of the weights.
    param_dtype: of parameters; likewise.

  Returns:
    The config; without chunks, remat or unrolling (`dataclasses.replace`).

  Raises:
    ValueError: another family, or a field that is unknown, missing, of a value
      that we do not compute, or at odds with another; the message names all
      unknown ones, and what is supported.

  Warns:
    UserWarning: rope_scaling.attn_factor, which transformers ignores and vLLM
      multiplies by.
  """
  where, fields = _load(source)
  try:
    family = _family_of(fields)
    _check_known(fields, family)
    values = {name: fields[name] for name in family.fields if name in fields}
    values |= family.implied | _COMPUTED
    stored = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    values["dtype"] = dtype or stored
    values["param_dtype"] = param_dtype or stored
    values["n_vocab_used"] = fields.get(
      "n_vocab_used", fields.get("vocab_size")
    )
    values["eos_token_id"] = id_list(fields.get("eos_token_id"), "eos_token_id")
    values |= _experts(fields, family)
    values |= _heads(fields, family)
    values |= _rope(fields)
    cfg = build(ModelConfig, values, "config.json")
    _check_latent_norms(cfg)
    _check_derived(fields, cfg)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error
  return cfg


def _load(source) -> tuple[str, dict[str, Any]]:
  """What to call the source in messages, and its fields."""
  if isinstance(source, Mapping):
    return "config", dict(source)
  path = pathlib.Path(source)
  if path.is_dir():
    path /= "config.json"
  if not path.is_file():
    raise ValueError(f"there is no file {path}. Name a model's folder.")
  try:
    fields = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(fields, dict):
    raise ValueError(f"{path} holds no JSON object.")
  return str(path), fields


def _family_of(fields: dict[str, Any]) -> Family:
  name = fields.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise ValueError(
      f"model_type={name!r} is not supported{did_you_mean(name, FAMILIES)}"
      f" Supported are {', '.join(FAMILIES)}."
    )
  return FAMILIES[name]


def _check_known(fields: dict[str, Any], family: Family) -> None:
  known = {
    *family.fields,
    *family.derived,
    *FIXED,
    *ROPE,
    *INERT,
    *("model_type", "dtype", "torch_dtype", "n_vocab_used", "eos_token_id"),
    "quantization_config",
  }
  unknown = [name for name in fields if name not in known]
  if unknown:
    raise ValueError(
      "; ".join(
        f"unknown field {name!r}{did_you_mean(name, known)}" for name in unknown
      )
      + f" model_type={fields['model_type']!r} has the fields"
      f" {', '.join((*family.fields, *family.derived))}, and inert ones."
      " Remove a field that changes nothing."
    )
  for name in ("quantization_config", "rope_scaling", "rope_parameters"):
    if not isinstance(fields.get(name), dict | NoneType):
      raise ValueError(
        f"{name}={fields[name]!r:.60} must be an object with keys, or null."
      )
  stored = fields.get("quantization_config") or {}
  for name, choices in QUANTIZATION.items():
    if name in stored and stored[name] not in choices:
      raise ValueError(
        f"quantization_config.{name}={stored[name]!r} is not supported;"
        f" supported: {', '.join(map(repr, choices))}."
      )
  for name, allowed in FIXED.items():
    if name in fields and fields[name] not in allowed:
      raise ValueError(
        f"{name}={fields[name]!r} is not supported; supported: {allowed[0]!r}."
      )


def _experts(fields: dict[str, Any], family: Family) -> dict[str, Any]:
  """Groups that may be null, and the choices that the family implies."""
  if "n_routed_experts" not in family.fields:
    return {"first_k_dense_replace": fields.get("num_hidden_layers")}
  found = {}
  for name in ("n_group", "topk_group"):
    # null where there are no groups, as V2's class writes it.
    found[name] = 1 if fields.get(name) is None else fields[name]
  for name in ("scoring_func", "topk_method"):
    implied = family.implied.get(name)
    if implied and fields.get(name, implied) != implied:
      raise ValueError(
        f"{name}={fields[name]!r} contradicts model_type="
        f"{fields['model_type']!r}, which has {implied!r}."
      )
  if family.implied["scoring_func"] == "softmax":
    found["topk_method"] = fields.get("topk_method", "greedy")
    if fields.get("norm_topk_prob"):
      raise ValueError(
        "norm_topk_prob=True is not supported in deepseek_v2: its released"
        " code then leaves out routed_scaling_factor, transformers ignores it."
        " Supported: False."
      )
    if found["topk_method"] not in ("greedy", "group_limited_greedy"):
      raise ValueError(
        f"topk_method={found['topk_method']!r} is not supported in"
        " deepseek_v2; supported: 'greedy', 'group_limited_greedy'."
      )
  return found


def _heads(fields: dict[str, Any], family: Family) -> dict[str, Any]:
  """num_key_value_heads and head_dim of ModelConfig."""
  if "kv_lora_rank" in family.fields:
    return {}
  heads = fields.get("num_attention_heads")
  width = fields.get("head_dim")
  size = fields.get("hidden_size")
  if width is None and isinstance(heads, int) and isinstance(size, int):
    width = size // max(heads, 1)
  key_heads = fields.get("num_key_value_heads")
  return {
    "head_dim": width,
    "num_key_value_heads": heads if key_heads is None else key_heads,
  }


def _check_latent_norms(cfg: ModelConfig) -> None:
  if cfg.has_latent_attention and cfg.rms_norm_eps != 1e-6:
    raise ValueError(
      f"rms_norm_eps={cfg.rms_norm_eps} is not supported with latent attention:"
      " the released code takes 1e-6 for the latents' norms whatever the file"
      " says, and one field cannot say both. Supported: 1e-06."
    )


def _check_derived(fields: dict[str, Any], cfg: ModelConfig) -> None:
  """Fields that repeat others must agree with them."""
  derived: dict[str, Any] = {}
  if cfg.has_latent_attention:
    derived = {
      "num_key_value_heads": cfg.num_attention_heads,
      "qk_head_dim": cfg.qk_nope_head_dim + cfg.qk_rope_head_dim,
      "head_dim": cfg.qk_rope_head_dim,
    }
  derived["layer_types"] = ["full_attention"] * cfg.num_hidden_layers
  for name, needed in derived.items():
    if fields.get(name) is not None and fields[name] != needed:
      raise ValueError(
        f"{name}={fields[name]!r} contradicts the other fields, by which it is"
        f" {needed!r}."
      )


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
  """rope_theta and rope_scaling, from either layout."""
  theta = fields.get("rope_theta")
  old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
  given = dict((old or {}) if new is None else new)
  found = {"rope_theta": given.pop("rope_theta", theta)}
  found["rope_scaling"] = _scaling(given, fields)
  if new is not None:
    same = theta in (None, found["rope_theta"])
    if not same or (old and _scaling(old, fields) != found["rope_scaling"]):
      raise ValueError(
        f"rope_parameters={new!r} contradicts rope_theta={theta!r} with"
        f" rope_scaling={old!r}. Keep one of the two."
      )
  if found["rope_theta"] is None:
    raise ValueError("rope_theta is missing, which is guessed nowhere.")
  return found


def _scaling(
  given: dict[str, Any], fields: dict[str, Any]
) -> YarnScaling | Llama3Scaling | None:
  """`rope_scaling` without rope_theta."""
  given = dict(given)
  old, new = given.pop("type", None), given.pop("rope_type", None)
  if old and new and old != new:
    raise ValueError(
      f"rope_scaling has type={old!r} and rope_type={new!r}. Keep one."
    )
  kind = new or old or "default"
  if given.pop("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError("partial_rotary_factor is not supported; supported: 1.0.")
  if kind == "default":
    given = {k: v for k, v in given.items() if v is not None}
    if given:
      raise ValueError(
        f"rope_scaling of type 'default' takes no {', '.join(given)}."
      )
    return None
  if kind == "llama3":
    return build(Llama3Scaling, given, "rope_scaling")
  if kind == "yarn":
    return _yarn(given, fields)
  raise ValueError(
    f"rope_scaling of type {kind!r} is not supported; supported: 'default',"
    " 'yarn', 'llama3'."
  )


def _yarn(given: dict[str, Any], fields: dict[str, Any]) -> YarnScaling:
  """YaRN, whose defaults are those of transformers."""
  if not given.pop("truncate", True):
    raise ValueError("rope_scaling.truncate is not supported; supported: true.")
  if (ignored := given.pop("attn_factor", None)) is not None:
    warnings.warn(
      f"rope_scaling.attn_factor={ignored} is ignored, as transformers does;"
      " vLLM multiplies cos and sin by it. Name it attention_factor to set the"
      " factor as a whole.",
      stacklevel=5,
    )
  magnitude = given.pop("attention_factor", None)
  original = given.get("original_max_position_embeddings")
  context = fields.get("max_position_embeddings")
  if given.get("factor") is None and original and context:
    given["factor"] = context / original
  given["beta_fast"] = given.get("beta_fast") or 32
  given["beta_slow"] = given.get("beta_slow") or 1
  both = bool(given.get("mscale")), bool(given.get("mscale_all_dim"))
  if any(both) and not all(both):
    raise ValueError(
      "rope_scaling has one of mscale and mscale_all_dim without the other, of"
      " which released codes make different things. Give both or none."
    )
  if not any(both):
    # The whole magnitude on cos and sin, none on the softmax scale.
    given |= {"mscale": 1.0, "mscale_all_dim": 0.0}
  scaling = build(YarnScaling, given, "rope_scaling")
  if magnitude is None:
    return scaling
  if scaling.factor == 1 or not isinstance(magnitude, int | float):
    raise ValueError(
      f"attention_factor={magnitude!r} needs to be a number, and"
      f" rope_scaling.factor={scaling.factor} above 1."
    )
  whole = magnitude * yarn_mscale(scaling.factor, scaling.mscale_all_dim)
  # Rounded, so that what we write is read as what it was.
  mscale = round((whole - 1) / (0.1 * math.log(scaling.factor)), 12)
  return dataclasses.replace(scaling, mscale=mscale)


def write_published_config(cfg: ModelConfig) -> dict[str, Any]:
  """The config.json of a model, in the published layout.

  Args:
    cfg: the model's sizes.

  Returns:
    Fields that `read_published_config` and transformers read alike;
    `n_vocab_used` beside them where ids are left over, which others ignore.

  Raises:
    ValueError: no supported family computes this model; the message says why.
  """
  name = _family_name(cfg)
  family = FAMILIES[name]
  fields: dict[str, Any] = {
    "architectures": [family.architecture],
    "model_type": name,
  }
  fields |= {field: getattr(cfg, field) for field in family.fields}
  fields |= {
    "hidden_act": "silu",
    "torch_dtype": cfg.param_dtype,
    "rope_theta": cfg.rope_theta,
    "rope_scaling": _published_scaling(cfg),
    "use_cache": True,
  }
  if cfg.has_latent_attention:
    fields["num_key_value_heads"] = cfg.num_attention_heads
    fields["scoring_func"] = family.implied["scoring_func"]
    fields.setdefault("topk_method", family.implied.get("topk_method"))
    fields["moe_layer_freq"] = 1
  else:
    fields["head_dim"] = cfg.head_dim
  if name in ("deepseek_v2", "deepseek_v3", "llama", "qwen3"):
    fields["attention_bias"] = False
  if cfg.eos_token_id:
    ids = list(cfg.eos_token_id)
    fields["eos_token_id"] = ids[0] if len(ids) == 1 else ids
  if cfg.n_vocab_used != cfg.vocab_size:
    fields["n_vocab_used"] = cfg.n_vocab_used
  return fields


def _family_name(cfg: ModelConfig) -> str:
  """The model_type, or why there is none."""

  def refuse(what: str):
    raise ValueError(
      f"{what}, which no published family has: it cannot be written as one."
    )

  if not cfg.has_latent_attention:
    if not cfg.is_dense:
      refuse("grouped-query attention with routed experts")
    if cfg.num_nextn_predict_layers:
      refuse("grouped-query attention with MTP modules")
    if cfg.qkv_bias and cfg.qk_norm:
      refuse("qkv_bias together with qk_norm")
    return "qwen2" if cfg.qkv_bias else "qwen3" if cfg.qk_norm else "llama"
  _check_latent_norms(cfg)
  if cfg.num_nextn_predict_layers and cfg.is_dense:
    refuse("MTP modules without routed experts")
  if not cfg.is_dense and not cfg.n_shared_experts:
    refuse("routed experts without a shared one (n_shared_experts=0)")
  if cfg.is_dense or (cfg.scoring_func, cfg.topk_method) == (
    "sigmoid",
    "noaux_tc",
  ):
    return "deepseek_v3"
  if cfg.scoring_func == "softmax" and cfg.topk_method != "noaux_tc":
    if cfg.norm_topk_prob:
      refuse("softmax gates with norm_topk_prob=True")
    if cfg.num_nextn_predict_layers:
      refuse("softmax gates with MTP modules")
    return "deepseek_v2"
  return refuse(
    f"scoring_func={cfg.scoring_func!r} with topk_method={cfg.topk_method!r}"
  )


def _published_scaling(cfg: ModelConfig) -> dict[str, Any] | None:
  scaling = cfg.rope_scaling
  if scaling is None:
    return None
  fields = dataclasses.asdict(scaling)
  fields["rope_type"] = fields["type"]
  if isinstance(scaling, YarnScaling):
    if bool(scaling.mscale) != bool(scaling.mscale_all_dim):
      # Released codes differ where one of the two is missing.
      if scaling.mscale_all_dim:
        raise ValueError(
          f"rope_scaling.mscale=0 with mscale_all_dim={scaling.mscale_all_dim}"
          " has no published form. Set both."
        )
      if scaling.mscale != 1:  # which is the default
        fields["attention_factor"] = round(rope_magnitude(scaling), 12)
    if not (scaling.mscale and scaling.mscale_all_dim):
      del fields["mscale"], fields["mscale_all_dim"]
  return fields
