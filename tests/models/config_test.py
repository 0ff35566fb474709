"""Every refusal of ModelConfig and YarnScaling, by its text."""

import dataclasses
import re

import pytest

from rlm.config import build
from rlm.models.config import ModelConfig, YarnScaling
from tests.models.families import YARN
from tests.tiny_model import tiny_config


@pytest.mark.parametrize(
  "name",
  [
    "vocab_size",
    "n_vocab_used",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
  ],
)
def test_sizes_are_positive(name):
  with pytest.raises(ValueError, match=rf"{name}=0 must be at least 1"):
    tiny_config(**{name: 0})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(rms_norm_eps=0.0), "rms_norm_eps=0.0 must be positive"),
    (dict(initializer_range=-0.1), "initializer_range=-0.1 must be positive"),
    (dict(rope_theta=1.0), "rope_theta=1.0 must exceed 1"),
    (dict(n_vocab_used=25), "n_vocab_used=25 ids do not fit vocab_size=24"),
    (dict(qk_rope_head_dim=3), "qk_rope_head_dim=3 must be even"),
    (
      dict(first_k_dense_replace=3),
      "first_k_dense_replace=3 must lie between 0 and num_hidden_layers=2",
    ),
    (dict(first_k_dense_replace=-1), "first_k_dense_replace=-1 must lie"),
    (dict(attention_chunk=-1), "attention_chunk=-1 must not be negative"),
    (dict(logits_chunk=-8), "logits_chunk=-8 must not be negative"),
    (
      dict(num_nextn_predict_layers=-1),
      "num_nextn_predict_layers=-1 must not be negative",
    ),
    (
      dict(n_routed_experts=0),
      "n_routed_experts=0 and .* first_k_dense_replace = num_hidden_layers",
    ),
    (dict(moe_intermediate_size=0), "moe_intermediate_size=0 must be at least"),
    (dict(n_group=3), "n_group=3 does not divide n_routed_experts=4"),
    (dict(n_group=0), "n_group=0 does not divide"),
    (
      dict(n_group=2, topk_group=3),
      "topk_group=3 must lie between 1 and n_group=2",
    ),
    (dict(topk_group=0), "topk_group=0 must lie between 1 and n_group=1"),
    (
      dict(num_experts_per_tok=5),
      "num_experts_per_tok=5 must lie between 1 and the 4 experts",
    ),
    (dict(num_experts_per_tok=0), "num_experts_per_tok=0 must lie"),
    (
      dict(n_group=2, topk_group=1, num_experts_per_tok=3),
      "num_experts_per_tok=3 .* the 2 experts .* reach .* topk_group=1",
    ),
    (
      dict(n_group=4, topk_group=2),
      "noaux_tc scores a group by its two best experts: n_group=4 leaves 1",
    ),
    (dict(n_shared_experts=-1), "n_shared_experts=-1 must not be negative"),
    (
      dict(topk_method="noaux"),
      "topk_method='noaux' is unknown. Choose one of 'noaux_tc', 'group_lim",
    ),
    (dict(scoring_func="relu"), "scoring_func='relu' is unknown"),
    (dict(dtype="float16"), "dtype='float16' is unknown"),
    (dict(param_dtype="fp8"), "param_dtype='fp8' is unknown"),
    (dict(remat="full"), "remat='full' is unknown"),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny_config(**changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(factor=0.5), "rope_scaling.factor=0.5 must be >= 1"),
    (
      dict(original_max_position_embeddings=0),
      "original_max_position_embeddings=0 must be at least 1",
    ),
    (dict(beta_fast=1.0), "beta_fast=1.0 must exceed beta_slow=1.0"),
    (dict(beta_slow=0.0), "beta_slow=0.0, and both 0"),
    (dict(type="linear"), "type='linear' is unknown. Choose one of 'yarn'"),
  ],
)
def test_rope_scaling_that_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(YARN, **changes)


@pytest.mark.parametrize(
  "changes",
  [
    dict(first_k_dense_replace=0),
    dict(n_shared_experts=0),
    dict(num_nextn_predict_layers=0),
    dict(q_lora_rank=None),
    dict(logits_chunk=7),  # losses take a shorter last chunk
    # Group limits do not bind `greedy`, nor does the rule of two experts.
    dict(topk_method="greedy", n_group=4, num_experts_per_tok=3),
    dict(topk_method="group_limited_greedy", n_group=4, topk_group=2),
  ],
)
def test_what_can_be_is_taken(changes):
  cfg = tiny_config(**changes)
  assert not cfg.is_dense
  assert cfg.num_moe_layers == 2 - cfg.first_k_dense_replace


def test_a_dense_model_needs_no_experts():
  cfg = tiny_config(
    first_k_dense_replace=2,
    n_routed_experts=0,
    num_experts_per_tok=0,
    moe_intermediate_size=0,
    n_shared_experts=0,
  )
  assert cfg.is_dense and cfg.num_moe_layers == 0


def test_built_from_a_plain_section():
  fields = dataclasses.asdict(tiny_config(rope_scaling=YARN))
  cfg = build(ModelConfig, fields, "model")
  assert cfg == tiny_config(rope_scaling=YARN)
  assert isinstance(cfg.rope_scaling, YarnScaling)
  fields["n_group"] = 3
  text = "model: n_group=3 does not divide n_routed_experts=4."
  with pytest.raises(ValueError, match=re.escape(text)):
    build(ModelConfig, fields, "model")
