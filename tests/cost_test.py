import dataclasses
import importlib

import jax
import numpy as np
import pytest

from rlm import cost, flops
from rlm.config import build
from rlm.hardware import CHIPS
from rlm.models.config import ModelConfig
from rlm.models.transformer import Transformer
from rlm.optim.config import MuonConfig, OptimizerConfig
from rlm.optim.optimizer import make_optimizer
from rlm.rl.loss import freeze
from rlm.rl.state import RLState
from rlm.train import init_state
from tests.flops_test import GROUPED
from tests.tiny_model import tiny_config

H800 = CHIPS["h800"]
# V3 table 1: 180K H800 hours per trillion tokens, measured; then what the
# extension of the context and post-training took.
V3_TOKENS = 14.8e12
V3_RATE = 1e12 / (180e3 * 3600)
V3_LATER = {"extension": 119e3, "post-training": 5e3}


def published(name):
  config = importlib.import_module(f"configs.pretrain.{name}").get_config()
  return build(ModelConfig, config.model, "config.model")


def optimizer(**changes):
  fields = dict(
    clip_norm=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    moment_dtype="bfloat16",
    muon=None,
  )
  return OptimizerConfig(**{**fields, **changes})


# --- The model. ---------------------------------------------------------------


def test_v3_by_component():
  model = cost.model_cost(published("deepseek_v3"), 4096, mtp=True)
  parts = {kind: part.total for kind, part in model.parts.items()}
  # Sheet 2.6: of one layer, in millions.
  assert round(parts["dense feed-forward"] / 3 / 1e6, 2) == 396.36
  assert round(parts["routed experts"] / 58 / 256 / 1e6, 2) == 44.04
  assert round(parts["shared experts"] / 58 / 1e6, 2) == 44.04
  assert round(parts["router"] / 58 / 1e6, 3) == 1.835
  norms = 61 * (1536 + 512)  # inside attention, which the sheet counts there
  assert round((parts["attention"] + norms) / 61 / 1e6, 3) == 187.107
  assert round(parts["embedding"] / 1e9, 3) == round(parts["head"] / 1e9, 3)
  assert sum(parts.values()) == model.total
  assert round(model.total / 1e9, 2) == 671.03
  assert round(model.activated / 1e9, 2) == 37.55
  assert round(model.activated_without_embedding / 1e9, 2) == 36.63
  assert round(model.mtp.total / 1e9, 2) == 11.61


def test_v2_lite_by_component():
  model = cost.model_cost(published("deepseek_v2_lite"), 4096, mtp=True)
  assert round(model.total / 1e9, 3) == 15.706
  assert round(model.activated / 1e9, 2) == 2.66
  assert round(model.activated_without_embedding / 1e9, 2) == 2.45
  assert model.mtp == flops.Part(0, 0)
  assert "MTP modules" not in model.forward_flops


def test_v3_needs_250_gflop_a_token_and_the_mtp_head_again():
  cfg = published("deepseek_v3")
  alone = cost.model_cost(cfg, 4096, mtp=False)
  assert round(alone.train_flops / 1e9, 1) == 250.5
  assert alone.backward_flops["head"] == 2 * alone.forward_flops["head"]
  # Sheet 3.4: 30.7 of the 250.5.
  assert round(3 * alone.forward_flops["attention scores"] / 1e9, 1) == 30.7
  whole = cost.model_cost(cfg, 4096, mtp=True)
  mtp = whole.forward_flops["MTP modules"]
  assert whole.train_flops - alone.train_flops == 3 * mtp
  head = 2 * 129280 * 7168
  assert mtp > 2 * whole.mtp.activated + head
  assert whole.train_flops == flops.train_flops_per_token(cfg, 4096, mtp=True)


def test_a_tied_head_works_without_parameters_of_its_own():
  tied, free = (
    cost.model_cost(tiny_config(tie_word_embeddings=t), 8, mtp=True)
    for t in (True, False)
  )
  assert tied.parts["head"].total == 0
  assert tied.forward_flops == free.forward_flops
  assert tied.activated_without_embedding == free.activated_without_embedding


def test_the_row_must_fit_the_context():
  with pytest.raises(ValueError, match="65 is not between 1 and.*=64"):
    cost.model_cost(tiny_config(), 65, mtp=True)


# --- The cache. ---------------------------------------------------------------


def test_the_cache_of_published_models():
  """Sheet 2.2, bytes in bfloat16; V2 table 1."""
  assert cost.cache_bytes_per_token(published("deepseek_v3")) == {
    "MLA": 70_272,
    "MHA": 3_997_696,
    "GQA-8": 249_856,
    "MQA": 31_232,
  }
  lite = cost.cache_bytes_per_token(published("deepseek_v2_lite"))
  assert (lite["MLA"], lite["MHA"]) == (31_104, 221_184)


@pytest.mark.parametrize(
  ("layers", "heads", "groups", "expected"),
  [(80, 64, 8, 327_680), (126, 128, 8, 516_096)],  # Qwen2.5-72B, Llama-405B
)
def test_the_cache_of_grouped_queries(layers, heads, groups, expected):
  cfg = tiny_config(
    **GROUPED | dict(num_key_value_heads=groups, head_dim=128),
    num_attention_heads=heads,
    num_hidden_layers=layers,
    first_k_dense_replace=layers,
    dtype="bfloat16",
  )
  found = cost.cache_bytes_per_token(cfg)
  assert cost.attention_name(cfg) == "GQA-8"
  assert found["GQA-8"] == expected
  assert found["MHA"] == expected * heads // 8
  assert found["MQA"] * 8 == expected
  # V2 table 1: 4.5 heads, as 2.25 groups would have.
  assert found["MLA"] * 8 == expected * 2.25


def test_attention_has_the_name_of_its_heads():
  names = {
    m: cost.attention_name(
      tiny_config(
        **GROUPED | dict(num_key_value_heads=m), num_attention_heads=4
      )
    )
    for m in (1, 2, 4)
  }
  assert names == {1: "MQA", 2: "GQA-2", 4: "MHA"}
  cfg = tiny_config(**GROUPED | dict(num_key_value_heads=2))
  assert cost.cache_bytes_per_token(cfg)["MHA"] == 2 * 2 * (2 * 2 * 6) * 2


# --- Memory. ------------------------------------------------------------------


def tree_bytes(tree):
  """Of every array but counters, which are scalars."""
  leaves = [x for x in jax.tree.leaves(tree) if getattr(x, "ndim", 0)]
  return sum(x.size * x.dtype.itemsize for x in leaves)


def moments_of(opt_state):
  """The trees that optax calls mu and nu, without Muon's coefficients."""
  return [
    leaf
    for path, leaf in jax.tree.leaves_with_path(opt_state)
    if {"mu", "nu"} & {getattr(entry, "name", None) for entry in path}
  ]


def variables_of(cfg):
  row = jax.ShapeDtypeStruct((1, 8), np.int32)
  model = Transformer(cfg)
  return jax.eval_shape(model.init, jax.random.key(0), row, row, row)


MUON = MuonConfig(momentum=0.95, ns_steps=5, update_rms=None, adam_factor=0.3)


@pytest.mark.parametrize("muon", [None, MUON])
@pytest.mark.parametrize(
  "model",
  [
    {},
    dict(param_dtype="bfloat16", num_nextn_predict_layers=2),
    dict(first_k_dense_replace=2, tie_word_embeddings=True),
    GROUPED | dict(first_k_dense_replace=2, qkv_bias=True, qk_norm=True),
  ],
)
def test_memory_is_that_of_the_training_state(muon, model):
  cfg, settings = tiny_config(**model), optimizer(muon=muon)
  tx = make_optimizer(settings)
  state = jax.eval_shape(
    lambda v: init_state(v, tx, ema_decay=0.99), variables_of(cfg)
  )
  found = cost.memory_by_kind(
    cfg, optimizer=settings, ema=True, reference=False, mtp_trained=True
  )
  params = state.variables["params"]
  assert found["parameters"] == tree_bytes(params)
  assert found.get("expert bias", 0) == tree_bytes(
    state.variables.get("router", {})
  )
  moments = found["first moments"] + found["second moments"]
  assert moments == tree_bytes(moments_of(state.opt_state))
  assert found["EMA"] == found["gradients"] == tree_bytes(state.ema)


def test_rl_keeps_a_reference_and_no_moments_of_mtp():
  cfg, settings = tiny_config(), optimizer(moment_dtype="float32")
  tx = freeze(make_optimizer(settings))
  state = jax.eval_shape(
    lambda v: RLState.of(init_state(v, tx, ema_decay=None), v),
    variables_of(cfg),
  )
  found = cost.memory_by_kind(
    cfg, optimizer=settings, ema=False, reference=True, mtp_trained=False
  )
  assert "EMA" not in found
  del found["gradients"]  # of a step, not of the state
  assert sum(found.values()) == tree_bytes(state)


def test_a_model_that_is_only_run_is_its_weights():
  cfg = dataclasses.replace(published("deepseek_v3"), param_dtype="bfloat16")
  found = cost.memory_by_kind(
    cfg, optimizer=None, ema=False, reference=False, mtp_trained=False
  )
  assert set(found) == {"parameters", "expert bias"}
  weights = 2 * (671_026_404_352 + 11_610_000_000)
  assert abs(found["parameters"] / weights - 1) < 1e-4
  assert cost.chips_to_hold(found, H800) == 18  # of 80 GB


# --- Training. ----------------------------------------------------------------


def v3_training(**changes):
  cfg = published("deepseek_v3")
  arguments = dict(
    tokens=V3_TOKENS,
    flops_per_token=flops.train_flops_per_token(cfg, 4096, mtp=False),
    tokens_per_second_per_chip=V3_RATE,
    extra_chip_hours=V3_LATER,
  )
  return cost.training_cost(H800, **{**arguments, **changes})


def test_v3_took_2788_thousand_hours_and_5_576_million_dollars():
  found = v3_training()
  assert round(found.chip_hours["training"]) == 2_664_000
  assert round(found.total_chip_hours) == 2_788_000
  assert round(found.dollars) == 5_576_000
  assert round(100 * found.mfu, 1) == 39.1
  assert round(found.flops / 1e24, 2) == 3.71
  # Sheet 3.4: 54 days of pre-training on 2048 chips.
  assert round(found.chip_hours["training"] / 2048 / 24) == 54


def test_the_rate_and_its_utilisation_are_one_figure_in_two_forms():
  by_rate = v3_training()
  by_mfu = v3_training(tokens_per_second_per_chip=None, mfu=by_rate.mfu)
  assert by_mfu.tokens_per_second_per_chip == pytest.approx(V3_RATE)
  assert by_mfu.dollars == pytest.approx(by_rate.dollars)


def test_energy_and_money_at_given_figures():
  found = v3_training(
    extra_chip_hours=None, dollars_per_chip_hour=3.0, watts_per_chip=500.0
  )
  assert found.dollars == pytest.approx(3 * 2.664e6)
  assert found.energy_kwh == pytest.approx(0.5 * 2.664e6)
  unpublished = dataclasses.replace(H800, dollars_per_hour=None, watts=None)
  nothing = cost.training_cost(
    unpublished, tokens=1e9, flops_per_token=1e9, mfu=0.4
  )
  assert nothing.dollars is None and nothing.energy_kwh is None


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(mfu=0.4), "exactly one of the two"),
    (dict(tokens_per_second_per_chip=None), "exactly one of the two"),
    (dict(tokens_per_second_per_chip=2048 * V3_RATE), "one chip, not of all"),
    (dict(tokens_per_second_per_chip=0.0), r"MFU of 0.*must lie in \(0, 1\]"),
    (dict(tokens=-1.0), "tokens is -1.0"),
    (dict(extra_chip_hours={"x": -1.0}), "'x' is -1.0"),
    (dict(extra_chip_hours={"training": 1.0}), "Call it otherwise"),
  ],
)
def test_impossible_figures_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    v3_training(**changes)


# --- A run's ledger. ----------------------------------------------------------


def test_a_runs_ledger_adds_up():
  run = cost.RunLedger(devices=16, peak_flops=16e14, chip=H800)
  whole = run.record(12e18, 3600.0)
  assert whole["flops"] == 12e18
  assert whole["mfu"] == pytest.approx(12e18 / 3600 / 16e14)
  assert whole["chip_hours"] == whole["device_hours"] == 16
  assert whole["dollars"] == 32
  assert whole["energy_kwh"] == pytest.approx(16 * 0.7)
  steps = [run.record(4e18, 900.0), run.record(8e18, 2700.0)]
  for name in set(whole) - {"mfu"}:
    assert sum(step[name] for step in steps) == pytest.approx(whole[name])


def test_two_devices_may_be_one_chip():
  chip = CHIPS["tpu7x"]
  peak = cost.published_peak(chip, 8, "bfloat16")
  assert peak == 4 * chip.peak_flops
  found = cost.RunLedger(8, peak, chip).record(1.0, 3600.0)
  assert (found["device_hours"], found["chip_hours"]) == (8, 4)
  assert "dollars" not in found  # unpublished


def test_an_unknown_device_has_no_hours_of_a_chip():
  assert cost.published_peak(None, 8, "bfloat16") is None
  assert cost.published_peak(H800, 8, "float32") is None
  found = cost.RunLedger(8, 1e9, None).record(10.0, 0.0)
  assert set(found) == {"flops", "mfu", "device_hours"}
  assert np.isfinite(found["mfu"])


def test_the_peak_is_given_or_measured_here():
  """No data sheet has this CPU."""
  assert cost.open_ledger(2, "float32", 5e9).peak_flops == 5e9
  measured = cost.open_ledger(2, "float32")
  assert measured.devices == 2 and measured.chip is None
  assert 1e8 < measured.peak_flops < 1e15
