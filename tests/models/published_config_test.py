"""config.json of every family: read, refused, written."""

import dataclasses
import json

import pytest

from rlm.flops import count_parameters
from rlm.models.config import Llama3Scaling, ModelConfig, YarnScaling
from rlm.models.published_config import (
  read_published_config,
  write_published_config,
)
from tests.parity.cases import CONFIGS
from tests.tiny_model import tiny_config

V3 = CONFIGS["deepseek_v3"]
QWEN2 = CONFIGS["qwen2"]
LLAMA = CONFIGS["llama"]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_as_what_it_was(name):
  cfg = read_published_config(CONFIGS[name])
  written = json.loads(json.dumps(write_published_config(cfg)))
  assert read_published_config(written) == cfg
  assert written["model_type"] == CONFIGS[name]["model_type"]
  assert written["architectures"] == CONFIGS[name]["architectures"]


def test_fields_of_latent_attention():
  cfg = ModelConfig.from_hf(V3)
  assert cfg == read_published_config(V3)
  assert cfg.has_latent_attention
  assert (cfg.scoring_func, cfg.topk_method) == ("sigmoid", "noaux_tc")
  assert cfg.n_vocab_used == cfg.vocab_size == 40
  assert cfg.cache_width == 16 + 8
  assert (cfg.dtype, cfg.param_dtype) == ("float32", "float32")
  assert cfg.rope_scaling == YarnScaling(4.0, 16, 2.0, 1.0, 1.0, 0.6)


def test_fields_of_grouped_query_attention():
  cfg = read_published_config(QWEN2)
  assert not cfg.has_latent_attention
  assert cfg.is_dense
  assert (cfg.num_key_value_heads, cfg.head_dim, cfg.qkv_bias) == (2, 8, True)
  assert cfg.cache_width == 2 * 2 * 8
  assert read_published_config(LLAMA).rope_scaling == Llama3Scaling(
    8.0, 1.0, 4.0, 16
  )
  qwen3 = read_published_config(CONFIGS["qwen3"])
  assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (12, True, False)


def test_both_layouts_of_rope_are_one():
  scaling = V3["rope_scaling"]
  new = {k: v for k, v in V3.items() if k not in ("rope_theta", "rope_scaling")}
  new["rope_parameters"] = {
    **{k: v for k, v in scaling.items() if k != "type"},
    "rope_type": "yarn",
    "rope_theta": V3["rope_theta"],
  }
  assert read_published_config(new) == read_published_config(V3)
  assert read_published_config(new | V3) == read_published_config(V3)
  with pytest.raises(ValueError, match="rope_parameters=.*contradicts"):
    read_published_config(new | {"rope_theta": 11.0})


def test_dtype_is_the_files_unless_given():
  half = V3 | {"torch_dtype": "bfloat16"}
  assert read_published_config(half).param_dtype == "bfloat16"
  new = {k: v for k, v in half.items() if k != "torch_dtype"}
  assert read_published_config(new | {"dtype": "bfloat16"}).dtype == "bfloat16"
  cfg = read_published_config(half, dtype="float32", param_dtype="float32")
  assert (cfg.dtype, cfg.param_dtype) == ("float32", "float32")
  with pytest.raises(ValueError, match="float16"):
    read_published_config(V3 | {"torch_dtype": "float16"})


def test_ids_that_end_a_text():
  assert read_published_config(V3).eos_token_id == ()
  assert read_published_config(V3 | {"eos_token_id": 1}).eos_token_id == (1,)
  both = read_published_config(V3 | {"eos_token_id": [1, 2]})
  assert both.eos_token_id == (1, 2)


YARN = V3["rope_scaling"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(model_type="deepseek_v4"), "'deepseek_v4' is not supp.*'deepseek_v"),
    (dict(n_grups=4), "unknown field 'n_grups'; did you mean 'n_group'"),
    (dict(hidden_act="gelu"), "hidden_act='gelu' is not.*: 'silu'"),
    (dict(attention_bias=True), "attention_bias=True is not.*: False"),
    (dict(moe_layer_freq=2), "moe_layer_freq=2 is not.*: 1"),
    (dict(scoring_func="softmax"), "scoring_func='softmax' contradicts"),
    (dict(topk_method="greedy"), "topk_method='greedy' contradicts"),
    (dict(num_key_value_heads=2), "num_key_value_heads=2 contradicts.* 4"),
    (dict(head_dim=10), "head_dim=10 contradicts the other fields.* 8"),
    (dict(rms_norm_eps=1e-5), "rms_norm_eps=1e-05 is not.*1e-06"),
    (dict(n_group=3), "n_group=3 does not divide n_routed_experts=8"),
    (dict(rope_theta=None), "rope_theta is missing"),
    (dict(rope_interleave=False), "rope_interleave=False is not supported"),
    (dict(rope_scaling=dict(YARN, type="linear")), "type 'linear' is not sup"),
    (dict(rope_scaling=dict(YARN, rope_type="llama3")), "type='yarn' and rope"),
    (dict(rope_scaling=dict(YARN, mscale=0)), "one of mscale and mscale_all_"),
    (dict(rope_scaling=dict(YARN, betafast=1)), "unknown key 'betafast'; did"),
    (dict(rope_scaling=dict(YARN, truncate=False)), "truncate is not suppo"),
    (
      dict(quantization_config=dict(quant_method="awq")),
      "quantization_config.quant_method='awq' is not supp.*: 'fp8'",
    ),
    (
      dict(quantization_config=dict(weight_block_size=[32, 32])),
      r"weight_block_size=\[32, 32\] is not supported",
    ),
    (
      dict(quantization_config=[1]),
      r"quantization_config=\[1\] must be an obj",
    ),
    (dict(rope_scaling="yarn"), "rope_scaling='yarn' must be an object"),
    (dict(model_type=["deepseek_v3"]), "model_type=.* is not supported"),
    (dict(is_encoder_decoder=True), "is_encoder_decoder=True is not"),
    (dict(hidden_size="32"), "hidden_size: expected int"),
  ],
)
def test_what_we_do_not_compute_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    read_published_config(V3 | changes)


def test_refusals_of_other_families():
  with pytest.raises(ValueError, match="hidden_size: expected int"):
    read_published_config(QWEN2 | {"hidden_size": "32"})
  with pytest.raises(ValueError, match="use_sliding_window=True is not"):
    read_published_config(QWEN2 | {"use_sliding_window": True})
  layers = ["full_attention", "sliding_attention"]
  with pytest.raises(ValueError, match="layer_types=.*contradicts"):
    read_published_config(QWEN2 | {"layer_types": layers})
  v2 = CONFIGS["deepseek_v2"]
  with pytest.raises(ValueError, match="norm_topk_prob=True is not supported"):
    read_published_config(v2 | {"norm_topk_prob": True})
  with pytest.raises(ValueError, match="topk_method='noaux_tc' is not"):
    read_published_config(v2 | {"topk_method": "noaux_tc"})


def test_a_missing_field_is_named():
  fields = {k: v for k, v in V3.items() if k != "kv_lora_rank"}
  with pytest.raises(ValueError, match="missing 'kv_lora_rank'"):
    read_published_config(fields)


def test_files_that_are_none(tmp_path):
  with pytest.raises(ValueError, match="there is no file .*config.json"):
    read_published_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not JSON"):
    read_published_config(tmp_path)
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(ValueError, match="holds no JSON object"):
    read_published_config(tmp_path)


def test_attn_factor_is_ignored_aloud():
  scaling = dict(rope_type="yarn", factor=4.0, attn_factor=0.878)
  scaling["original_max_position_embeddings"] = 16
  with pytest.warns(UserWarning, match="attn_factor=0.878 is ignored"):
    cfg = read_published_config(QWEN2 | {"rope_scaling": scaling})
  assert cfg.rope_scaling.mscale == 1.0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(n_shared_experts=0), "without a shared one"),
    (dict(topk_method="greedy"), "'sigmoid' with topk_method='greedy'"),
    (dict(first_k_dense_replace=2), "MTP modules without routed experts"),
    (dict(rms_norm_eps=1e-5), "rms_norm_eps=1e-05 is not supported"),
  ],
)
def test_models_of_no_family_are_not_written(changes, message):
  with pytest.raises(ValueError, match=message):
    write_published_config(tiny_config(**changes))


def test_our_own_models_are_written_as_v3():
  cfg = tiny_config(eos_token_id=(3,))
  fields = write_published_config(cfg)
  assert fields["model_type"] == "deepseek_v3"
  computed = dict(remat="none", unroll_layers=False)
  assert read_published_config(fields) == dataclasses.replace(cfg, **computed)


def test_sizes_of_the_published_models():
  """From the fields of the published files (sheet 1) to the counts (2.6)."""
  v3 = dict(
    architectures=["DeepseekV3ForCausalLM"],
    model_type="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    moe_layer_freq=1,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_shared_experts=1,
    n_group=8,
    topk_group=4,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    aux_loss_alpha=0.001,
    seq_aux=True,
    num_attention_heads=128,
    num_key_value_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_theta=10000,
    rope_scaling=dict(
      type="yarn",
      factor=40,
      beta_fast=32,
      beta_slow=1,
      original_max_position_embeddings=4096,
      mscale=1.0,
      mscale_all_dim=1.0,
    ),
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    attention_bias=False,
    attention_dropout=0.0,
    initializer_range=0.02,
    tie_word_embeddings=False,
    num_nextn_predict_layers=1,
    bos_token_id=0,
    eos_token_id=1,
    ep_size=1,
    pretraining_tp=1,
    use_cache=True,
    torch_dtype="bfloat16",
    quantization_config=dict(quant_method="fp8", fmt="e4m3"),
  )
  counts = count_parameters(read_published_config(v3))
  assert round(counts.total / 1e9, 2) == 671.03
  assert round(counts.activated / 1e9, 2) == 37.55
  assert round(counts.mtp / 1e9, 2) == 11.61
  lite = v3 | dict(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=2048,
    num_hidden_layers=27,
    first_k_dense_replace=1,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    num_attention_heads=16,
    num_key_value_heads=16,
    q_lora_rank=None,
  )
  del lite["num_nextn_predict_layers"]
  counts = count_parameters(read_published_config(lite))
  assert round(counts.total / 1e9, 3) == 15.706
