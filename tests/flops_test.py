import dataclasses
import importlib

import jax
import numpy as np
import pytest

from rlm import flops
from rlm.config import build
from rlm.models.config import ModelConfig
from rlm.models.transformer import Transformer
from tests.tiny_model import tiny_config


def published(name):
  config = importlib.import_module(f"configs.pretrain.{name}").get_config()
  return build(ModelConfig, config.model, "config.model")


def shapes(cfg):
  row = jax.ShapeDtypeStruct((1, 8), np.int32)
  model = Transformer(cfg)
  return jax.eval_shape(model.init, jax.random.key(0), row, row, row)["params"]


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("name", "total", "mtp", "activated"),
  [
    # Billions; reference: the released files, see the configs.
    ("deepseek_v3", 671.03, 11.61, 37.55),
    ("deepseek_v2_lite", 15.706, 0.0, 2.66),
  ],
)
def test_the_published_models_have_their_published_sizes(
  name, total, mtp, activated
):
  cfg = published(name)
  params = shapes(cfg)
  counts = flops.count_parameters(cfg)
  in_mtp = size(params.pop("mtp_modules", {}))
  assert size(params) == counts.total
  assert in_mtp == counts.mtp
  decimals = len(str(total).split(".")[1])
  assert round(counts.total / 1e9, decimals) == total
  assert round(counts.mtp / 1e9, 2) == mtp
  assert round(counts.activated / 1e9, 2) == activated


@pytest.mark.parametrize(
  "changes",
  [
    {},
    dict(q_lora_rank=None, num_nextn_predict_layers=2),
    dict(first_k_dense_replace=2, tie_word_embeddings=True),
    dict(first_k_dense_replace=0, n_shared_experts=0),
  ],
)
def test_the_formula_counts_what_the_model_makes(changes):
  cfg = tiny_config(**changes)
  params = shapes(cfg)
  counts = flops.count_parameters(cfg)
  in_mtp = params.pop("mtp_modules")
  assert size(in_mtp) == counts.mtp
  assert size(params) == counts.total
  # Of the routed experts, K of E are used; of everything else, all.
  unused = 1 - cfg.num_experts_per_tok / cfg.n_routed_experts

  def activated(block):
    experts = [
      w for w in jax.tree.leaves(block.get("ffn", {})) if len(w.shape) == 4
    ]
    return size(block) - unused * sum(w.size for w in experts)

  assert activated(in_mtp["block"]) == counts.activated_mtp - size(
    {k: v for k, v in in_mtp.items() if k != "block"}
  )
  rest = {k: v for k, v in params.items() if k != "moe_layers"}
  assert counts.activated == size(rest) + activated(
    params.get("moe_layers", {})
  )


def test_v3_needs_250_gflop_a_token():
  cfg = published("deepseek_v3")
  per_token = flops.train_flops_per_token(cfg, 4096, mtp=False)
  assert round(per_token / 1e9, 1) == 250.5
  # 14.8T tokens in 2.664M GPU-hours: 39.1% of the BF16 peak of an H800.
  mfu = per_token * 14.8e12 / (2.664e6 * 3600) / 989e12
  assert round(100 * mfu, 1) == 39.1
  with_mtp = flops.train_flops_per_token(cfg, 4096, mtp=True)
  attention = 3 * 128 * 320 * 4096
  assert round((with_mtp - per_token - attention) / 1e9, 1) == 9.7


def test_matrix_products_and_attention_are_both_counted():
  """Against XLA's count of an unrolled dense model's forward pass."""
  cfg = tiny_config(
    first_k_dense_replace=2,
    num_nextn_predict_layers=0,
    unroll_layers=True,
    hidden_size=64,
    intermediate_size=128,
    vocab_size=256,
    n_vocab_used=256,
  )
  model = Transformer(cfg)
  rows = jax.ShapeDtypeStruct((1, 64), np.int32)

  def logits(variables, *rows):
    hidden, _ = model.apply(variables, *rows)
    return hidden @ variables["params"]["head"]

  variables = {"params": shapes(cfg)}
  compiled = jax.jit(logits).lower(variables, rows, rows, rows).compile()
  counted = compiled.cost_analysis()["flops"] / 64
  formula = flops.forward_flops_per_token(cfg, 64, mtp=False)
  # XLA computes the masked half of attention too, and counts norms.
  masked = 2 * cfg.num_attention_heads * 20 * 64
  assert formula < counted < 1.2 * (formula + masked)


def test_decoding_is_the_absorbed_form():
  cfg = dataclasses.replace(
    published("deepseek_v3"), num_nextn_predict_layers=0
  )
  alone = flops.decode_flops_per_token(cfg, 0)
  assert alone == flops.forward_flops_per_token(cfg, 0, mtp=False)
  pair = (flops.decode_flops_per_token(cfg, 1000) - alone) / 1000 / 61
  assert round(pair / 1e3, 1) == 278.5  # kFLOP a pair and layer in V3


def test_the_peak_is_measured():
  assert flops.measure_peak_flops("float32", size=64, seconds=0.0) > 0


def test_sampling_prefills_a_prompt_once_for_all_its_completions():
  cfg = tiny_config()
  prompts, lengths = np.array([6, 9]), np.array([[4, 2, 0], [5, 5, 5]])
  expected = sum(
    p * flops.forward_flops_per_token(cfg, p, mtp=False)
    + sum(n * flops.decode_flops_per_token(cfg, p + n / 2) for n in row)
    for p, row in zip(prompts.tolist(), lengths.tolist(), strict=True)
  )
  found = flops.sampling_flops(cfg, prompts, lengths)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  alone = flops.sampling_flops(cfg, prompts, 0 * lengths)
  np.testing.assert_allclose(
    alone, flops.sampling_flops(cfg, prompts, lengths[:, :0])
  )
  assert 0 < alone < found
