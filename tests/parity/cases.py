"""Small published models: their config.json, weights by published name, rows.

Weights are drawn by numpy from a seed and their own names, so that neither
torch nor transformers is needed to make them, and nothing of them is stored.
They are able to fail: attention is peaked, biases move choices, norms differ
from 1 and logits have a std above 1. At the std of training, 0.006, a wrong
layout of RoPE would move a logit by less than any tolerance.
"""

import json
import pathlib
import zlib

import numpy as np
import safetensors.numpy

_COMMON = dict(
  vocab_size=40,
  hidden_size=32,
  num_hidden_layers=2,
  intermediate_size=48,
  num_attention_heads=4,
  max_position_embeddings=96,
  rms_norm_eps=1e-6,
  initializer_range=0.02,
  hidden_act="silu",
  tie_word_embeddings=False,
  torch_dtype="float32",
)
_LATENT = dict(
  _COMMON,
  num_key_value_heads=4,
  kv_lora_rank=16,
  qk_nope_head_dim=6,
  qk_rope_head_dim=8,
  v_head_dim=10,
  moe_intermediate_size=16,
  first_k_dense_replace=1,
  moe_layer_freq=1,
  attention_bias=False,
)
# Rows of 24 tokens and 64 decoded ones pass the original 16 of every scaling.
# At this theta and these betas a pair lies halfway up YaRN's ramp.
_YARN = dict(
  factor=4.0,
  original_max_position_embeddings=16,
  beta_fast=2,
  beta_slow=1,
  mscale=1.0,
  mscale_all_dim=0.6,
)
_V3 = dict(
  _LATENT,
  architectures=["DeepseekV3ForCausalLM"],
  model_type="deepseek_v3",
  q_lora_rank=12,
  n_routed_experts=8,
  num_experts_per_tok=3,
  n_shared_experts=1,
  n_group=4,
  topk_group=2,
  topk_method="noaux_tc",
  scoring_func="sigmoid",
  norm_topk_prob=True,
  routed_scaling_factor=2.5,
  num_nextn_predict_layers=0,
  rope_theta=10.0,
  rope_scaling=dict(_YARN, type="yarn"),
)

CONFIGS = {
  # Groups, biased selection, a dense first layer, YaRN on cos, sin and scale.
  "deepseek_v3": _V3,
  # No query latent, two shared experts, choice without groups.
  "deepseek_v2_lite": dict(
    _LATENT,
    architectures=["DeepseekV2ForCausalLM"],
    model_type="deepseek_v2",
    q_lora_rank=None,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=2,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    rope_parameters=dict(
      rope_type="yarn",
      rope_theta=10000.0,
      factor=40.0,
      original_max_position_embeddings=16,
      beta_fast=32,
      beta_slow=1,
      mscale=0.707,
      mscale_all_dim=0.707,
    ),
  ),
  # Groups by their best expert, and the large factor of V2-236B.
  "deepseek_v2": dict(
    _LATENT,
    architectures=["DeepseekV2ForCausalLM"],
    model_type="deepseek_v2",
    q_lora_rank=12,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=2,
    n_group=4,
    topk_group=2,
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    rope_theta=10000.0,
  ),
  # Biases on q, k and v, tied embeddings.
  "qwen2": dict(
    _COMMON,
    architectures=["Qwen2ForCausalLM"],
    model_type="qwen2",
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    use_sliding_window=False,
    rope_theta=10000.0,
  ),
  # Norms of q and k, heads wider than hidden_size / heads, YaRN whose whole
  # magnitude is on cos and sin.
  "qwen3": dict(
    _COMMON,
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    num_key_value_heads=2,
    head_dim=12,
    attention_bias=False,
    rope_parameters=dict(
      rope_type="yarn",
      rope_theta=1000000.0,
      factor=4.0,
      original_max_position_embeddings=16,
    ),
  ),
  # Llama 3.1's scaling, with a pair on its ramp.
  "llama": dict(
    _COMMON,
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    attention_bias=False,
    mlp_bias=False,
    rope_theta=10.0,
    rope_scaling=dict(
      rope_type="llama3",
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=16,
    ),
  ),
  # What V3's class allows beside V3: no latent, no groups, gates that are not
  # normalised, no dense layer, a tied head, plain RoPE.
  "deepseek_v3_plain": dict(
    _V3,
    first_k_dense_replace=0,
    q_lora_rank=None,
    n_group=1,
    topk_group=1,
    n_shared_experts=2,
    norm_topk_prob=False,
    tie_word_embeddings=True,
    rope_theta=10000.0,
    rope_scaling=None,
  ),
  # The factor on cos and sin given as a whole; one key head; an untied head.
  "qwen2_yarn": dict(
    _COMMON,
    architectures=["Qwen2ForCausalLM"],
    model_type="qwen2",
    num_key_value_heads=1,
    rope_parameters=dict(
      rope_type="yarn",
      rope_theta=10.0,
      factor=4.0,
      original_max_position_embeddings=16,
      beta_fast=2,
      attention_factor=1.3,
    ),
  ),
  # Both magnitudes without latent attention: their ratio is on cos and sin,
  # but mscale_all_dim is not on the softmax scale, as it is in DeepSeek's.
  "llama_yarn": dict(
    _COMMON,
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    num_key_value_heads=2,
    attention_bias=False,
    mlp_bias=False,
    rope_theta=10.0,
    rope_scaling=dict(_YARN, rope_type="yarn"),
  ),
}
# Further corners of families that the others hold already.
RARE = ("deepseek_v3_plain", "qwen2_yarn")

# Of the weights: those of 24 tried whose greedy text goes longest without
# running in a circle, which would hide what the cache holds.
SEEDS = {
  "deepseek_v3": 23,
  "deepseek_v2_lite": 14,
  "deepseek_v2": 5,
  "qwen2": 10,
  "qwen3": 21,
  "llama": 9,
  "deepseek_v3_plain": 15,
  "qwen2_yarn": 7,
  "llama_yarn": 0,
}

LENGTH = 24  # tokens of a row
# Documents as (row, first position, length). Row 1 of "padded" begins with
# padding, as batches of transformers do; "packed" has two documents in row 0,
# and padding before and after the one in row 1.
BATCHES = {
  "padded": ((0, 0, 24), (1, 7, 17)),
  "packed": ((0, 0, 9), (0, 9, 15), (1, 4, 18)),
}
PROMPT_LENGTHS = (8, 5)
NEW_TOKENS = 64


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
  """Published name -> shape as published, [out, in]."""
  d, vocab = config["hidden_size"], config["vocab_size"]
  layers = config["num_hidden_layers"]
  shapes: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (vocab, d),
    "model.norm.weight": (d,),
  }
  if not config["tie_word_embeddings"]:
    shapes["lm_head.weight"] = (vocab, d)
  depth = config.get("num_nextn_predict_layers", 0)
  for layer in range(layers + depth):
    prefix = f"model.layers.{layer}."
    for name, shape in _layer_shapes(config, layer).items():
      shapes[prefix + name] = shape
    if layer >= layers:
      shapes[prefix + "enorm.weight"] = (d,)
      shapes[prefix + "hnorm.weight"] = (d,)
      shapes[prefix + "eh_proj.weight"] = (d, 2 * d)
      shapes[prefix + "shared_head.norm.weight"] = (d,)
  return shapes


def _layer_shapes(config, layer):
  d = config["hidden_size"]
  shapes = {
    "input_layernorm.weight": (d,),
    "post_attention_layernorm.weight": (d,),
  }
  attention = _latent_shapes if "kv_lora_rank" in config else _grouped_shapes
  for name, shape in attention(config).items():
    shapes[f"self_attn.{name}"] = shape
  if layer < config.get("first_k_dense_replace", layer + 1):
    return shapes | _swiglu_shapes("mlp.", d, config["intermediate_size"])
  width, experts = config["moe_intermediate_size"], config["n_routed_experts"]
  shapes["mlp.gate.weight"] = (experts, d)
  if config["model_type"] == "deepseek_v3":
    shapes["mlp.gate.e_score_correction_bias"] = (experts,)
  for expert in range(experts):
    shapes |= _swiglu_shapes(f"mlp.experts.{expert}.", d, width)
  shared = config["n_shared_experts"] * width
  return shapes | _swiglu_shapes("mlp.shared_experts.", d, shared)


def _swiglu_shapes(prefix, d, width):
  return {
    prefix + "gate_proj.weight": (width, d),
    prefix + "up_proj.weight": (width, d),
    prefix + "down_proj.weight": (d, width),
  }


def _latent_shapes(config):
  d, heads = config["hidden_size"], config["num_attention_heads"]
  nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
  value = config["v_head_dim"]
  q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
  if q_rank is None:
    shapes = {"q_proj.weight": (heads * (nope + rope), d)}
  else:
    shapes = {
      "q_a_proj.weight": (q_rank, d),
      "q_a_layernorm.weight": (q_rank,),
      "q_b_proj.weight": (heads * (nope + rope), q_rank),
    }
  return shapes | {
    "kv_a_proj_with_mqa.weight": (kv_rank + rope, d),
    "kv_a_layernorm.weight": (kv_rank,),
    "kv_b_proj.weight": (heads * (nope + value), kv_rank),
    "o_proj.weight": (d, heads * value),
  }


def _grouped_shapes(config):
  d, heads = config["hidden_size"], config["num_attention_heads"]
  width = config.get("head_dim", d // heads)
  key_heads = config["num_key_value_heads"]
  shapes = {"o_proj.weight": (d, heads * width)}
  for name, count in (("q", heads), ("k", key_heads), ("v", key_heads)):
    shapes[f"{name}_proj.weight"] = (count * width, d)
    if config["model_type"] == "qwen2":
      shapes[f"{name}_proj.bias"] = (count * width,)
  if config["model_type"] == "qwen3":
    shapes |= {"q_norm.weight": (width,), "k_norm.weight": (width,)}
  return shapes


def make_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
  """float32 tensors by published name."""
  return {
    name: _draw(name, shape, config["tie_word_embeddings"], seed)
    for name, shape in tensor_shapes(config).items()
  }


def _draw(name, shape, tied, seed):
  rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
  x = rng.standard_normal(shape)
  if name.endswith("norm.weight"):
    # Where q and k are normalised, their scales alone can peak attention.
    head_norm = name.endswith(("q_norm.weight", "k_norm.weight"))
    x = (1 + 0.3 * x) * (1.5 if head_norm else 1)
  elif name.endswith("bias"):
    x *= 0.3
    # Below 0 with the score: experts masked with 0 would win against them.
    x -= 0.6 if name.endswith("e_score_correction_bias") else 0
  elif name == "model.embed_tokens.weight":
    x *= 0.25 if tied else 1  # tied, it is the head as well
  else:
    gains = {"q_proj": 2.5, "q_b_proj": 2.5, "gate": 1.5, "lm_head": 1.5}
    x *= gains.get(name.split(".")[-2], 1) / np.sqrt(shape[-1])
  return x.astype(np.float32)


def write_folder(folder: pathlib.Path, config: dict, weights: dict) -> None:
  """What a published model's folder holds: config.json and safetensors."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  safetensors.numpy.save_file(
    weights, folder / "model.safetensors", metadata={"format": "pt"}
  )


def write_case(folder: pathlib.Path, name: str) -> None:
  """The folder of one of `CONFIGS`."""
  config = CONFIGS[name]
  write_folder(folder, config, make_weights(config, SEEDS[name]))


def make_batch(documents) -> dict[str, np.ndarray]:
  """tokens, positions, segment_ids int32 [2, LENGTH], as rlm reads them.

  Padding holds a token that occurs in documents too, so that it would be seen
  if it were read.
  """
  shape = (2, LENGTH)
  tokens = np.random.default_rng(3).integers(0, 40, shape).astype(np.int32)
  positions, segment_ids = np.zeros((2, *shape), np.int32)
  for number, (row, start, length) in enumerate(documents):
    cells = slice(start, start + length)
    positions[row, cells] = np.arange(length)
    segment_ids[row, cells] = number + 1
  return dict(tokens=tokens, positions=positions, segment_ids=segment_ids)


def make_prompts() -> list[list[int]]:
  """Prompts of unequal length, for greedy decode."""
  rng = np.random.default_rng(4)
  return [rng.integers(0, 40, length).tolist() for length in PROMPT_LENGTHS]


SKETCH = 8


def sketch(name: str, tensor: np.ndarray) -> np.ndarray:
  """A tensor's products with `SKETCH` random vectors of signs, float32.

  Scaled so that the norm of the difference of two sketches estimates that of
  the tensors: it is less than a tenth of it once in 10^7 times (chi-squared of
  8), whatever the difference. So eight numbers stand in for a gradient.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  flat = tensor.astype(np.float64).reshape(-1)
  signs = rng.integers(0, 2, (SKETCH, flat.size)) * 2 - 1
  return (signs @ flat / np.sqrt(SKETCH)).astype(np.float32)
