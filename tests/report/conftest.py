"""A recipe's folder as a run leaves it: layout, names and plausible values."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

ACCURACY = {  # stage -> pass@1, and by level 2..7
  "pretrain": (0.02, 0.05, 0.03, 0.01, 0.0, 0.0, 0.0),
  "cold_start": (0.36, 0.57, 0.45, 0.36, 0.26, 0.02, 0.0),
  "rl": (0.83, 0.95, 0.96, 0.93, 0.92, 0.31, 0.04),
  "sft": (0.74, 0.92, 0.9, 0.82, 0.75, 0.25, 0.02),
  "rl_final": (0.85, 0.97, 0.96, 0.95, 0.94, 0.38, 0.05),
  "student_pretrain": (0.04, 0.09, 0.05, 0.02, 0.01, 0.0, 0.0),
  "distill": (0.66, 0.88, 0.85, 0.72, 0.61, 0.12, 0.0),
}
TASK = {
  "name": "column_addition",
  "heldout_fraction": 0.1,
  "letters": "abcdefghij",
  "forget_carry": 0.5,
  "slip": 0.02,
}
SECONDS = {
  "pretrain": 118.2,
  "cold_start": 14.1,
  "rl": 131.0,
  "rejection": 21.4,
  "sft": 24.3,
  "rl_final": 33.8,
  "student_pretrain": 41.2,
  "distill": 19.0,
}
STUDENT = ("student_pretrain", "distill")
ORIGIN = {
  "cold_start": "pretrain",
  "rl": "cold_start",
  "rejection": "rl",
  "sft": "pretrain",
  "rl_final": "sft",
  "distill": "student_pretrain",
}
HOSTILE = (
  "<script>alert('x')</script>\"><img src=https://evil.example/a.png>"
  "\x1b[31mred\u202e\ud800 $x$ {{ 7 * 7 }}"
)


def measure(mean, n=400, width=0.03):
  half = width * (0.4 + math.sqrt(mean * (1 - mean)) if mean < 1 else 1)
  return {
    "mean": mean,
    "low": max(0.0, mean - half),
    "high": min(1.0, mean + half) if mean <= 1 else mean + half,
    "n": n,
  }


def measures(mean):
  return {
    "pass_at_1": measure(mean),
    "pass_at_1_given_format": measure(min(1.0, mean * 1.2)),
    "maj_at_8": measure(min(1.0, mean * 1.08)),
    "steps_correct": measure(mean * 0.97),
    "pass_at_8": measure(min(1.0, mean * 1.3 + 0.05)),
    "format": measure(0.9),
    "response_length": measure(31.0 + 9 * mean, width=1.0),
  }


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def write_jsonl(path, records):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(r) + "\n" for r in records))


def loads(rng, step, layers=2, experts=8):
  spread = 1.2 * math.exp(-step / 80) + 0.15
  load = np.exp(spread * rng.normal(size=(layers, experts)))
  load = load / load.sum(axis=1, keepdims=True)
  return {
    "expert_load": load.tolist(),
    "expert_load/max_over_mean": (load.max(axis=1) * experts).tolist(),
  }


def pretrain_metrics(rng, steps):
  for step in range(1, steps + 1):
    decay = math.exp(-step / (0.15 * steps))
    record = {
      "step": step,
      "loss/next_token": 0.42 + 5.1 * decay + 0.04 * rng.normal(),
      "loss/mtp": 0.71 + 4.9 * decay + 0.05 * rng.normal(),
      "loss/balance": 1 + 0.6 * decay + 0.01 * rng.normal(),
      "grad_norm": float(np.exp(0.3 * rng.normal() + 1.5 * decay - 0.5)),
      "learning_rate": 0.03 * min(1, step / 30),
      "tokens": 4096,
      "nonfinite": 0,
      **loads(rng, step),
    }
    if step % 25 == 0:
      for k in (2, 3, 4, 5, 6):
        record[f"level/{k}/worked_accuracy"] = (1 - decay) ** k
      record["heldout/stdlib/bits_per_byte"] = 3.1 + 3.4 * decay
    yield record


def rl_metrics(rng, steps):
  for step in range(1, steps + 1):
    t = 1 / (1 + math.exp(-(step / steps - 0.35) * 9))
    accuracy = float(np.clip(0.35 + 0.55 * t + 0.05 * rng.normal(), 0, 1))
    yield {
      "step": step,
      "reward/mean": accuracy + 0.09,
      "reward/std": 0.3,
      "reward/answer": accuracy,
      "reward/format": 0.8 + 0.19 * t,
      "accuracy": accuracy,
      "accuracy_given_format": None if step == 3 else min(1, accuracy * 1.1),
      "response_length/mean": 33 + 14 * t + rng.normal(),
      "response_length/finished": 32 + 14 * t + rng.normal(),
      "truncated": max(0, 0.08 * (1 - t) + 0.01 * rng.normal()),
      "entropy": 0.31 - 0.2 * t + 0.01 * rng.normal(),
      "kl": float("nan") if step == 5 else 0.002 + 0.06 * t,
      "clip_fraction/low": abs(0.004 * rng.normal()),
      "clip_fraction/high": abs(0.012 * rng.normal()),
      "ratio/max": float(np.exp(abs(0.4 * rng.normal()) + 0.2)),
      "ratio/min": float(np.exp(-abs(0.4 * rng.normal()) - 0.2)),
      "grad_norm": float(np.exp(0.5 * rng.normal() - 1)),
      "sampler_diff/mean": float(np.exp(0.3 * rng.normal() - 14)),
      "sampler_diff/max": float(np.exp(0.5 * rng.normal() - 10.5)),
      "route_flip_rate": abs(2e-5 * rng.normal()),
      "mtp_acceptance": 0.52 + 0.1 * t + 0.02 * rng.normal(),
      "zero_std_groups": float(np.clip(0.3 + 0.4 * t, 0, 1)),
      "learning_rate": 7e-4,
      "curriculum/level": 3 + int(3 * t),
      "tokens": 256 * 40,
      **{
        f"level/{k}/accuracy": float(
          np.clip((1.1 - 0.1 * k) * t + 0.3 + 0.06 * rng.normal(), 0, 1)
        )
        for k in (2, 3, 4, 5)
      },
      **loads(rng, 200),
    }


def trace(stage, i, correct, completion=None, **changes):
  level = 2 + i % 4
  thinking = f"b770=14c71{1 if correct else 9}=09d510=06"
  record = {
    "stage": stage,
    "step": 100,
    "task": "column_addition",
    "level": level,
    "prompt": f"d5{i}c71b77?",
    "completion": f"<think>{thinking}</think><answer>d6c9b4</answer><|eos|>"
    if completion is None
    else completion,
    "rewards": {"answer": float(correct), "format": 1.0},
    "correct": correct,
    "well_formed": True,
    "finished": True,
    "steps_correct": correct,
    "answer": "d6c9b4" if correct else "d6c9b9",
    "expected": "d6c9b4",
    "identity": f"problem-{i}",
  }
  return record | changes


def stage_config(root: Path, name):
  """The keys that the report reads, of a stage's config.json."""
  config = {"stage": name, "seed": 0, "model": {"hidden_size": 64}}
  if name in ORIGIN:
    config["init_from"] = str(root / ORIGIN[name])
  if name in ("rl", "rl_final"):
    config["curriculum"] = {"levels": [2, 3, 4, 5], "start_level": 3}
  elif name == "rejection":
    config["rejection"] = {"levels": [2, 3, 4, 5]}
  elif name in ("sft", "distill"):
    path = str(root / "rejection" / "messages.jsonl")
    config["data"] = {"sources": {"traces": {"path": path}}}
  else:
    levels = [2, 3] if name == "cold_start" else [2, 3, 4, 5, 6, 6]
    columns = {"levels": levels, "task": TASK["name"], "author": "noisy"}
    config["data"] = {"sources": {"columns": columns, "stdlib": {}}}
    config["tasks"] = {TASK["name"]: TASK}
  return config


def write_stage(path: Path, name, records):
  write_jsonl(path / "metrics.jsonl", records)
  write_jsonl(
    path / "timing.jsonl",
    [
      {
        "step": r["step"],
        "seconds": 0.25,
        "tokens_per_second": 16384.0,
        "mfu": 0.213,
      }
      for r in records
    ],
  )
  write_json(path / "config.json", stage_config(path.parent, name))
  write_json(
    path / "run.json",
    {"versions": {"jax": "0.10.2"}, "commit": "0123456789abcdef"},
  )
  summary = {"stage": name, "seconds": SECONDS[name], "flops": 2.5e12}
  if name == "pretrain":
    summary["heldout"] = {
      "columns": {"bits_per_byte": 0.05, "unigram_bits_per_byte": None},
      "stdlib": {
        "bits_per_byte": 2.78,
        "unigram_bits_per_byte": 4.71,
        "bigram_bits_per_byte": 3.62,
      },
    }
  write_json(path / "summary.json", summary)


def write_recipe(root: Path, *, steps=120) -> Path:
  rng = np.random.default_rng(0)
  for name in SECONDS:
    is_rl = name in ("rl", "rl_final")
    make = rl_metrics if is_rl else pretrain_metrics
    n = steps if name in ("pretrain", "rl") else steps // 4
    write_stage(root / name, name, list(make(rng, n)))
  for name, (mean, *by_level) in ACCURACY.items():
    write_json(
      root / "evaluate" / name / "summary.json",
      {
        "stage": name,
        "n_problems": 400,
        "n_samples": 8,
        **measures(mean),
        "levels": {
          str(level): measures(value)
          for level, value in zip(range(2, 8), by_level, strict=True)
        },
        "levels_trained": [2, 3, 4, 5],
        "tokens": 50_000,
        "flops": 1e11,
      },
    )
    right = {"cold_start": 0.36, "rl": 0.85}.get(name, mean)
    traces = [trace(name, i, (i * 7 % 20) / 20 < right) for i in range(40)]
    if name == "rl":
      traces[0] = trace(name, 0, False, completion=HOSTILE, answer=HOSTILE)
    write_jsonl(root / "evaluate" / name / "traces" / "000.jsonl", traces)
  stages = [
    {"name": name, "seconds": seconds, "tokens": int(seconds * 21_000)}
    for name, seconds in SECONDS.items()
  ]
  for stage in stages:
    if stage["name"] in ACCURACY:
      mean, *by_level = ACCURACY[stage["name"]]
      stage.update(measures(mean))
      stage["levels"] = {
        str(k): measures(v) for k, v in zip(range(2, 8), by_level, strict=True)
      }
  write_json(
    root / "summary.json",
    {
      "stages": stages,
      "seed": 0,
      "seconds_total": 512.3,
      "rl_gain_points": 47.0,
      "distill": {"before": measure(0.04), "after": measure(0.66)},
      "model": {"total": 214_000, "activated": 121_000},
      "flops": 1.43e13,
    },
  )
  write_json(
    root / "config.json",
    {
      "seed": 0,
      "models": {"model": {"hidden_size": 64, "num_hidden_layers": 3}},
      "order": list(SECONDS),
      "stages": {
        name: {"model": "student" if name in STUDENT else "model"}
        for name in SECONDS
      },
      "rl_gain": ["cold_start", "rl"],
      "distilled": ["student_pretrain", "distill"],
    },
  )
  write_json(
    root / "run.json",
    {
      "commit": "0123456789abcdef",
      "versions": {"python": "3.11.7", "jax": "0.10.2", "rlm": "0.1.0"},
      "devices": ["cpu"],
      "command": "python -m experiments.r1 --config=configs/r1/laptop.py",
    },
  )
  return root


@pytest.fixture
def recipe(tmp_path):
  return write_recipe(tmp_path / "quickstart")
