"""Grouped-query attention as a module, apart from parity with others."""

import dataclasses

import jax
import numpy as np
import pytest

from rlm.flops import (
  count_parameters,
  decode_flops_per_token,
  forward_flops_per_token,
)
from rlm.models.cache import TokenCache
from rlm.models.config import Llama3Scaling
from rlm.models.rope import apply_half_rope, rope_frequencies, rope_rotations
from rlm.models.transformer import Transformer
from tests.tiny_model import tiny_config, tiny_variables

GQA = dict(
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=6,
  first_k_dense_replace=2,
  q_lora_rank=None,
  kv_lora_rank=0,
  qk_nope_head_dim=0,
  qk_rope_head_dim=0,
  v_head_dim=0,
  moe_intermediate_size=0,
  n_routed_experts=0,
  num_experts_per_tok=0,
  n_shared_experts=0,
  num_nextn_predict_layers=0,
)


def config(**changes):
  return tiny_config(**{**GQA, **changes})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_key_value_heads=3), "=3 does not divide num_attention_heads=4"),
    (dict(head_dim=5), "head_dim=5 must be even"),
    (dict(head_dim=0), "head_dim=0 must be at least 1"),
    (dict(kv_lora_rank=8), "kv_lora_rank=8 are of latent attention"),
  ],
)
def test_impossible_sizes(changes, message):
  with pytest.raises(ValueError, match=message):
    config(**changes)


def test_latent_attention_takes_no_sizes_of_the_other():
  with pytest.raises(ValueError, match="qkv_bias=True cannot go with latent"):
    tiny_config(qkv_bias=True)
  scaling = Llama3Scaling(8.0, 1.0, 4.0, 16)
  with pytest.raises(ValueError, match="type='llama3' cannot go with latent"):
    tiny_config(rope_scaling=scaling)


@pytest.mark.parametrize("kind", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_parameters_are_counted(kind):
  cfg = config(**kind)
  variables = tiny_variables(Transformer(cfg))
  held = sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert count_parameters(cfg).total == held


def test_operations_by_hand():
  cfg = config()
  attention = 2 * 16 * (4 * 6) + 2 * 16 * (2 * 6)
  matrices = 2 * (attention + 3 * 16 * 24) + 16 * 24
  norms = 2 * 2 * 16 + 16  # counted with the rest, as everywhere
  scores = 2 * 4 * (2 * 6) * 10  # layers, heads, H + h, half of T = 20, twice
  expected = 2 * (matrices + norms) + 2 * scores
  assert forward_flops_per_token(cfg, 20, mtp=False) == expected
  expected = 2 * (matrices + norms) + 2 * 4 * (4 * 6) * 20
  assert decode_flops_per_token(cfg, 20) == expected


def test_decode_continues_prefill():
  cfg = config(qkv_bias=True, qk_norm=True)
  model = Transformer(cfg)
  variables = tiny_variables(model)
  tokens = np.random.default_rng(0).integers(0, 21, (2, 7)).astype(np.int32)
  positions = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))
  whole, _ = model.apply(variables, tokens, positions, np.ones_like(tokens))
  held = np.array([[1] * 5, [1] * 3 + [0] * 2], np.int32)
  _, cache, _ = model.apply(
    variables, tokens[:, :5], positions[:, :5], held, method="prefill"
  )
  assert cache.layers[0].shape == (2, 2 * 2 * 6, 5)
  cache = cache.extend(8)
  empty = TokenCache.empty(cfg, 2, 8)
  assert jax.tree.map(np.shape, empty) == jax.tree.map(np.shape, cache)
  step = jax.jit(lambda t, c: model.apply(variables, t, c, method="decode"))
  for i in range(2):
    at = np.array([5 + i, 3 + i])
    hidden, cache, _ = step(tokens[np.arange(2), at][:, None], cache)
    np.testing.assert_allclose(
      hidden[:, 0], whole[np.arange(2), at], rtol=2e-5, atol=2e-5
    )


def test_llama_3_keeps_fast_pairs_and_slows_slow_ones():
  scaling = Llama3Scaling(8.0, 1.0, 4.0, 8192)
  plain = rope_frequencies(128, 500000.0, None)
  scaled = rope_frequencies(128, 500000.0, scaling)
  turns = 8192 * plain / (2 * np.pi)
  np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
  np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
  between = (turns > 1) & (turns < 4)
  assert between.sum() == 6
  keep = (turns - 1) / 3
  expected = plain * (keep + (1 - keep) / 8)
  np.testing.assert_allclose(scaled[between], expected[between], rtol=1e-6)


def test_half_rope_turns_pairs_half_a_head_apart():
  x = np.random.default_rng(0).standard_normal((1, 3, 2, 6)).astype(np.float32)
  positions = np.array([[0, 2, 5]], np.int32)
  rotations = rope_rotations(positions, 6, 10.0, None)
  found = apply_half_rope(x, *rotations)
  angles = positions[0][:, None] * 10.0 ** (-np.arange(3) / 3)
  z = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[None, :, None]
  np.testing.assert_allclose(found[..., :3], z.real, atol=1e-6)
  np.testing.assert_allclose(found[..., 3:], z.imag, atol=1e-6)


def test_context_may_be_chunked():
  cfg = config(attention_chunk=2)
  model, whole = Transformer(cfg), Transformer(config())
  variables = tiny_variables(model)
  tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
  np.testing.assert_allclose(
    model.logits(variables, tokens)[..., :21],
    whole.logits(variables, tokens)[..., :21],
    atol=1e-5,
  )
  assert dataclasses.replace(cfg, attention_chunk=0) == whole.cfg
