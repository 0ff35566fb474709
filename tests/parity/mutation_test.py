"""Errors that a port makes, one by one: each moves the logits far.

A parity test is worth what it rejects. Every mutation here, of the config or of
our own functions, moves a logit by at least 100 times the tolerance.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.kernels.product import einsum
from rlm.models import block, gqa, mla, moe, rope, transformer
from rlm.models.layers import linear
from tests.parity import cases, compare
from tests.parity.compare import part, rest_in_full
from tests.parity.ours import forward, quick_jit

# Of rlm, before anything is patched.
select_experts, route = moe.select_experts, moe.route


def farthest(cfg, variables, name):
  """Largest difference of a logit from that of transformers."""
  batch = cases.make_batch(cases.BATCHES["padded"])
  run = quick_jit(functools.partial(forward, transformer.Transformer(cfg)))
  logits = np.asarray(run(variables, batch))
  mask = batch["segment_ids"] != 0
  return np.abs(logits - part(name, "padded")["logits"])[mask].max()


# Mutations of the config: case -> fields of ModelConfig.
def yarn(cfg, **changes):
  return dict(rope_scaling=dataclasses.replace(cfg.rope_scaling, **changes))


CONFIG = {
  "mscale on neither cos, sin nor scale": (
    "deepseek_v3",
    lambda c: yarn(c, mscale=0.0, mscale_all_dim=0.0),
  ),
  "routed_scaling_factor": (
    "deepseek_v3",
    lambda c: dict(routed_scaling_factor=1.0),
  ),
  "no groups": ("deepseek_v3", lambda c: dict(n_group=1, topk_group=1)),
  "gates not normalised": ("deepseek_v3", lambda c: dict(norm_topk_prob=False)),
  "YaRN with another ramp": ("deepseek_v3", lambda c: yarn(c, beta_slow=0.25)),
  "no YaRN": ("qwen3", lambda c: dict(rope_scaling=None)),
  "no llama3 scaling": ("llama", lambda c: dict(rope_scaling=None)),
  "rms_norm_eps": ("llama", lambda c: dict(rms_norm_eps=1e-2)),
  "V2: routed_scaling_factor": (
    "deepseek_v2",
    lambda c: dict(routed_scaling_factor=1.0),
  ),
  "V2: no groups": ("deepseek_v2", lambda c: dict(topk_method="greedy")),
}


# Mutations of functions: case -> (module, name, what takes its place).
def halved_rope(x, cos, sin):
  heads = x if x.ndim == 4 else x[:, :, None]
  return rope.apply_half_rope(heads, cos, sin).reshape(x.shape)


def group_by_its_best(scores, bias, cfg):
  cfg = dataclasses.replace(cfg, topk_method="group_limited_greedy")
  return select_experts(scores + bias[None, None], 0 * bias, cfg)


def masked_with_zero(scores, bias, cfg):
  choice = scores + bias[None, None]
  groups = choice.reshape(*choice.shape[:-1], cfg.n_group, -1)
  best = jax.lax.top_k(groups, 2)[0].sum(axis=-1)
  kept = jax.lax.top_k(best, cfg.topk_group)[1]
  keep = jax.nn.one_hot(kept, cfg.n_group, dtype=bool).any(axis=-2)
  choice = jnp.where(keep[..., None], groups, 0.0).reshape(choice.shape)
  return jax.lax.top_k(choice, cfg.num_experts_per_tok)[1].astype(jnp.int32)


def bias_in_the_gates(logits, bias, cfg, expert_ids=None):
  expert_ids, _, scores = route(logits, bias, cfg, expert_ids)
  gates = jnp.take_along_axis(scores + bias[None, None], expert_ids, axis=-1)
  gates /= gates.sum(axis=-1, keepdims=True)
  return expert_ids, gates * cfg.routed_scaling_factor, scores


class PostNormBlock(block.Block):
  """x += RMSNorm(Attn(x))."""

  def __call__(self, x, rotations, positions, segment_ids, expert_ids):
    out, layer = self.attn(x, rotations, positions, segment_ids)
    x = x + self.attn_norm(out)
    x, routing = self._feed_forward(x, segment_ids, expert_ids)
    return x, (layer, routing)


class JointNormMLA(mla.MLA):
  """The norm is taken before the split, over latent and RoPE key alike."""

  def _latents(self, x, rotations):
    kv_latent, k_rope = jnp.split(
      linear(x, self.kv_a), [self.cfg.kv_lora_rank], axis=-1
    )
    both = jnp.concatenate([kv_latent, k_rope], axis=-1)
    rms = jnp.sqrt(jnp.mean(jnp.square(both), axis=-1, keepdims=True))
    scale = self.kv_norm.variables["params"]["scale"][None, None]
    return kv_latent / rms * scale, rope.apply_rope(k_rope / rms, *rotations)


class LateNormGQA(gqa.GQA):
  """q and k are turned first and normalised then."""

  def _heads(self, x, rotations):
    heads = (
      einsum("BTD,DF->BTF", x, w).reshape(*x.shape[:2], -1, self.cfg.head_dim)
      for w in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k, v = heads
    q, k = (rope.apply_half_rope(y, *rotations) for y in (q, k))
    return self.q_norm(q), self.k_norm(k), v


def scale_of_latent_attention(attention):
  """Of DeepSeek's classes; transformers' others do without m^2."""
  cfg = attention.cfg
  return rope.softmax_scale(cfg.head_dim, cfg.rope_scaling)


FUNCTIONS = {
  "mscale not on the scale": (
    "deepseek_v3",
    (mla, "softmax_scale", lambda dim, _: dim**-0.5),
  ),
  "mscale not on cos and sin": (
    "deepseek_v3",
    (rope, "rope_magnitude", lambda _: 1.0),
  ),
  "YaRN's frequencies": ("deepseek_v3", (rope, "_yarn", lambda f, *_: f)),
  "RoPE in halves": ("deepseek_v3", (mla, "apply_rope", halved_rope)),
  "RoPE interleaved": ("qwen3", (gqa, "apply_half_rope", rope.apply_rope)),
  "group rule": ("deepseek_v3", (moe, "select_experts", group_by_its_best)),
  "mask": ("deepseek_v3", (moe, "select_experts", masked_with_zero)),
  "bias in the gates": ("deepseek_v3", (moe, "route", bias_in_the_gates)),
  "norm after attention": (
    "deepseek_v3",
    (transformer, "Block", PostNormBlock),
  ),
  "norm of latent and key": ("deepseek_v3", (block, "MLA", JointNormMLA)),
  "norms of q and k after RoPE": ("qwen3", (block, "GQA", LateNormGQA)),
  "mscale on the scale of grouped queries": (
    "llama_yarn",
    (gqa.GQA, "_scale", property(scale_of_latent_attention)),
  ),
  "mscale not on grouped queries' cos and sin": (
    "llama_yarn",
    (rope, "rope_magnitude", lambda _: 1.0),
  ),
}
DEFAULT = (
  "routed_scaling_factor",
  "no YaRN",
  "no llama3 scaling",
  "mscale not on the scale",
  "mscale not on cos and sin",
  "YaRN's frequencies",
  "RoPE in halves",
  "group rule",
  "norm after attention",
  "norms of q and k after RoPE",
  "mscale on the scale of grouped queries",
)


@pytest.mark.parametrize("mutation", rest_in_full(CONFIG, DEFAULT))
def test_a_wrong_config_moves_the_logits(load, mutation):
  name, change = CONFIG[mutation]
  ours = load(name)
  cfg = ours.model.cfg
  wrong = dataclasses.replace(cfg, **change(cfg))
  moved = farthest(wrong, ours.variables, name)
  assert moved >= 100 * compare.LOGITS, moved


@pytest.mark.parametrize("mutation", rest_in_full(FUNCTIONS, DEFAULT))
def test_a_wrong_function_moves_the_logits(load, monkeypatch, mutation):
  name, (module, attribute, wrong) = FUNCTIONS[mutation]
  ours = load(name)
  monkeypatch.setattr(module, attribute, wrong)
  moved = farthest(ours.model.cfg, ours.variables, name)
  assert moved >= 100 * compare.LOGITS, moved


def without(variables, ending):
  """Variables whose leaves of that name are 0."""

  def erase(path, leaf):
    return 0 * leaf if path[-1].key.endswith(ending) else leaf

  return jax.tree.map_with_path(erase, variables)


@pytest.mark.parametrize(
  ("name", "ending"),
  [
    ("deepseek_v3", "expert_bias"),
    pytest.param("qwen2", "q_bias", marks=pytest.mark.full),
    pytest.param("qwen2", "v_bias", marks=pytest.mark.full),
  ],
)
def test_a_bias_left_out_moves_the_logits(load, name, ending):
  ours = load(name)
  wrong = without(ours.variables, ending)
  moved = farthest(ours.model.cfg, wrong, name)
  assert moved >= 100 * compare.LOGITS, moved


@pytest.mark.full
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3", "llama_yarn"])
def test_nothing_moves_without_a_mutation(load, name):
  ours = load(name)
  moved = farthest(ours.model.cfg, ours.variables, name)
  assert moved <= compare.LOGITS
