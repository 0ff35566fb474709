"""The families whose published weights we compute, and their config.json's.

Every field of a config.json is copied (`Family.fields`), repeats others and
must agree (`Family.derived`), has the one value that we compute (`FIXED`),
says how positions turn (`ROPE`), or changes nothing (`INERT`).
"""

import dataclasses
from typing import Any

# Fields that change nothing that we compute, and why.
INERT = {
  "architectures": "model_type says it",
  "auto_map": "code that we never run",
  "transformers_version": "who wrote the file",
  "_name_or_path": "where the file lay",
  "bos_token_id": "the tokenizer's",
  "pad_token_id": "the tokenizer's",
  "use_cache": "how transformers generates",
  "output_attentions": "what transformers returns",
  "output_hidden_states": "what transformers returns",
  "output_router_logits": "what transformers returns",
  "return_dict": "what transformers returns",
  "id2label": "of classifiers",
  "label2id": "of classifiers",
  "problem_type": "of classifiers",
  "chunk_size_feed_forward": "how transformers computes",
  "pretraining_tp": "how it was trained",
  "ep_size": "how it was trained",
  "aux_loss_alpha": "the training config's; stale in V3's file (sheet 1)",
  "seq_aux": "the training config's",
  "sliding_window": "off unless use_sliding_window",
  "max_window_layers": "off unless use_sliding_window",
}

# Fields that may have one value only; elsewhere we would compute another model.
FIXED = {
  "hidden_act": ("silu",),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "attention_dropout": (0, 0.0, None),
  "moe_layer_freq": (1,),
  "rope_interleave": (True,),
  "use_sliding_window": (False,),
  "use_mrope": (False,),
  "is_encoder_decoder": (False,),
}

_SIZES = (
  *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
  *("num_attention_heads", "max_position_embeddings", "rms_norm_eps"),
  *("initializer_range", "tie_word_embeddings"),
)
_LATENT = (
  *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
  *("v_head_dim", "first_k_dense_replace", "moe_intermediate_size"),
  *("n_routed_experts", "num_experts_per_tok", "n_shared_experts"),
  *("norm_topk_prob", "routed_scaling_factor"),
)
# How weights may be stored; fields beside these do not concern reading.
QUANTIZATION = {
  "quant_method": ("fp8",),
  "fmt": ("e4m3",),
  "weight_block_size": ([128, 128],),
  "scale_fmt": (None, "ue8m0", "float"),
}
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


@dataclasses.dataclass(frozen=True)
class Family:
  """What a `model_type` implies without saying so.

  Attributes:
    architecture: class of transformers.
    fields: of config.json that are copied as they are.
    derived: further fields that must agree with the others.
    implied: fields of ModelConfig that the family settles.
  """

  architecture: str
  fields: tuple[str, ...]
  derived: tuple[str, ...]
  implied: dict[str, Any]


_DENSE: dict[str, Any] = dict(
  moe_intermediate_size=0,
  n_routed_experts=0,
  num_experts_per_tok=0,
  n_shared_experts=0,
  n_group=1,
  topk_group=1,
  topk_method="greedy",
  scoring_func="softmax",
  norm_topk_prob=False,
  routed_scaling_factor=1.0,
  q_lora_rank=None,
  kv_lora_rank=0,
  qk_nope_head_dim=0,
  qk_rope_head_dim=0,
  v_head_dim=0,
  num_nextn_predict_layers=0,
)
_DERIVED = ("num_key_value_heads", "head_dim", "qk_head_dim")
_GROUPS = ("n_group", "topk_group", "topk_method", "scoring_func")

FAMILIES = {
  "deepseek_v2": Family(
    "DeepseekV2ForCausalLM",
    _SIZES + _LATENT + ("n_group", "topk_group", "topk_method"),
    (*_DERIVED, "scoring_func"),
    dict(scoring_func="softmax", num_nextn_predict_layers=0),
  ),
  "deepseek_v3": Family(
    "DeepseekV3ForCausalLM",
    _SIZES + _LATENT + ("n_group", "topk_group", "num_nextn_predict_layers"),
    (*_DERIVED, "scoring_func", "topk_method"),
    dict(scoring_func="sigmoid", topk_method="noaux_tc"),
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    (*_SIZES, "num_key_value_heads"),
    ("head_dim", "layer_types"),
    dict(_DENSE, qkv_bias=True),
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    (*_SIZES, "num_key_value_heads", "head_dim"),
    ("layer_types",),
    dict(_DENSE, qk_norm=True),
  ),
  "llama": Family(
    "LlamaForCausalLM",
    (*_SIZES, "num_key_value_heads"),
    ("head_dim",),
    _DENSE,
  ),
}
