"""Published folders in and out again: bit for bit, and after a kill."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rlm import files
from rlm.checkpoint import convert, fp8
from rlm.checkpoint.initial import initial_variables
from rlm.checkpoint.load import load_checkpoint
from rlm.checkpoint.manager import CheckpointManager
from rlm.checkpoint.tensor_files import open_tensors
from rlm.checkpoint.tensor_writer import TensorWriter
from rlm.data.byte_tokenizer_files import write_byte_tokenizer
from rlm.models.published_config import read_published_config
from tests.checkpoint.load_test import write_run
from tests.parity import cases
from tests.tiny_model import lay, tiny_config, tiny_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
MTP = cases.CONFIGS["deepseek_v3"] | {"num_nextn_predict_layers": 1}
ALL = cases.CONFIGS | {"mtp": MTP}


def publish(folder, config, dtype=np.float32):
  """A published folder, its weights stored in `dtype`."""
  weights = cases.make_weights(config, seed=0)
  stored = {
    name: w if name.endswith("correction_bias") else w.astype(dtype)
    for name, w in weights.items()
  }
  kind = "float32" if dtype == np.float32 else "bfloat16"
  cases.write_folder(folder, config | {"torch_dtype": kind}, stored)
  write_byte_tokenizer(folder)
  files.write_json(folder / "generation_config.json", {"temperature": 0.6})
  return stored


def held(folder):
  tensors = open_tensors(folder)
  return {name: tensors.read(name) for name in tensors.names()}


def assert_same(found, expected):
  assert sorted(found) == sorted(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(
      found[name].view(np.uint8), array.view(np.uint8), err_msg=name
    )


@pytest.mark.parametrize("name", ALL)
def test_in_and_out_is_bit_equal(tmp_path, name):
  dtype = ml_dtypes.bfloat16 if name != "llama" else np.float32
  stored = publish(tmp_path / "in", ALL[name], dtype)
  convert.import_published(tmp_path / "in", tmp_path / "ours")
  convert.export_checkpoint(tmp_path / "ours", tmp_path / "out")
  if name == "mtp":  # published files repeat these
    layer = "model.layers.2."
    stored[layer + "embed_tokens.weight"] = stored["model.embed_tokens.weight"]
    stored[layer + "shared_head.head.weight"] = stored["lm_head.weight"]
  assert_same(held(tmp_path / "out"), stored)
  before, after = (
    read_published_config(tmp_path / folder) for folder in ("in", "out")
  )
  assert before == after
  for file in (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
  ):
    same = (tmp_path / "in" / file).read_bytes()
    assert (tmp_path / "out" / file).read_bytes() == same


def publish_fp8(folder):
  config = MTP | dict(hidden_size=136, intermediate_size=264)
  config["quantization_config"] = dict(
    quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128]
  )
  stored = {}
  rng = np.random.default_rng(0)
  for name, w in cases.make_weights(config, seed=0).items():
    if not name.endswith(("_proj.weight", "_mqa.weight")):
      kept = name.endswith("correction_bias")
      stored[name] = w if kept else w.astype(ml_dtypes.bfloat16)
    elif name.endswith("eh_proj.weight"):
      stored[name] = w.astype(ml_dtypes.bfloat16)
    else:
      # Scales as training left them, not those of this amax.
      blocks, scale = fp8.quantize(w)
      scale = scale * rng.uniform(1, 2, scale.shape).astype(np.float32)
      stored[name], stored[name + "_scale_inv"] = blocks, scale
  cases.write_folder(folder, config | {"torch_dtype": "bfloat16"}, stored)
  return stored


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_untouched_fp8_keeps_its_blocks_and_scales(tmp_path, dtype):
  stored = publish_fp8(tmp_path / "in")
  convert.import_published(tmp_path / "in", tmp_path / "ours", dtype=dtype)
  convert.export_checkpoint(tmp_path / "ours", tmp_path / "out")
  found = held(tmp_path / "out")
  assert_same({name: found[name] for name in stored}, stored)
  extra = set(found) - set(stored)
  assert extra == {
    "model.layers.2.embed_tokens.weight",
    "model.layers.2.shared_head.head.weight",
  }
  written = files.read_json(tmp_path / "out" / "config.json")
  assert written["quantization_config"]["quant_method"] == "fp8"


def test_a_touched_weight_is_quantised_anew_and_no_other(tmp_path):
  stored = publish_fp8(tmp_path / "in")
  convert.import_published(tmp_path / "in", tmp_path / "ours")
  touched = "model.layers.0.mlp.up_proj.weight"
  _, variables = load_checkpoint(tmp_path / "ours")
  ffn = variables["params"]["dense_layers"]["ffn"]
  ffn["up_proj"] = ffn["up_proj"].at[0, 0, 0].add(1)
  again = tmp_path / "again"
  again.mkdir()
  for name in ("config.json", "summary.json"):
    files.write_bytes(again / name, (tmp_path / "ours" / name).read_bytes())
  (tmp_path / "ours" / "published").rename(again / "published")
  with CheckpointManager(again / "checkpoints", keep=1) as manager:
    manager.save(0, {"variables": variables})
  convert.export_checkpoint(again, tmp_path / "out")
  found = held(tmp_path / "out")
  w = np.asarray(ffn["up_proj"][0].T)
  blocks, scale = fp8.quantize(w)
  changed = {touched: blocks, touched + "_scale_inv": scale}
  expected = stored | changed
  assert_same({name: found[name] for name in expected}, expected)


def test_published_to_published_in_another_dtype(tmp_path):
  stored = publish(tmp_path / "in", MTP)
  convert.export_checkpoint(
    tmp_path / "in", tmp_path / "half", stored="bfloat16", max_shard_bytes=20000
  )
  assert (tmp_path / "half" / "model.safetensors.index.json").is_file()
  found = held(tmp_path / "half")
  for name, w in stored.items():
    kept = name.endswith("correction_bias")
    expected = w if kept else w.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found[name], expected)
  convert.export_checkpoint(tmp_path / "in", tmp_path / "fp8", stored="fp8")
  config = files.read_json(tmp_path / "fp8" / "config.json")
  assert config["quantization_config"] == {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
  }
  found = held(tmp_path / "fp8")
  quantized = {n for n in found if n + "_scale_inv" in found}
  assert "model.layers.2.mlp.experts.0.up_proj.weight" in quantized
  for name in (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.2.eh_proj.weight",
    "model.norm.weight",
  ):
    assert found[name].dtype == ml_dtypes.bfloat16


COMMAND = [sys.executable, "-m", "tools.convert_checkpoint"]


def run(*arguments, **options):
  return subprocess.run(
    [*COMMAND, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    **options,
  )


def test_another_conversion_is_not_mixed_in(tmp_path):
  publish(tmp_path / "in", cases.CONFIGS["qwen2"])
  convert.import_published(tmp_path / "in", tmp_path / "ours")
  with pytest.raises(ValueError, match="holds another model, or the same from"):
    convert.import_published(
      tmp_path / "in", tmp_path / "ours", dtype="bfloat16"
    )
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "notes").write_text("mine")
  with pytest.raises(ValueError, match="full is not empty"):
    convert.import_published(tmp_path / "in", tmp_path / "full")


def test_what_is_stored_twice_must_be_equal_here_too(tmp_path):
  weights = cases.make_weights(MTP, seed=0)
  head = weights["lm_head.weight"] + 1
  weights["model.layers.2.shared_head.head.weight"] = head
  cases.write_folder(tmp_path / "in", MTP, weights)
  with pytest.raises(ValueError, match="a copy of lm_head"):
    convert.import_published(tmp_path / "in", tmp_path / "ours")
  with pytest.raises(ValueError, match="a copy of lm_head"):
    convert.export_checkpoint(tmp_path / "in", tmp_path / "out")
  convert.import_published(tmp_path / "in", tmp_path / "without", mtp=False)


def test_a_run_is_never_written_over(tmp_path):
  publish(tmp_path / "in", cases.CONFIGS["qwen2"])
  convert.import_published(tmp_path / "in", tmp_path / "ours")
  before = (tmp_path / "ours" / "config.json").read_bytes()
  for source in ("in", "ours"):
    with pytest.raises(ValueError, match="ours holds a run or another model"):
      convert.export_checkpoint(tmp_path / source, tmp_path / "ours")
  assert (tmp_path / "ours" / "config.json").read_bytes() == before


def test_what_a_kill_after_the_checkpoint_leaves_is_cleared(tmp_path):
  publish(tmp_path / "in", cases.CONFIGS["qwen2"])
  convert.import_published(tmp_path / "in", tmp_path / "ours")
  stage = tmp_path / "ours" / ".converting"
  for finished in (True, False):
    stage.mkdir()
    (stage / "leaf.bin").write_bytes(b"x")
    if not finished:
      (tmp_path / "ours" / "summary.json").unlink()
    convert.import_published(tmp_path / "in", tmp_path / "ours")
    assert not stage.exists()
    assert (tmp_path / "ours" / "summary.json").is_file()


def test_what_others_read_in_config_json_is_kept(tmp_path):
  scaling = dict(rope_type="yarn", factor=4.0, attn_factor=0.878)
  scaling["original_max_position_embeddings"] = 16
  config = cases.CONFIGS["qwen2"] | {
    "rope_scaling": scaling,
    "auto_map": {"AutoConfig": "configuration_x.X"},
    "bos_token_id": 3,
  }
  cases.write_folder(
    tmp_path / "in", config, cases.make_weights(config, seed=0)
  )
  with pytest.warns(UserWarning, match="attn_factor"):
    convert.export_checkpoint(tmp_path / "in", tmp_path / "out")
  written = files.read_json(tmp_path / "out" / "config.json")
  assert written["rope_scaling"]["attn_factor"] == 0.878
  assert written["bos_token_id"] == 3
  assert "auto_map" not in written  # its code is not in the folder


def test_scales_go_out_in_the_dtype_they_came_in(tmp_path):
  stored = publish_fp8(tmp_path / "in")
  config = files.read_json(tmp_path / "in" / "config.json")
  config["quantization_config"]["scale_fmt"] = "ue8m0"
  for name, array in stored.items():
    if name.endswith("_scale_inv"):
      power = 2.0 ** np.ceil(np.log2(array))
      stored[name] = power.astype(ml_dtypes.float8_e8m0fnu)
  (tmp_path / "in" / "model.safetensors").unlink()
  plan = [(name, x.dtype, x.shape) for name, x in stored.items()]
  with TensorWriter(tmp_path / "in", plan, max_shard_bytes=10**9) as writer:
    for name, array in stored.items():
      writer.write(name, array)
  files.write_json(tmp_path / "in" / "config.json", config)
  convert.import_published(tmp_path / "in", tmp_path / "ours")
  convert.export_checkpoint(tmp_path / "ours", tmp_path / "out")
  found = held(tmp_path / "out")
  assert_same({name: found[name] for name in stored}, stored)


def test_the_command(tmp_path):
  publish(tmp_path / "in", cases.CONFIGS["qwen3"])
  paths = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "ours")]
  done = run(*paths, "--format=rlm", "--dtype=fp8")
  assert done.returncode == 1
  assert "--dtype=fp8 goes with --format=hf" in done.stderr
  done = run(*paths, "--format=rlm", "--dtype=bfloat16")
  assert done.returncode == 0, done.stderr
  model, variables = load_checkpoint(tmp_path / "ours")
  assert model.cfg.param_dtype == "bfloat16"
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.bfloat16.dtype}


def test_what_cannot_be_read_is_said_without_a_traceback(tmp_path):
  done = run(
    f"--input={tmp_path}", f"--output={tmp_path / 'out'}", "--format=rlm"
  )
  assert done.returncode == 1
  assert done.stderr.startswith("error: there is no file"), done.stderr


def test_a_run_of_ours_goes_out_with_its_tokenizer(tmp_path):
  cfg = tiny_config(vocab_size=272, n_vocab_used=268)
  _, variables = tiny_model(vocab_size=272, n_vocab_used=268)
  write_run(tmp_path / "run", cfg, variables)
  convert.export_checkpoint(tmp_path / "run", tmp_path / "out")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["eos_token_id"] == 257
  assert config["n_vocab_used"] == 268
  assert (tmp_path / "out" / "chat_template.jinja").is_file()
  model, again = load_checkpoint(tmp_path / "out")
  assert model.cfg.n_vocab_used == 268
  jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_a_run_starts_from_a_published_folder(tmp_path):
  publish(tmp_path / "in", MTP)
  model, variables = load_checkpoint(tmp_path / "in")
  folder, key = str(tmp_path / "in"), jax.random.key(0)
  started = initial_variables(lay(model), folder, key)
  jax.tree.map(np.testing.assert_array_equal, started, variables)
  # Without MTP too; and a difference that matters is told.
  alone = type(model)(
    dataclasses.replace(model.cfg, num_nextn_predict_layers=0)
  )
  started = initial_variables(lay(alone), folder, key)
  assert "mtp_modules" not in started["params"]
  other = type(model)(dataclasses.replace(model.cfg, rope_theta=11.0))
  with pytest.raises(ValueError, match="rope_theta"):
    initial_variables(lay(other), folder, key)


def test_nothing_final_is_left_by_an_export_that_fails(tmp_path):
  config = cases.CONFIGS["qwen2"]
  weights = cases.make_weights(config, seed=0)
  weights["model.norm.weight"][0] = np.nan
  cases.write_folder(tmp_path / "in", config, weights)
  weights["model.layers.0.mlp.up_proj.weight"][0, 0] = np.inf
  cases.write_folder(tmp_path / "in", config, weights)
  with pytest.raises(ValueError, match="not finite"):
    convert.export_checkpoint(tmp_path / "in", tmp_path / "out", stored="fp8")
  assert not list((tmp_path / "out").glob("*.safetensors*"))
  assert safetensors.numpy.load_file(tmp_path / "in" / "model.safetensors")
