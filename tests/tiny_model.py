"""A model small enough for any test, with every part of the large one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlm.models.config import ModelConfig
from rlm.models.layout import Layout, make_layout
from rlm.models.transformer import Transformer
from rlm.parallel.config import MeshConfig, replicas


def tiny_config(**changes) -> ModelConfig:
  fields = dict(
    vocab_size=24,
    n_vocab_used=21,
    hidden_size=16,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=24,
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    rope_theta=100.0,
    rope_scaling=None,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    initializer_range=0.2,
    tie_word_embeddings=False,
    num_nextn_predict_layers=1,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    unroll_layers=False,
    attention_chunk=0,
    logits_chunk=0,
  )
  return ModelConfig(**{**fields, **changes})


@functools.cache
def tiny_model(**changes):
  """(model, variables) of `tiny_config`."""
  model = Transformer(tiny_config(**changes))
  return model, tiny_variables(model)


def mesh_of(**changes) -> MeshConfig:
  """One device, but for the sizes and settings given."""
  return dataclasses.replace(replicas(1), **changes)


@functools.cache
def lay(model, **changes) -> Layout:
  """A model on `mesh_of(**changes)`."""
  return make_layout(model, mesh_of(**changes), "mesh")


def tiny_variables(model):
  """Normal weights, norms and expert biases near their start.

  Drawn by numpy: compiling `model.init` takes longer than most tests.
  """
  row = jnp.ones((1, 4), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), row, row, row)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = path[-1].key
    x = 0.2 * rng.standard_normal(leaf.shape)
    x += name == "scale"
    if name == "expert_bias":
      x *= 0.1
    return jnp.asarray(x, leaf.dtype)

  return jax.tree.map_with_path(draw, shapes)
