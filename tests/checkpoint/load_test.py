"""The importer's three lines, over published folders and runs alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlm
from rlm import files
from rlm.checkpoint.manager import CheckpointManager
from tests.parity import cases
from tests.tiny_model import tiny_config, tiny_model

MTP = cases.CONFIGS["deepseek_v3"] | {"num_nextn_predict_layers": 1}


def publish(folder, config, **generation):
  cases.write_folder(folder, config, cases.make_weights(config, seed=0))
  if generation:
    files.write_json(folder / "generation_config.json", generation)


def write_run(folder, cfg, variables):
  folder.mkdir()
  files.write_json(
    folder / "config.json",
    {"model": dataclasses.asdict(cfg), "tokenizer": "bytes"},
  )
  with CheckpointManager(folder / "checkpoints", keep=1) as manager:
    manager.save(3, {"variables": variables})


def test_three_lines_for_a_published_folder(tmp_path):
  publish(tmp_path, cases.CONFIGS["qwen2"], eos_token_id=[7, 8])
  seen = []
  model, variables = rlm.load_checkpoint(
    tmp_path, dtype="float32", on_read=lambda *counts: seen.append(counts)
  )
  tokens = np.array([[3, 1, 4, 1, 5]])
  logits = model.logits(variables, tokens)
  assert (logits.shape, logits.dtype) == ((1, 5, 40), jnp.float32)
  key = jax.random.key(0)
  prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
  out = rlm.generate(model, variables, prompts, key, max_new_tokens=6)
  assert model.cfg.eos_token_id == (7, 8)
  assert seen[-1][0] == seen[-1][1] > 0
  for tokens, logprobs, reason in zip(
    out.tokens, out.logprobs, out.finish_reasons, strict=True
  ):
    assert len(tokens) == len(logprobs)
    ended = tokens[-1] in (7, 8)
    assert reason == ("stop" if ended else "length")
    assert ended or len(tokens) == 6


def test_generate_draws_what_logits_say(tmp_path):
  publish(tmp_path, cases.CONFIGS["qwen2"])
  model, variables = rlm.load_checkpoint(tmp_path)
  prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3]]
  out = rlm.generate(
    model,
    variables,
    prompts,
    jax.random.key(0),
    max_new_tokens=6,
    temperature=0.5,
    stop_tokens=[],
  )
  rows = np.zeros((3, 12), np.int32)
  for row, prompt, tokens in zip(rows, prompts, out.tokens, strict=True):
    row[: len(prompt) + 6] = prompt + tokens
  logprobs = jax.nn.log_softmax(model.logits(variables, rows) / 0.5)
  for i, prompt in enumerate(prompts):
    for j, token in enumerate(out.tokens[i]):
      expected = logprobs[i, len(prompt) + j - 1, token]
      assert abs(out.logprobs[i][j] - expected) < 1e-4
  # The place in the list decides, not the company.
  other = rlm.generate(
    model,
    variables,
    [prompts[0], [7], [8, 8]],
    jax.random.key(0),
    max_new_tokens=6,
    temperature=0.5,
    stop_tokens=[],
  )
  assert other.tokens[0] == out.tokens[0]


def test_settings_out_of_range(tmp_path):
  publish(tmp_path, cases.CONFIGS["qwen2"])
  model, variables = rlm.load_checkpoint(tmp_path)
  key = jax.random.key(0)
  with pytest.raises(
    ValueError, match="90 tokens, which with max_new_tokens=7"
  ):
    rlm.generate(model, variables, [[1] * 90], key, max_new_tokens=7)
  with pytest.raises(ValueError, match="no prompts"):
    rlm.generate(model, variables, [], key, max_new_tokens=7)
  with pytest.raises(ValueError, match=r"prompt 0 holds an id outside 0\.\.39"):
    rlm.generate(model, variables, [[40]], key, max_new_tokens=7)
  with pytest.raises(ValueError, match=r"shape \(5,\); \[rows, at most 96"):
    model.logits(variables, np.arange(5))
  with pytest.raises(AttributeError, match="no attribute 'load_checkpont'"):
    _ = rlm.load_checkpont


@pytest.mark.full
def test_chunks_of_training_do_not_bind_the_importer(tmp_path):
  publish(tmp_path, cases.CONFIGS["qwen2"])
  model, variables = rlm.load_checkpoint(tmp_path)
  chunked = type(model)(dataclasses.replace(model.cfg, attention_chunk=5))
  tokens = np.arange(7)[None]
  np.testing.assert_array_equal(
    chunked.logits(variables, tokens), model.logits(variables, tokens)
  )
  out = [
    rlm.generate(m, variables, [[1, 2]], jax.random.key(0), max_new_tokens=2)
    for m in (model, chunked)
  ]
  assert out[0].tokens == out[1].tokens


def test_segments_are_documents_of_their_own(tmp_path):
  publish(tmp_path, cases.CONFIGS["deepseek_v3"])
  model, variables = rlm.load_checkpoint(tmp_path)
  tokens = np.array([[3, 1, 4, 1, 5, 9]])
  packed = model.logits(variables, tokens, np.array([[1, 1, 2, 2, 2, 0]]))
  apart = model.logits(variables, tokens[:, 2:5])
  np.testing.assert_allclose(packed[:, 2:5], apart, atol=1e-4)


def test_a_run_s_checkpoint(tmp_path):
  sizes = dict(vocab_size=272, n_vocab_used=268)
  model, variables = tiny_model(**sizes)
  write_run(tmp_path / "run", tiny_config(**sizes), variables)
  loaded, again = rlm.load_checkpoint(tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, again, variables)
  assert loaded.cfg.eos_token_id == (257,)
  tokens = np.array([[3, 1, 4]])
  logits = loaded.logits(again, tokens)
  assert np.isneginf(logits[..., 268:]).all()
  np.testing.assert_array_equal(logits, model.logits(variables, tokens))
  half, bits = rlm.load_checkpoint(tmp_path / "run", dtype="bfloat16")
  assert half.cfg.dtype == "bfloat16"
  assert {x.dtype for x in jax.tree.leaves(bits["params"])} == {
    jnp.dtype("bfloat16")
  }
  router = jax.tree.leaves(bits["router"])
  assert {x.dtype for x in router} == {jnp.dtype("float32")}
  # Without MTP the rest is the same.
  plain, rest = rlm.load_checkpoint(tmp_path / "run", mtp=False)
  assert plain.cfg.num_nextn_predict_layers == 0
  np.testing.assert_array_equal(plain.logits(rest, tokens), logits)


def test_mtp_can_be_left_out(tmp_path):
  publish(tmp_path, MTP)
  with_mtp, all_variables = rlm.load_checkpoint(tmp_path)
  model, variables = rlm.load_checkpoint(tmp_path, mtp=False)
  assert "mtp_modules" in all_variables["params"]
  assert "mtp_modules" not in variables["params"]
  tokens = np.array([[3, 1, 4]])
  np.testing.assert_array_equal(
    model.logits(variables, tokens), with_mtp.logits(all_variables, tokens)
  )


def test_folders_that_hold_no_model(tmp_path):
  with pytest.raises(ValueError, match="holds no config.json: it is neither"):
    rlm.load_checkpoint(tmp_path)
  files.write_json(tmp_path / "config.json", {"order": ["pretrain", "rl"]})
  with pytest.raises(ValueError, match="a recipe's folder. Name one of its st"):
    rlm.load_checkpoint(tmp_path)
  files.write_json(tmp_path / "config.json", {"seed": 1})
  with pytest.raises(ValueError, match="neither model_type, as published"):
    rlm.load_checkpoint(tmp_path)


def test_other_arrays_than_the_config_says(tmp_path):
  sizes = dict(vocab_size=272, n_vocab_used=268)
  _, variables = tiny_model(**sizes)
  other = tiny_config(**sizes, num_nextn_predict_layers=0)
  write_run(tmp_path / "run", other, variables)
  with pytest.raises(ValueError, match="other arrays than its config.*mtp_mod"):
    rlm.load_checkpoint(tmp_path / "run")
