"""Slots divided among devices, and one compilation for all."""

import jax
import numpy as np
import pytest

from tests.sampling.tiny_sampler import (
  assert_same,
  make_sampler,
  requests,
  sharp_variables,
  take,
)


def test_a_device_samples_its_share_as_it_would_alone():
  variables = sharp_variables()
  sizes = dict(prompt_length=9, steps_per_call=3)
  alone = make_sampler(slots=5, **sizes)
  three = make_sampler(slots=15, devices=3, **sizes)
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
  [{}, dict(slots=15, devices=3, prompt_length=9, steps_per_call=3)],
)
def test_one_compilation_serves_all_prompts_keys_and_weights(sizes):
  sampler, variables = make_sampler(**sizes), sharp_variables()
  sampler.generate(variables, *requests(16))
  compiled = [program._cache_size() for program in sampler.programs]
  for count in (1, 3, 40):
    variables = jax.tree.map(lambda x: 0.9 * x, variables)
    sampler.generate(variables, *requests(count, seed=count))
  assert compiled == [program._cache_size() for program in sampler.programs]


def test_logits_that_are_not_finite_are_seen_on_every_device():
  sampler = make_sampler(slots=15, devices=3, prompt_length=9, steps_per_call=3)
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
