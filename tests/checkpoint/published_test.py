"""Published tensors -> variables: every place, FP8, shardings, all errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlm import files
from rlm.checkpoint import fp8
from rlm.checkpoint.initial import shapes
from rlm.checkpoint.published import PublishedWeights
from rlm.checkpoint.published_names import published_tensors
from rlm.models.published_config import read_published_config
from rlm.models.transformer import Transformer
from tests.parity import cases

MTP = cases.CONFIGS["deepseek_v3"] | {"num_nextn_predict_layers": 1}
ALL = cases.CONFIGS | {"mtp": MTP}


def wanted(config, **dtypes):
  cfg = read_published_config(config, **dtypes)
  return cfg, shapes(Transformer(cfg))


def load(folder, config, shardings=None, **dtypes):
  cfg, tree = wanted(config, **dtypes)
  return PublishedWeights(folder, cfg, tree).load(tree, shardings=shardings)


@pytest.mark.parametrize("name", ALL)
def test_names_are_those_of_an_independent_list(name):
  config = ALL[name]
  cfg, tree = wanted(config)
  tensors = [t for ts in published_tensors(cfg, tree).values() for t in ts]
  found = {tensor.name: tensor.shape for tensor in tensors}
  assert len(found) == len(tensors)
  assert found == cases.tensor_shapes(config)


def test_every_tensor_lands_in_its_place(tmp_path):
  weights = cases.make_weights(MTP, seed=0)
  cases.write_folder(tmp_path, MTP, weights)
  variables = load(tmp_path, MTP)
  params, router = variables["params"], variables["router"]
  at = "model.layers."

  def same(leaf, name, *, turned=True):
    expected = weights[name].T if turned else weights[name]
    np.testing.assert_array_equal(leaf, expected)

  same(params["embed"]["embedding"], "model.embed_tokens.weight", turned=False)
  same(params["head"], "lm_head.weight")
  same(
    params["dense_layers"]["attn"]["kv_a"][0],
    at + "0.self_attn.kv_a_proj_with_mqa.weight",
  )
  ffn = params["moe_layers"]["ffn"]
  for expert in range(8):
    same(
      ffn["up_proj"][0, expert], f"{at}1.mlp.experts.{expert}.up_proj.weight"
    )
  same(
    ffn["shared"]["down_proj"][0], at + "1.mlp.shared_experts.down_proj.weight"
  )
  bias = "mlp.gate.e_score_correction_bias"
  same(router["moe_layers"]["ffn"]["expert_bias"][0], at + "1." + bias)
  mtp = params["mtp_modules"]
  same(mtp["proj"][0], at + "2.eh_proj.weight")
  same(mtp["embedding_norm"]["scale"][0], at + "2.enorm.weight")
  same(mtp["hidden_norm"]["scale"][0], at + "2.hnorm.weight")
  same(mtp["norm"]["scale"][0], at + "2.shared_head.norm.weight")
  same(
    mtp["block"]["ffn"]["gate_proj"][0, 3],
    at + "2.mlp.experts.3.gate_proj.weight",
  )
  same(
    router["mtp_modules"]["block"]["ffn"]["expert_bias"][0], at + "2." + bias
  )


def test_dtypes_are_those_asked_for(tmp_path):
  config = cases.CONFIGS["deepseek_v3"]
  weights = cases.make_weights(config, seed=0)
  cases.write_folder(tmp_path, config, weights)
  variables = load(tmp_path, config, dtype="bfloat16", param_dtype="bfloat16")
  head = variables["params"]["head"]
  assert head.dtype == jnp.bfloat16
  rounded = weights["lm_head.weight"].T.astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(np.asarray(head), rounded)
  assert variables["router"]["moe_layers"]["ffn"]["expert_bias"].dtype == (
    jnp.float32
  )


def test_each_device_receives_its_part(tmp_path):
  """Every leaf over another of its axes, or on all devices whole."""
  config = cases.CONFIGS["deepseek_v3"]
  cases.write_folder(tmp_path, config, cases.make_weights(config, seed=0))
  mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
  _, tree = wanted(config)
  leaves, structure = jax.tree.flatten(tree)
  shardings, used = [], set()
  for leaf in leaves:
    even = [axis for axis, size in enumerate(leaf.shape) if size % 2 == 0]
    spec: list = [None] * leaf.ndim
    if even:
      new = [axis for axis in even if (leaf.ndim, axis) not in used]
      axis = (new or even)[0]
      spec[axis] = "x"
      used.add((leaf.ndim, axis))
    shardings.append(NamedSharding(mesh, P(*spec)))
  assert {(4, 1), (4, 2), (4, 3), (3, 1), (3, 2), (2, 1)} <= used
  alone = load(tmp_path, config)
  apart = load(tmp_path, config, jax.tree.unflatten(structure, shardings))
  for a, b, sharding in zip(
    jax.tree.leaves(alone), jax.tree.leaves(apart), shardings, strict=True
  ):
    assert b.sharding == sharding
    np.testing.assert_array_equal(a, b)


def quantized(weights):
  """The weights as published in FP8: (stored, what they stand for)."""
  stored, exact = {}, dict(weights)
  for name, w in weights.items():
    if not name.endswith("_proj.weight"):
      stored[name] = w
      continue
    blocks, scale = fp8.quantize(w)
    stored[name], stored[name + "_scale_inv"] = blocks, scale
    rows, columns = (np.arange(n) // 128 for n in w.shape)
    exact[name] = blocks.astype(np.float32) * scale[np.ix_(rows, columns)]
  return stored, exact


def wide(config):
  """More than a block wide, with ragged edges."""
  return config | dict(hidden_size=136, intermediate_size=264)


def test_fp8_is_dequantised_with_scales_from_other_files(tmp_path):
  config = wide(cases.CONFIGS["deepseek_v3"])
  stored, exact = quantized(cases.make_weights(config, seed=0))
  scales = {k: v for k, v in stored.items() if k.endswith("_scale_inv")}
  assert scales["model.layers.0.mlp.up_proj.weight_scale_inv"].shape == (3, 2)
  rest = {k: v for k, v in stored.items() if k not in scales}
  cases.write_folder(tmp_path, config, rest)
  (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
  safetensors.numpy.save_file(scales, tmp_path / "b.safetensors")
  files.write_json(
    tmp_path / "model.safetensors.index.json",
    {
      "metadata": {},
      "weight_map": dict.fromkeys(rest, "a.safetensors")
      | dict.fromkeys(scales, "b.safetensors"),
    },
  )
  variables = load(tmp_path, config)
  found = variables["params"]["dense_layers"]["ffn"]["up_proj"][0]
  name = "model.layers.0.mlp.up_proj.weight"
  np.testing.assert_array_equal(found, exact[name].T)
  # And where a device reads a part of the blocks.
  mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
  _, tree = wanted(config)
  shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)
  ffn = shardings["params"]["dense_layers"]["ffn"]
  ffn["up_proj"] = NamedSharding(mesh, P(None, "x", None))
  ffn["down_proj"] = NamedSharding(mesh, P(None, "x", None))
  apart = load(tmp_path, config, shardings)["params"]["dense_layers"]["ffn"]
  np.testing.assert_array_equal(apart["up_proj"][0], exact[name].T)
  down = name.replace("up_proj", "down_proj")
  np.testing.assert_array_equal(apart["down_proj"][0], exact[down].T)


def test_all_problems_are_told_at_once(tmp_path):
  config = cases.CONFIGS["deepseek_v3"]
  weights = cases.make_weights(config, seed=0)
  at = "model.layers.1."
  del weights[at + "mlp.gate.weight"], weights["model.norm.weight"]
  weights[at + "mlp.experts.8.up_proj.weight"] = np.zeros((16, 32), np.float32)
  weights["lm_head.weight"] = weights["lm_head.weight"][:-1]
  kv_b = at + "self_attn.kv_b_proj.weight"
  weights[kv_b] = weights[kv_b].astype(ml_dtypes.float8_e4m3fn)
  o_proj = at + "self_attn.o_proj.weight"
  weights[o_proj] = weights[o_proj].astype(np.int32)
  cases.write_folder(tmp_path, config, weights)
  path = tmp_path / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError) as caught:
    load(tmp_path, config)
  text = str(caught.value)
  for part in (
    f"{at}mlp.gate.weight is missing",
    "model.norm.weight is missing",
    f"{at}mlp.experts.8.up_proj.weight is surplus",
    "lm_head.weight has shape (39, 32), (40, 32) is needed",
    f"{kv_b} is float8_e4m3fn without {kv_b}_scale_inv",
    f"{o_proj} is int32",
    "in model.safetensors is cut:",
  ):
    assert part in text, (part, text)


def test_a_scale_of_another_shape_and_one_without_weight(tmp_path):
  config = wide(cases.CONFIGS["deepseek_v3"])
  stored, _ = quantized(cases.make_weights(config, seed=0))
  name = "model.layers.0.mlp.up_proj.weight"
  stored[name + "_scale_inv"] = stored[name + "_scale_inv"][:2]
  stored["lm_head.weight_scale_inv"] = np.ones((1, 2), np.float32)
  cases.write_folder(tmp_path, config, stored)
  with pytest.raises(ValueError) as caught:
    load(tmp_path, config)
  assert f"{name}_scale_inv has shape (2, 2), (3, 2) is needed" in str(
    caught.value
  )
  assert "lm_head.weight_scale_inv is surplus" in str(caught.value)


def test_what_is_stored_twice_must_be_equal(tmp_path):
  weights = cases.make_weights(MTP, seed=0)
  weights["model.layers.2.embed_tokens.weight"] = weights[
    "model.embed_tokens.weight"
  ].copy()
  head = weights["lm_head.weight"].copy()
  weights["model.layers.2.shared_head.head.weight"] = head
  cases.write_folder(tmp_path, MTP, weights)
  load(tmp_path, MTP)
  head[-1, -1] += 1
  cases.write_folder(tmp_path, MTP, weights)
  with pytest.raises(ValueError, match="shared_head.head.*a copy of lm_head"):
    load(tmp_path, MTP)


def test_buffers_that_config_json_determines_are_passed_over(tmp_path):
  config = cases.CONFIGS["llama"]
  weights = cases.make_weights(config, seed=0)
  weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4)
  cases.write_folder(tmp_path, config, weights)
  load(tmp_path, config)


def test_mtp_that_was_left_out_is_told_with_the_way_on(tmp_path):
  plain = cases.CONFIGS["deepseek_v3"]
  cases.write_folder(tmp_path, MTP, cases.make_weights(plain, seed=0))
  with pytest.raises(
    ValueError, match=r"all \d+ tensors model.layers.2.\* are"
  ):
    load(tmp_path, MTP)
