"""Samplers of the tiny model, and requests to them."""

import functools

import jax
import numpy as np

from rlm.sampling.config import SamplingConfig
from rlm.sampling.sampler import Sampler
from tests.tiny_model import mesh_of, tiny_model

EOS, PAD = 19, 20
FIELDS = ("tokens", "lengths", "finished", "logprobs", "prompt_lengths")


def sampling_config(**changes):
  fields = dict(temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=10)
  return SamplingConfig(**{**fields, **changes})


@functools.cache
def make_sampler(
  *,
  slots=16,
  prompt_length=32,
  mesh=None,
  steps_per_call=None,
  model=None,
  **changes,
):
  """One per set of arguments: each is four compilations.

  With 16 prompts of 32 the prefill has rows enough for the grouped experts.
  """
  return Sampler(
    model or tiny_model()[0],
    sampling_config(**changes),
    slots=slots,
    prompt_length=prompt_length,
    mesh=mesh or mesh_of(),
    eos_token=EOS,
    pad_token=PAD,
    steps_per_call=steps_per_call,
  )


@functools.cache
def sharp_variables():
  """Weights whose logits have std above 1, so that log-probs are large."""
  variables = dict(tiny_model()[1])
  params = dict(variables["params"])
  params["head"] = 3 * params["head"]
  return {**variables, "params": params}


def requests(count, seed=0, longest=9):
  rng = np.random.default_rng(seed)
  prompts = [
    rng.integers(0, EOS, rng.integers(1, longest + 1)).tolist()
    for _ in range(count)
  ]
  return prompts, jax.random.split(jax.random.key(seed), count)


def take(completions, rows):
  fields = {name: getattr(completions, name)[rows] for name in FIELDS}
  return {**fields, "expert_ids": completions.expert_ids[:, rows]}


def assert_same(a, b):
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)
