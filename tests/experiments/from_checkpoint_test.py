"""Runs that take their model from a published folder."""

import dataclasses
import json
import pathlib
import runpy

import jax
import numpy as np
import pytest

from experiments import evaluate, rl, sample_run, sft
from experiments.from_checkpoint import fill_model
from rlm import files
from rlm.checkpoint.convert import export_checkpoint, import_published
from rlm.checkpoint.initial import initial_variables
from rlm.checkpoint.load import load_checkpoint
from rlm.checkpoint.manager import restore_variables
from rlm.config import build
from rlm.data.byte_tokenizer_files import write_byte_tokenizer
from rlm.data.model_tokenizer import ModelTokenizer
from rlm.data.prompts import load_prompts
from rlm.models.config import ModelConfig
from rlm.models.transformer import Transformer
from rlm.sampling.config import SamplingConfig
from tests.data import published_folder
from tests.parity import cases
from tests.tiny_model import lay

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIELDS = cases.CONFIGS["qwen2"] | {
  "vocab_size": 352,
  "num_hidden_layers": 1,
  "max_position_embeddings": 256,
}


@pytest.fixture
def published(tmp_path):
  folder = tmp_path / "published"
  cases.write_folder(folder, FIELDS, cases.make_weights(FIELDS, seed=0))
  write_byte_tokenizer(folder)
  return folder


def config_of(file, published, **changes):
  c = runpy.run_path(str(ROOT / file))["get_config"]()
  c.init_from = str(published)
  with c.unlocked():
    c.update_from_flattened_dict(changes)
  return c


@pytest.fixture
def own_format(tmp_path):
  """As `published`, with a tokenizer and a chat template of its own."""
  folder = tmp_path / "own_format"
  cases.write_folder(folder, FIELDS, cases.make_weights(FIELDS, seed=0))
  return published_folder.write_deepseek(folder, published_folder.R1)


def test_every_stage_speaks_the_models_own_format(tmp_path, own_format):
  ids = ModelTokenizer(own_format)
  lines = tmp_path / "conversations.jsonl"
  answer = {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}
  turn = {"messages": [{"role": "user", "content": "1+1?"}, answer]}
  lines.write_text((json.dumps(turn) + "\n") * 8)
  problems = tmp_path / "problems.jsonl"
  problems.write_text(
    "".join(
      json.dumps({"prompt": f"{i}+1?", "answer": str(i + 1)}) + "\n"
      for i in range(20)
    )
  )
  shared = {"model.dtype": "float32", "model.remat": "none"}
  c = config_of(
    "configs/sft/published.py",
    own_format,
    **shared,
    **{
      "data.sources.traces.path": str(lines),
      "data.row_length": 32,
      "data.heldout_rows": 2,
      "batch.rows": 2,
      "batch.first_rows": 2,
      "eval.batch_rows": 2,
      "steps": 1,
      "model.attention_chunk": 0,
      "model.logits_chunk": 0,
      "peak_flops": 1e12,
    },
  )
  sft.run(c, str(tmp_path / "sft"))
  task = {"task.path": str(problems), "task.heldout_fraction": 0.5}
  sampling = {"slots": 8, "prompt_length": 128, "sampling.max_new_tokens": 16}
  c = config_of(
    "configs/rl/published.py",
    tmp_path / "sft",
    **shared,
    **task,
    **sampling,
    **{
      "model.logits_chunk": 0,
      "steps": 1,
      "prompts_per_step": 2,
      "group_size": 4,
      "selection.rows_per_rollout": 8,
      "traces_every_steps": 1,
      "traces_per_step": 1,
    },
  )
  rl.run(c, str(tmp_path / "rl"))
  [trace] = (tmp_path / "rl" / "traces" / "rl.jsonl").read_text().splitlines()
  # The prompt has opened thinking: the text that is judged has it.
  assert json.loads(trace)["completion"].startswith("<think>\n")
  c = config_of(
    "configs/evaluate/laptop.py",
    tmp_path / "rl",
    **sampling,
    **{
      "sampling_mesh.data": 1,
      "evaluation.levels": (1,),
      "evaluation.levels_trained": (1,),
      "evaluation.ks": (1, 2),
      "evaluation.traces_per_level": 1,
      "evaluation.samples_per_trace": 1,
      "evaluation.problems_per_level": 2,
      "evaluation.samples_per_problem": 2,
    },
  )
  with c.unlocked():
    c.task = dict(
      name="jsonl",
      heldout_fraction=0.5,
      path=str(problems),
      max_line_bytes=1000,
    )
  summary = evaluate.run(c, str(tmp_path / "evaluation"))
  assert summary["pass_at_1"]["n"] == 2
  prompts = load_prompts(tmp_path / "rl")
  assert prompts.stop_tokens == ids.eos_ids
  asked = [{"role": "user", "content": "1+1?"}]
  assert prompts.encode_messages(asked) == ids.encode_chat(asked)
  model, _ = load_checkpoint(tmp_path / "rl")
  assert model.cfg.eos_token_id == ids.eos_ids
  with pytest.raises(ValueError, match="Talk to it with --checkpoint="):
    sample_run.Chat(tmp_path / "rl", SamplingConfig(1.0, 0, 1.0, 8, ()), 0)


def test_fine_tuning_in_and_out_again(tmp_path, published):
  lines = tmp_path / "conversations.jsonl"
  answer = {"role": "assistant", "content": "<think>a</think>b"}
  turn = {"messages": [{"role": "user", "content": "1+1?"}, answer]}
  lines.write_text((json.dumps(turn) + "\n") * 40)
  changes = {
    "data.sources.traces.path": str(lines),
    "data.row_length": 32,
    "data.heldout_rows": 2,
    "batch.rows": 2,
    "batch.first_rows": 2,
    "eval.batch_rows": 2,
    "steps": 2,
    "model.attention_chunk": 0,
    "model.logits_chunk": 0,
    "model.remat": "none",
    "model.dtype": "float32",
    "peak_flops": 1e12,
  }
  c = config_of("configs/sft/published.py", published, **changes)
  sft.run(c, str(tmp_path / "run"))
  saved = files.read_json(tmp_path / "run" / "config.json")
  assert saved["model"]["num_key_value_heads"] == 2
  assert saved["model"]["n_vocab_used"] == 268
  assert saved["tokenizer"] == str(published)
  before = load_checkpoint(published)[1]
  after = restore_variables(tmp_path / "run" / "checkpoints")
  steps = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
  # Two steps of at most 5e-6 away from the published weights: it began there.
  assert 0 < max(jax.tree.leaves(steps)) < 2e-5
  # Finished; and the weights need not lie where they lay.
  for name in ("config.json", "model.safetensors"):
    (published / name).rename(tmp_path / name)
  assert sft.run(c, str(tmp_path / "run"))["steps"] == 2
  export_checkpoint(tmp_path / "run", tmp_path / "out")
  again = load_checkpoint(tmp_path / "out")[1]
  jax.tree.map(np.testing.assert_array_equal, again, after)
  tokenizer = (published / "tokenizer.json").read_bytes()
  assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer


def test_rl_could_begin(tmp_path, published, monkeypatch):
  monkeypatch.chdir(ROOT)
  changes = {"sampling.max_new_tokens": 64, "prompt_length": 128}
  c = fill_model(
    config_of("configs/rl/published.py", published, **changes), "unused"
  )
  rl.check_inputs(build(rl.Config, c), pending=tmp_path)


def test_what_is_given_wins_and_nothing_else_changes(tmp_path, published):
  c = config_of("configs/sft/published.py", published)
  filled = fill_model(c, str(tmp_path / "run"))
  assert filled["model"]["remat"] == "block"
  assert filled["model"]["hidden_size"] == 32
  assert {
    k: v for k, v in filled.items() if k not in ("model", "tokenizer")
  } == {k: v for k, v in c.to_dict().items() if k not in ("model", "tokenizer")}
  assert fill_model(filled, str(tmp_path / "run")) is filled


def test_a_converted_folder_serves_as_well(tmp_path):
  fields = cases.CONFIGS["deepseek_v3"] | {
    "vocab_size": 272,
    "num_nextn_predict_layers": 1,
  }
  folder = tmp_path / "published"
  cases.write_folder(folder, fields, cases.make_weights(fields, seed=0))
  write_byte_tokenizer(folder)
  import_published(folder, tmp_path / "ours")
  from_ours, from_theirs = (
    fill_model(config_of("configs/sft/published.py", source), "unused")
    for source in (tmp_path / "ours", folder)
  )
  assert build(ModelConfig, from_ours["model"]) == build(
    ModelConfig, from_theirs["model"]
  )
  assert from_ours["tokenizer"] == str(tmp_path / "ours" / "published")
  cfg = build(ModelConfig, from_ours["model"])
  model = Transformer(dataclasses.replace(cfg, dtype="float32"))
  key = jax.random.key(0)
  a = initial_variables(lay(model), str(tmp_path / "ours"), key)
  b = initial_variables(lay(model), str(folder), key)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert "mtp_modules" not in a["params"]


def test_a_folder_without_model_is_told(tmp_path):
  c = config_of("configs/sft/published.py", tmp_path)
  with pytest.raises(ValueError, match="leaves vocab_size, .*no config.json"):
    fill_model(c, str(tmp_path / "run"))
