import dataclasses
import importlib

import jax
import numpy as np
import pytest

from rlm import flops
from rlm.config import build
from rlm.models.cache import TokenCache
from rlm.models.config import ModelConfig
from rlm.models.transformer import Transformer, head_kernel
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


GROUPED = dict(
  num_key_value_heads=1,
  head_dim=6,
  q_lora_rank=None,
  kv_lora_rank=0,
  qk_nope_head_dim=0,
  qk_rope_head_dim=0,
  v_head_dim=0,
  num_nextn_predict_layers=0,
)
DENSE = dict(first_k_dense_replace=2, num_nextn_predict_layers=0)
# Every expert is used, so that forms which compute all of them waste nothing.
ALL_USED = dict(num_experts_per_tok=4, num_hidden_layers=3)
KINDS = {
  "latent": DENSE,
  "plain queries, tied": DENSE
  | dict(q_lora_rank=None, tie_word_embeddings=True),
  "grouped": DENSE | GROUPED | dict(qkv_bias=True, qk_norm=True),
  "experts": ALL_USED | dict(num_nextn_predict_layers=0),
  "experts and mtp": ALL_USED | dict(num_nextn_predict_layers=2),
}
ROW = 8


def product_flops(jaxpr) -> int:
  """Operations of every matrix product of a program, scans in full."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      ((contracted, _), _) = equation.params["dimension_numbers"]
      left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
      sizes = [left[axis] for axis in contracted]
      total += 2 * int(np.prod(out)) * int(np.prod(sizes))
      continue
    assert equation.primitive.name != "ragged_dot"
    times = 1
    if equation.primitive.name == "scan":
      times = equation.params["length"]
    for inner in inner_jaxprs(equation):
      assert equation.primitive.name != "while" or not product_flops(inner)
      total += times * product_flops(inner)
  return total


def inner_jaxprs(equation):
  values = [
    item
    for value in equation.params.values()
    for item in (value if isinstance(value, (tuple, list)) else [value])
  ]
  opened = [getattr(value, "jaxpr", value) for value in values]
  return [value for value in opened if hasattr(value, "eqns")]


def counted_products(cfg, outputs, *args) -> int:
  """Operations of `outputs(model, variables, *args)`, by its own program."""
  model, row = Transformer(cfg), jax.ShapeDtypeStruct((1, ROW), np.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), row, row, row)

  def run(variables, *args):
    return outputs(model, variables, *args)

  return product_flops(jax.make_jaxpr(run)(variables, *args).jaxpr)


def all_logits(model, variables, *rows):
  hidden, _ = model.apply(variables, *rows)
  head = head_kernel(variables, model.cfg)
  logits = [hidden @ head]
  if model.cfg.num_nextn_predict_layers:
    states, _ = model.apply(variables, hidden, *rows, method=model.mtp)
    logits.append(states @ head)
  return logits


def gates(cfg) -> int:
  """Products that spread the gates over the experts, in every mixture."""
  mixtures = cfg.num_moe_layers
  mixtures += 0 if cfg.is_dense else cfg.num_nextn_predict_layers
  return mixtures * 2 * cfg.num_experts_per_tok * cfg.n_routed_experts


def without_vectors(cfg, by_part) -> int:
  """Of a count by part, what is a matrix product."""
  norms = flops.model_parts(cfg)["norms and biases"].activated
  if cfg.num_nextn_predict_layers:
    norms += flops.mtp_parts(cfg)["norms and biases"].activated
  return sum(by_part.values()) - 2 * norms


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_of_the_forward_pass_is_counted(kind):
  cfg = tiny_config(**KINDS[kind])
  rows = [jax.ShapeDtypeStruct((1, ROW), np.int32)] * 3
  counted = counted_products(cfg, all_logits, *rows)
  by_part = flops.forward_flops_by_part(cfg, ROW, mtp=True)
  layers = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
  # The program scores the masked half too; the formula leaves it out.
  masked = by_part["attention scores"] // cfg.num_hidden_layers * layers
  expected = without_vectors(cfg, by_part) + masked + gates(cfg)
  assert counted == ROW * expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_is_twice_the_forward_pass(kind):
  cfg = tiny_config(**KINDS[kind], unroll_layers=True)
  rows = [jax.ShapeDtypeStruct((1, ROW), np.int32)] * 3

  def loss_and_gradients(model, variables, *rows):
    def loss(params):
      logits = all_logits(model, {**variables, "params": params}, *rows)
      return sum(x.sum() for x in logits)

    return jax.value_and_grad(loss)(variables["params"])

  forward = counted_products(cfg, all_logits, *rows)
  both = counted_products(cfg, loss_and_gradients, *rows)
  # The experts' numbers, which the gates are spread by, have no gradient.
  assert both == 3 * forward - ROW * gates(cfg)


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_of_decoding_is_counted(kind):
  cfg = tiny_config(**KINDS[kind])
  capacity = 24
  cache = jax.eval_shape(lambda: TokenCache.empty(cfg, 1, capacity))
  token = jax.ShapeDtypeStruct((1, 1), np.int32)

  def next_logits(model, variables, token, cache):
    hidden, *_ = model.apply(variables, token, cache, method=model.decode)
    return hidden @ head_kernel(variables, cfg)

  counted = counted_products(cfg, next_logits, token, cache)
  norms = flops.model_parts(cfg)["norms and biases"].activated
  spread = cfg.num_moe_layers * 2 * cfg.num_experts_per_tok
  spread *= cfg.n_routed_experts
  # The sum over the cache takes the RoPE keys along, which nothing reads.
  along = cfg.num_hidden_layers * cfg.num_attention_heads * capacity
  along *= 2 * cfg.qk_rope_head_dim
  needed = flops.decode_flops_per_token(cfg, capacity) - 2 * norms
  assert counted == needed + spread + along


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
