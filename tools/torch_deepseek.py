"""DeepseekV3 of `transformers` on torch with the sizes of a ModelConfig.

The rival of the benchmarks (extra `parity`). Weights are random: only shapes
and precision count here.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import transformers

from rlm.models.config import ModelConfig

# How transformers can be told to compute the same thing; the benchmarks take
# whichever is fastest on the machine.
ATTENTION = ("eager", "sdpa")
EXPERTS = ("eager", "grouped_mm", "batched_mm")


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way for transformers to compute the model; see ATTENTION, EXPERTS."""

  attention: str
  experts: str

  def __str__(self):
    return f"attention={self.attention},experts={self.experts}"


VARIANTS = tuple(Variant(a, e) for a in ATTENTION for e in EXPERTS)


def make_model(
  cfg: ModelConfig, variant: Variant
) -> transformers.DeepseekV3ForCausalLM:
  """A model of the same shapes, float32, without MTP modules.

  Raises:
    ValueError: transformers' DeepseekV3 has no such router.
  """
  if (cfg.scoring_func, cfg.topk_method) != ("sigmoid", "noaux_tc"):
    raise ValueError(
      f"DeepseekV3 of transformers routes by sigmoid and noaux_tc, not by"
      f" {cfg.scoring_func} and {cfg.topk_method}. Choose a config of V3."
    )
  if cfg.rope_scaling is not None:
    raise ValueError("The benchmarks compare models without YaRN.")
  names = (
    "vocab_size hidden_size num_hidden_layers first_k_dense_replace"
    " intermediate_size moe_intermediate_size n_routed_experts"
    " num_experts_per_tok n_shared_experts n_group topk_group norm_topk_prob"
    " routed_scaling_factor num_attention_heads q_lora_rank kv_lora_rank"
    " qk_nope_head_dim qk_rope_head_dim v_head_dim max_position_embeddings"
    " rms_norm_eps initializer_range tie_word_embeddings"
  ).split()
  config = transformers.DeepseekV3Config(
    **{name: getattr(cfg, name) for name in names},
    num_key_value_heads=cfg.num_attention_heads,
    num_mtp_layers=0,
    rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
    bos_token_id=None,
    eos_token_id=None,
    attn_implementation=variant.attention,
    experts_implementation=variant.experts,
  )
  torch.manual_seed(0)
  return transformers.DeepseekV3ForCausalLM(config)


def random_models(
  cfg: ModelConfig,
) -> dict[str, Callable[[], transformers.DeepseekV3ForCausalLM]]:
  """Name of every variant -> what makes the model in it."""
  return {str(v): functools.partial(make_model, cfg, v) for v in VARIANTS}


def count_parameters(model: torch.nn.Module) -> int:
  """Trainable numbers, a tied head counted once."""
  return sum(parameter.numel() for parameter in model.parameters())
