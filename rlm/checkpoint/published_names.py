"""Published tensor names <-> the leaves of our variables (sheet, section 4).

A leaf stacks the layers of its kind, and the experts, on its leading axes; a
published file holds one tensor for each of them. Its matrices are [out, in],
ours [in, out]. DeepSeek, Qwen and Llama share every name here; q_norm is the
latent's norm in one and that of each head in the other.
"""

import dataclasses
import re
from typing import Any

import jax

from rlm.models.config import ModelConfig

_TOP = {
  "embed.embedding": "model.embed_tokens.weight",
  "final_norm.scale": "model.norm.weight",
  "head": "lm_head.weight",
}
_BLOCK = {
  "attn_norm.scale": "input_layernorm.weight",
  "ffn_norm.scale": "post_attention_layernorm.weight",
  "attn.q_proj": "self_attn.q_proj.weight",
  "attn.q_bias": "self_attn.q_proj.bias",
  "attn.k_proj": "self_attn.k_proj.weight",
  "attn.k_bias": "self_attn.k_proj.bias",
  "attn.k_norm.scale": "self_attn.k_norm.weight",
  "attn.v_proj": "self_attn.v_proj.weight",
  "attn.v_bias": "self_attn.v_proj.bias",
  "attn.q_a": "self_attn.q_a_proj.weight",
  "attn.q_b": "self_attn.q_b_proj.weight",
  "attn.kv_a": "self_attn.kv_a_proj_with_mqa.weight",
  "attn.kv_norm.scale": "self_attn.kv_a_layernorm.weight",
  "attn.kv_b": "self_attn.kv_b_proj.weight",
  "attn.out_proj": "self_attn.o_proj.weight",
  "ffn.router": "mlp.gate.weight",
  "ffn.expert_bias": "mlp.gate.e_score_correction_bias",
}
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
_MTP = {
  "embedding_norm.scale": "enorm.weight",
  "hidden_norm.scale": "hnorm.weight",
  "proj": "eh_proj.weight",
  "norm.scale": "shared_head.norm.weight",
}
# Buffers that old files hold and that config.json determines.
_DETERMINED = re.compile(
  r"(model\.layers\.\d+\.self_attn\.|model\.)rotary_emb\.inv_freq"
)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One published tensor, and its place in a leaf.

  Attributes:
    name: as published.
    place: index into the leading axes of the leaf.
    transposed: whether it is a matrix [out, in].
    shape: as published.
  """

  name: str
  place: tuple[int, ...]
  transposed: bool
  shape: tuple[int, ...]


def leaf_name(path: tuple) -> str:
  """A leaf's keys joined by dots, the collection first."""
  return ".".join(str(entry.key) for entry in path)


def published_tensors(
  cfg: ModelConfig, variables: Any
) -> dict[str, list[Tensor]]:
  """The tensors of every leaf, by its name; no tensor for one not published.

  Args:
    cfg: the model's sizes.
    variables: of the model, or their shapes.

  Returns:
    Leaf name -> its tensors, in the order of their places. Expert biases of
    models that choose without them have none.

  Raises:
    KeyError: a leaf that this table lacks.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
  return {leaf_name(p): _tensors(cfg, leaf_name(p), x.shape) for p, x in leaves}


def _tensors(
  cfg: ModelConfig, leaf: str, shape: tuple[int, ...]
) -> list[Tensor]:
  _, name = leaf.split(".", 1)  # without the collection
  kind, _, rest = name.partition(".")
  first = {
    "dense_layers": 0,
    "moe_layers": cfg.first_k_dense_replace,
    "mtp_modules": cfg.num_hidden_layers,
  }
  if kind not in first:
    return [_tensor(_TOP[name], (), shape, name == "head")]
  if rest.endswith("expert_bias") and cfg.topk_method != "noaux_tc":
    return []
  if kind == "mtp_modules" and not rest.startswith("block."):
    published = _MTP[rest]
  else:
    published = _block_name(cfg, rest.removeprefix("block."), len(shape))
  matrix = not published.endswith((".bias", "norm.weight", "_bias"))
  tensors = []
  for layer in range(shape[0]):
    prefix = f"model.layers.{first[kind] + layer}."
    if "{}" not in published:
      place: tuple[int, ...] = (layer,)
      tensors.append(_tensor(prefix + published, place, shape, matrix))
      continue
    for expert in range(shape[1]):
      full = prefix + published.format(expert)
      tensors.append(_tensor(full, (layer, expert), shape, matrix))
  return tensors


def _block_name(cfg: ModelConfig, name: str, rank: int) -> str:
  """The published name within a layer; "{}" stands for the expert's number."""
  if name == "attn.q_norm.scale":
    latent = cfg.has_latent_attention
    return f"self_attn.{'q_a_layernorm' if latent else 'q_norm'}.weight"
  module, _, last = name.rpartition(".")
  if last not in _FEED_FORWARD:
    return _BLOCK[name]
  if module == "ffn.shared":
    return f"mlp.shared_experts.{last}.weight"
  return (
    f"mlp.experts.{{}}.{last}.weight" if rank == 4 else f"mlp.{last}.weight"
  )


def _tensor(name, place, leaf_shape, matrix) -> Tensor:
  shape = leaf_shape[len(place) :]
  return Tensor(name, place, matrix, shape[::-1] if matrix else shape)


def copies(cfg: ModelConfig) -> dict[str, str]:
  """Tensors that published files repeat -> what they are copies of.

  The MTP modules of DeepSeek-V3 carry embedding and head; a tied head may be
  stored beside the embedding. A file may leave them out.
  """
  embedding, head = _TOP["embed.embedding"], _TOP["head"]
  found = {}
  if cfg.tie_word_embeddings:
    found[head] = embedding
    head = embedding
  for k in range(cfg.num_nextn_predict_layers):
    prefix = f"model.layers.{cfg.num_hidden_layers + k}."
    found[prefix + "embed_tokens.weight"] = embedding
    found[prefix + "shared_head.head.weight"] = head
  return found


def without_mtp(cfg: ModelConfig) -> tuple[ModelConfig, list[str]]:
  """The model without its MTP modules, and the prefixes of their tensors."""
  first, depth = cfg.num_hidden_layers, cfg.num_nextn_predict_layers
  prefixes = [f"model.layers.{first + k}." for k in range(depth)]
  return dataclasses.replace(cfg, num_nextn_predict_layers=0), prefixes


def is_determined(name: str) -> bool:
  """Whether a tensor follows from config.json, so that it is not read."""
  return _DETERMINED.fullmatch(name) is not None
