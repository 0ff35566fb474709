"""A model on a mesh: where it lies, and what is said where it does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlm.checkpoint import initial
from rlm.models.layout import check_model_fits
from rlm.parallel.shard import WHOLE
from tests.parallel.mesh_models import mesh_model, mesh_variables
from tests.tiny_model import lay, mesh_of


@pytest.mark.parametrize(
  ("name", "sizes", "message"),
  [
    (
      "qwen2",
      dict(expert=2, fsdp=4),
      r"mesh\.expert=2, but the model has no experts\. Set it to 1 and"
      r" mesh\.fsdp to 8\.",
    ),
    (
      "v3",
      dict(tensor=3),
      r"mesh\.tensor=3 does not divide num_attention_heads=4\. Make it one of"
      r" 1, 2, 4\.",
    ),
    (
      "qwen3",
      dict(tensor=4),
      r"mesh\.tensor=4 does not divide num_key_value_heads=2\. Make it one of"
      r" 1, 2\.",
    ),
    (
      "v3",
      dict(expert=3),
      r"expert=3.* does not divide the .* one of 1, 2, 4\.",
    ),
    ("v3", dict(fsdp=5), r"fsdp=5.* does not divide the 32 of .* 1, 2, 4, 8\."),
  ],
)
def test_a_model_that_does_not_fit_is_told_what_would(name, sizes, message):
  with pytest.raises(ValueError, match=message):
    check_model_fits(mesh_model(name).cfg, mesh_of(**sizes), "mesh")
  with pytest.raises(ValueError, match=message):
    lay(mesh_model(name), **sizes)


def test_the_whole_model_knows_of_no_mesh():
  layout = lay(mesh_model("v3"), fsdp=2, tensor=2)
  assert layout.whole == mesh_model("v3")
  assert layout.whole.shard is WHOLE
  assert layout.shard.sizes == (("fsdp", 2), ("tensor", 2))
  assert layout.shard.exchange.levels == ()


def test_the_way_to_the_experts_follows_the_gate():
  """Groups limit the way where they limit the choice."""
  mesh = dict(expert=8, transport="padded")
  assert len(lay(mesh_model("v3"), **mesh).shard.exchange.levels) == 2
  (level,) = lay(mesh_model("v2"), **mesh).shard.exchange.levels
  assert (level.peers, level.most) == (8, 3)
  greedy = mesh_model("v3", topk_method="greedy")  # its groups limit nothing
  assert len(lay(greedy, **mesh).shard.exchange.levels) == 1


def test_what_is_whole_over_the_experts_is_not_gathered():
  whole = lay(mesh_model("v3"), expert=4, dense_over_expert=False)
  divided = lay(mesh_model("v3"), expert=4)
  assert not whole.shard.gathers and divided.shard.gathers
  for layout, rows in ((whole, 32), (divided, 8)):
    places = layout.shardings(mesh_variables("v3"))["params"]["moe_layers"]
    kv_a = places["attn"]["kv_a"]
    assert kv_a.shard_shape((2, 32, 20)) == (2, rows, 20)
    gate = places["ffn"]["gate_proj"]
    assert gate.shard_shape((2, 8, 32, 16)) == (2, 2, 32, 16)


def test_a_state_is_made_where_it_lies():
  layout = lay(mesh_model("v3"), fsdp=2, expert=2, tensor=2)
  variables = mesh_variables("v3")
  made = layout.jit(lambda v: {**v, "step": jnp.int32(3)})(variables)
  template = layout.abstract(lambda v: {**v, "step": jnp.int32(3)}, variables)
  for leaf, wanted in zip(*map(jax.tree.leaves, (made, template)), strict=True):
    assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
  gate = made["params"]["moe_layers"]["ffn"]["gate_proj"]
  # [L, E, D, F] = [2, 8, 32, 16]; each device has an eighth.
  assert gate.addressable_shards[0].data.shape == (2, 4, 16, 8)
  assert made["step"].sharding.is_fully_replicated
  jax.tree.map(
    np.testing.assert_array_equal, made, {**variables, "step": np.int32(3)}
  )


def test_random_weights_are_the_same_wherever_they_lie():
  model, key = mesh_model("v2"), jax.random.key(1)
  alone = initial.initial_variables(lay(model), None, key)
  divided = initial.initial_variables(
    lay(model, fsdp=2, expert=2, tensor=2), None, key
  )
  jax.tree.map(np.testing.assert_array_equal, alone, divided)
  assert initial.digest(alone) == initial.digest(divided)


def test_map_gives_each_device_its_part():
  layout = lay(mesh_model("v3"), fsdp=2, context=2)
  spec = P(("data", "fsdp", "expert"), "context")
  x = jnp.arange(16.0).reshape(4, 4)
  f = layout.map(lambda x: x * x.shape[0], spec, spec)
  np.testing.assert_array_equal(f(x), 2 * x)
