"""Slots divided among devices, and one compilation for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.checkpoint.int8 import quantize
from rlm.kernels.backend import compiling_for
from rlm.models.quantized import QUANTIZED, Int8Matrix
from tests.parallel.mesh_models import mesh_model, mesh_variables
from tests.sampling.tiny_sampler import (
  assert_same,
  make_sampler,
  requests,
  sharp_variables,
  take,
)
from tests.tiny_model import mesh_of, tiny_model

SMALL = dict(prompt_length=9, steps_per_call=3)


@pytest.fixture
def quick_compilation():
  """For what need not be equal to the bit."""
  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def test_a_device_samples_its_share_as_it_would_alone():
  variables = sharp_variables()
  alone = make_sampler(slots=5, **SMALL)
  three = make_sampler(slots=15, mesh=mesh_of(data=3), **SMALL)
  prompts, keys = requests(23)
  prompts[3] = prompts[1]
  expected = alone.generate(variables, prompts, keys)
  got = three.generate(variables, prompts, keys)
  assert_same(take(got, np.arange(23)), take(expected, np.arange(23)))
  slots = three.programs.start(15)
  assert {len(shard.data) for shard in slots.index.addressable_shards} == {5}
  assert len(slots.cache.layers[0].sharding.device_set) == 3


@pytest.mark.parametrize(
  "sizes",
  [{}, dict(slots=15, mesh=mesh_of(data=3), **SMALL)],
)
def test_one_compilation_serves_all_prompts_keys_and_weights(sizes):
  sampler, variables = make_sampler(**sizes), sharp_variables()
  sampler.generate(variables, *requests(16))
  compiled = [program._cache_size() for program in sampler.programs]
  for count in (1, 3, 40):
    variables = jax.tree.map(lambda x: 0.9 * x, variables)
    sampler.generate(variables, *requests(count, seed=count))
  assert compiled == [program._cache_size() for program in sampler.programs]


def test_for_a_tpu_a_sampler_of_any_length_decodes_by_the_kernel():
  model, variables = tiny_model(dtype="bfloat16", kv_lora_rank=128)
  with compiling_for("tpu", "TPU v5"):
    sampler = make_sampler(model=model, **SMALL)
    slots = jax.eval_shape(lambda: sampler.programs.start(16))
    traced = sampler.programs.decode.trace(
      variables, slots, jnp.int32(3), jnp.int32(1)
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count('kernel_name = "mla_decode"') == 2  # one in each layer


def test_logits_that_are_not_finite_are_seen_on_every_device():
  sampler = make_sampler(
    slots=15, mesh=mesh_of(data=3), prompt_length=9, steps_per_call=3
  )
  params = dict(sharp_variables()["params"])
  params["embed"] = jax.tree.map(
    lambda table: table.at[7].set(np.nan), params["embed"]
  )
  variables = {**sharp_variables(), "params": params}
  _, keys = requests(3)
  for broken in range(3):  # one request on each device
    prompts = [[7] if i == broken else [1] for i in range(3)]
    with pytest.raises(ValueError, match="logits are not finite"):
      sampler.generate(variables, prompts, keys)


@functools.cache
def drawn(name, int8=False, **mesh):
  """20 requests to 8 slots, so that some wait."""
  variables = dict(mesh_variables(name))
  if int8:
    variables["params"] = in_int8(variables["params"])
  sampler = make_sampler(
    slots=8,
    model=mesh_model(name, logits_chunk=0),
    mesh=mesh_of(**mesh),
    max_new_tokens=6,
    **SMALL,
  )
  return sampler, sampler.generate(variables, *requests(20))


def in_int8(params):
  def convert(path, leaf):
    if path[-1].key not in QUANTIZED:
      return leaf
    values, scale = quantize(np.asarray(leaf), axis=leaf.ndim - 2)
    return Int8Matrix(jnp.asarray(values), jnp.asarray(scale))

  return jax.tree.map_with_path(convert, params)


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    ("v3_moe", dict(data=2, expert=2, tensor=2)),
    pytest.param("v3_moe", dict(fsdp=4), marks=pytest.mark.full),
    pytest.param("v3_moe", dict(expert=8), marks=pytest.mark.full),
    pytest.param(
      "v3_moe",
      dict(expert=4, dense_over_expert=False),
      marks=pytest.mark.full,
    ),
    pytest.param("v3", dict(fsdp=2, expert=4), marks=pytest.mark.full),
    pytest.param("v2", dict(fsdp=2, expert=4), marks=pytest.mark.full),
    pytest.param("qwen2", dict(data=2, tensor=2), marks=pytest.mark.full),
    pytest.param("qwen3", dict(fsdp=2, tensor=2), marks=pytest.mark.full),
    pytest.param(
      "qwen2", dict(data=2, tensor=2, int8=True), marks=pytest.mark.full
    ),
    pytest.param("v3_moe", dict(data=2, int8=True), marks=pytest.mark.full),
    pytest.param("v3_moe", dict(tensor=2, int8=True), marks=pytest.mark.full),
  ],
  ids=str,
)
@pytest.mark.usefixtures("quick_compilation")
def test_what_is_drawn_does_not_depend_on_the_mesh(name, mesh):
  """Equal tokens, and log-probs of about 3 to the rounding of their sums."""
  sampler, got = drawn(name, **mesh)
  _, expected = drawn(name, int8=mesh.get("int8", False))
  for field in ("tokens", "lengths", "finished", "expert_ids"):
    np.testing.assert_array_equal(
      getattr(got, field), getattr(expected, field), err_msg=field
    )
  np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)
  assert np.abs(expected.logprobs).max() > 1
  # Slots are divided among rows' devices; heads of a cache among `tensor`.
  slots = sampler.programs.start(8)
  rows = 8 // sampler.layout.cfg.row_shards
  assert {len(s.data) for s in slots.index.addressable_shards} == {rows}
  cache = slots.cache.layers[0]
  heads = 1 if sampler.model.cfg.has_latent_attention else mesh["tensor"]
  assert cache.addressable_shards[0].data.shape == (
    rows,
    cache.shape[1] // heads,
    cache.shape[2],
  )
