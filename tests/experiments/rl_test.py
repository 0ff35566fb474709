"""The RL loop on a tiny model: it learns, it is measured, it continues."""

import dataclasses
import json
import math
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from experiments import evaluate, rl
from rlm.checkpoint.manager import restore_part
from rlm.jsonl import read_jsonl
from rlm.metrics import NonFiniteError
from rlm.rewards import registry
from rlm.rl import curriculum
from rlm.stopping import Stopped
from tests.experiments.rl_config import get_config


class Capitals:
  """Rewards a completion by its share of capital letters.

  The real rewards need a format that a random model never hits.
  """

  def __init__(self, task, weights, *, answer_format):
    pass

  def score(self, problem, text, finished):
    share = sum("A" <= c <= "Z" for c in text) / max(len(text), 1)
    return registry.Scored(
      total=share,
      rewards={"capitals": share},
      correct=share > 0.5,
      well_formed=True,
      steps_correct=False,
      answer="",
    )


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
  """The runs here compile the same programs."""
  keys = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {key: getattr(jax.config, key) for key in keys}
  for key, value in keys.items():
    jax.config.update(key, value)
  yield
  for key, value in before.items():
    jax.config.update(key, value)


@pytest.fixture
def capitals(monkeypatch):
  monkeypatch.setattr(registry, "Scorer", Capitals)


def results(folder):
  """What must not depend on interruptions."""
  folder = pathlib.Path(folder)
  summary = json.loads((folder / "summary.json").read_text())
  seconds = summary.pop("seconds")
  ledger = summary.pop("ledger")
  assert ledger["device_hours"] == pytest.approx(2 * seconds / 3600)
  metrics = read_jsonl(folder / "metrics.jsonl")
  timing = read_jsonl(folder / "timing.jsonl")
  for step, cost in zip(metrics, timing, strict=True):
    assert cost["flops"] == step["flops"] > 0 and cost["mfu"] > 0
    assert step["dropped"] == 0
  state = {
    name: jax.tree.map(
      lambda x: np.asarray(x).tobytes(),
      restore_part(folder / "checkpoints", name),
    )
    for name in ("step", "variables", "opt_state", "reference")
  }
  return {
    "metrics": (folder / "metrics.jsonl").read_bytes(),
    "traces": (folder / "traces" / "rl.jsonl").read_bytes(),
    "summary": summary,
    "state": state,
  }


def test_interruptions_change_nothing_and_the_reward_rises(
  tmp_path, capitals, monkeypatch
):
  c = get_config()
  c.steps = 10
  rl.run(c, tmp_path / "whole")
  whole = results(tmp_path / "whole")

  # Killed within step 5 (its checkpoint is that of step 4), asked to stop in
  # step 6, then to the end.
  update, calls = curriculum.update, []

  def interrupted(*args):
    calls.append(None)
    if len(calls) == 6:
      raise RuntimeError("killed")
    if len(calls) == 8:  # steps 4 and 5 were done again
      os.kill(os.getpid(), signal.SIGTERM)
    return update(*args)

  monkeypatch.setattr(curriculum, "update", interrupted)
  with pytest.raises(RuntimeError, match="killed"):
    rl.run(c, tmp_path / "parts")
  with pytest.raises(Stopped, match="rl stopped after step 6"):
    rl.run(c, tmp_path / "parts")
  monkeypatch.setattr(curriculum, "update", update)
  rl.run(c, tmp_path / "parts")
  parts = results(tmp_path / "parts")
  assert parts == whole

  # The last step ends with a refresh of the reference.
  assert whole["state"]["reference"] == whole["state"]["variables"]
  records = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
  rewards = [r["reward/mean"] for r in records]
  assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
  check_records(records)
  # Finished: the same command changes nothing.
  assert rl.run(c, tmp_path / "whole")["updates"] == 20


def check_records(records):
  first = records[0]
  for name in (
    *("reward/mean", "reward/std", "reward/capitals", "accuracy"),
    *("accuracy_given_format", "response_length/mean", "truncated"),
    *("response_length/finished", "entropy", "kl", "clip_fraction/low"),
    *("clip_fraction/high", "ratio/max", "ratio/min", "sampler_diff/mean"),
    *("sampler_diff/max", "zero_std_groups", "curriculum/level"),
    *("level/2/accuracy", "grad_norm", "learning_rate", "loss", "tokens"),
    *("expert_load", "expert_load/max_over_mean", "trained_tokens"),
  ):
    assert name in first, name
  assert all(r["kl"] >= 0 for r in records)
  assert first["ratio/min"] < 1 < first["ratio/max"]
  assert all(r["sampler_diff/max"] < 1e-4 for r in records)
  assert all(r["route_flip_rate"] < 0.01 for r in records)
  due = [r for r in records if "mtp_acceptance" in r]
  assert [r["step"] for r in due] == [1, 3, 5, 7, 9]
  assert all(0 < r["mtp_acceptance"] <= 1 for r in due)


class Easy(Capitals):
  """As `Capitals`, but every answer is right."""

  def score(self, problem, text, finished):
    scored = super().score(problem, text, finished)
    return dataclasses.replace(scored, correct=True)


@pytest.mark.full
def test_the_users_problems_get_harder_as_they_are_solved(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(registry, "Scorer", Easy)
  lines = [
    {"prompt": f"{i} + {i}?", "answer": str(2 * i), "level": 1 + i % 2}
    for i in range(8)
  ]
  path = tmp_path / "problems.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  c = get_config()
  c.steps = 2
  c.task = dict(
    name="jsonl", heldout_fraction=0.0, path=str(path), max_line_bytes=1000
  )
  c.curriculum.update(levels=(1, 2), start_level=1, smoothing=0.0)
  c.objective.name = "grpo_r1"
  c.traces_every_steps = 1
  rl.run(c, tmp_path / "run")
  first, second = read_jsonl(tmp_path / "run" / "metrics.jsonl")
  assert (first["curriculum/level"], second["curriculum/level"]) == (1, 2)
  assert "level/2/accuracy" not in first and "level/2/accuracy" in second
  assert first["trained_tokens"] > 0 and math.isfinite(first["loss"])
  asked = {t["prompt"] for t in read_jsonl(tmp_path / "run/traces/rl.jsonl")}
  assert asked <= {line["prompt"] for line in lines}


def test_a_run_can_be_evaluated_and_continued_from(tmp_path, monkeypatch):
  c = get_config()
  c.steps = 1
  c.objective.name = "dapo"
  c.monitor_kl, c.diagnostics_every_steps = True, 1
  c.selection.rows = "untied"
  rl.run(c, tmp_path / "first")
  (record,) = read_jsonl(tmp_path / "first" / "metrics.jsonl")
  # No reward at all: every group is tied, and nothing was learned from it.
  assert record["zero_std_groups"] == 1.0 and "loss" not in record
  assert record["sampler_diff/max"] < 1e-4 and record["route_flip_rate"] < 0.01
  assert abs(record["kl"]) < 1e-9  # still its own reference
  assert record["trained_tokens"] == 0

  c.init_from = str(tmp_path / "first")
  rl.run(c, tmp_path / "second")
  first, second = (
    restore_part(tmp_path / name / "checkpoints", "variables")
    for name in ("first", "second")
  )
  jax.tree.map(np.testing.assert_array_equal, first, second)

  e = evaluate_config(tmp_path / "first")
  summary = evaluate.run(e, tmp_path / "evaluated")
  assert summary["pass_at_1"]["mean"] == 0.0
  assert summary["pass_at_1_given_format"]["n"] == 0
  assert len(read_jsonl(tmp_path / "evaluated" / "traces" / "rl.jsonl")) == 2


@pytest.mark.parametrize(
  "policy", ["stop", pytest.param("skip", marks=pytest.mark.full)]
)
def test_a_reward_that_is_no_number(tmp_path, monkeypatch, policy):
  class Broken(Capitals):
    calls = 0

    def score(self, problem, text, finished):
      scored = super().score(problem, text, finished)
      Broken.calls += 1
      broken = 32 < Broken.calls <= 64  # all of step 1
      return dataclasses.replace(scored, total=math.nan) if broken else scored

  monkeypatch.setattr(registry, "Scorer", Broken)
  c = get_config()
  c.steps, c.checkpoint_every_steps, c.on_nonfinite = 3, 1, policy
  checkpoints = tmp_path / "checkpoints"
  if policy == "stop":
    with pytest.raises(NonFiniteError, match="step 1: "):
      rl.run(c, tmp_path)
    assert (tmp_path / "nonfinite_step_000001.npz").exists()
    assert [p.name for p in checkpoints.iterdir()] == ["1"]
    return
  rl.run(c, tmp_path)
  records = read_jsonl(tmp_path / "metrics.jsonl")
  assert [r["nonfinite"] for r in records] == [0, 2, 0]
  assert records[1]["reward/mean"] is None
  variables = restore_part(checkpoints, "variables")
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))


def evaluate_config(run):
  return dict(
    init_from=str(run),
    stage="rl",
    task=get_config().task,
    evaluation=dict(
      seed=0,
      levels=(2, 3),
      levels_trained=(2,),
      problems_per_level=2,
      samples_per_problem=2,
      ks=(1, 2),
      bootstrap_resamples=50,
      traces_per_level=1,
      samples_per_trace=1,
    ),
    sampling=dict(get_config().sampling),
    slots=get_config().slots,
    sampling_mesh=dict(data=1, fsdp=1, expert=1, context=1, tensor=1),
    prompt_length=get_config().prompt_length,
  )


@pytest.mark.parametrize(
  ("change", "error"),
  [
    (dict(prompts_per_step=3), r"rows_per_rollout=32 of a rollout of 48"),
    (dict(traces_per_step=3), r"traces_per_step=3 must lie within 0 and"),
    (dict(steps=0), r"steps=0 must be at least 1"),
    ({"sampling.temperature": 0.0}, r"RL needs temperature > 0"),
    ({"sampling.top_p": 0.9}, r"top_p=0\.9: the trainer's log-probs"),
    ({"sampling.stop_tokens": (7,)}, r"own EOS may end a completion"),
    ({"sampling.max_new_tokens": 60}, r"the model has max_position_embeddings"),
    (
      {"curriculum.levels": (2, 9)},
      r"config.curriculum.levels asks .* level 9",
    ),
    ({"model.n_vocab_used": 300, "model.vocab_size": 300}, r"uses 268 ids"),
    (
      {"prompt_length": 8},
      r"prompt_length=8 has no room for .* level 3, 13 tokens",
    ),
    (
      {"sampling.max_new_tokens": 30},
      r"max_new_tokens=30 cuts off every worked solution of level 3: .* has 34",
    ),
    ({"objective.name": "gpro"}, r"config.objective.name: .* 'grpo'"),
    ({"objective.clip_high": -0.1}, r"clip_high=-0\.1 is negative"),
    ({"mesh.fsdp": 8}, r"microbatch_rows=8 cannot be divided among the 16 pa"),
    (
      {"mesh.context": 2},
      r"mesh\.context=2: RL scores each token beside the o",
    ),
    ({"sampling_mesh.context": 2}, r"sampling_mesh\.context=2: decoding adds"),
    ({"mesh.tensor": 3}, r"mesh\.tensor=3 does not divide num_attention_heads"),
    ({"sampling_mesh.data": 3}, r"slots=32 cannot be divided among the 3"),
    ({"selection.microbatch_rows": 3}, r"rows_per_rollout=32 does not split"),
    ({"rewards": {"acuracy": 1.0}}, r"unknown reward 'acuracy'.*'accuracy'"),
  ],
)
def test_mistakes_stop_before_anything_is_computed(tmp_path, change, error):
  c = get_config()
  if "rewards" in change:
    c.rewards = change["rewards"]
  else:
    c.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=error):
    rl.run(c, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_evaluating_what_is_no_run(tmp_path):
  c = evaluate_config(tmp_path / "none")
  with pytest.raises(ValueError, match=r"Name the folder \(--workdir\)"):
    evaluate.run(c, tmp_path / "out")
  (tmp_path / "config.json").write_text("{}")
  c["init_from"] = str(tmp_path)
  with pytest.raises(ValueError, match=r"has no tokenizer and no model"):
    evaluate.run(c, tmp_path / "out")
