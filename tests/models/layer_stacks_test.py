import math
import re

import jax
import numpy as np
import pytest

from rlm.models import layer_stacks
from rlm.models.layer_stacks import join_layers, split_layers
from rlm.models.quantized import Int8Matrix
from tests.sampling.tiny_sampler import make_sampler, sharp_variables
from tests.tiny_model import tiny_model


def test_join_undoes_split():
  variables = sharp_variables()
  split = split_layers(variables)
  assert jax.tree.structure(split) != jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, join_layers(split), variables)


def test_large_and_int8_models_keep_their_memory(monkeypatch):
  variables = sharp_variables()
  stacked = variables["params"]["moe_layers"]["attn"]["out_proj"]
  int8 = Int8Matrix(np.zeros(stacked.shape, np.int8), np.ones(1, np.float32))
  quantized = {"params": {"moe_layers": {"out_proj": int8}}}
  assert split_layers(quantized) is quantized
  size = sum(
    leaf.nbytes
    for collection in variables.values()
    for name, layers in collection.items()
    if name in ("dense_layers", "moe_layers")
    for leaf in jax.tree.leaves(layers)
  )
  monkeypatch.setattr(layer_stacks, "MAX_BYTES", size - 1)
  assert split_layers(variables) is variables
  monkeypatch.setattr(layer_stacks, "MAX_BYTES", size)
  assert split_layers(variables) is not variables


@pytest.mark.parametrize(
  "split", [True, pytest.param(False, marks=pytest.mark.full)]
)
def test_a_decode_step_copies_no_experts(split, monkeypatch):
  if not split:
    monkeypatch.setattr(layer_stacks, "MAX_BYTES", 0)
  model, variables = tiny_model(num_hidden_layers=3, moe_intermediate_size=20)
  # A shape that no other test compiles.
  sampler = make_sampler(slots=7 if split else 9, prompt_length=5, model=model)
  slots = sampler.programs.start(sampler.slots)
  text = (
    sampler.programs.decode.lower(variables, slots, 3, 1).compile().as_text()
  )
  experts = variables["params"]["moe_layers"]["ffn"]["gate_proj"]
  size = math.prod(experts.shape[1:])
  bodies = re.findall(r"body=(%\S+?)[,\s]", text)  # random numbers loop, too
  made = [
    line
    for shape, operation, line in re.findall(
      r"= \w+\[([\d,]*)\]\S* ([\w-]+)\((.*)",
      "".join(_computation(text, body) for body in bodies),
    )
    if operation not in ("parameter", "get-tuple-element", "bitcast")
    and math.prod(map(int, filter(None, shape.split(",")))) == size
  ]
  assert bool(made) != split, made


def _computation(text, name):
  """The lines of one computation of an HLO module."""
  return re.search(re.escape(name) + r" \(.*?\n}\n", text, re.DOTALL)[0]
