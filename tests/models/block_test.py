"""One layer, dense and routed, against the reference."""

import jax
import numpy as np
import pytest

from rlm.models.block import Block
from rlm.models.rope import rope_rotations
from tests.fast_jit import fast_jit
from tests.models import reference
from tests.models.families import float64, model_of, variables_of


@pytest.mark.parametrize("routed", [False, True])
def test_two_residuals_each_behind_its_norm(routed):
  cfg = model_of("v3").cfg
  kind = "moe_layers" if routed else "dense_layers"
  variables = variables_of("v3")
  params = jax.tree.map(lambda w: w[0], variables["params"][kind])
  given, bias = {"params": params}, None
  if routed:
    bias = variables["router"]["moe_layers"]["ffn"]["expert_bias"][0]
    given["router"] = {"ffn": {"expert_bias": bias}}
  rng = np.random.default_rng(0)
  x = 3 * rng.standard_normal((1, 4, cfg.hidden_size))  # norms must matter
  positions = np.arange(4, dtype=np.int32)[None]
  rotations = rope_rotations(
    positions, cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling
  )
  out, (entries, routing) = fast_jit(Block(cfg, routed=routed).apply)(
    given,
    x.astype(np.float32),
    rotations,
    positions,
    np.ones_like(positions),
    None,
  )
  want, routes = reference.block(float64(params), bias, x[0], cfg)
  np.testing.assert_allclose(out[0], want, rtol=1e-5, atol=1e-5)
  width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
  assert entries.shape == (1, width, 4)
  assert (routing is None) == (routes is None)
  if routed:
    np.testing.assert_array_equal(routing.expert_ids[0], routes[0])
