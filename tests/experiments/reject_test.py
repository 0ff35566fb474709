"""The stage as a run: its files, and that no kill changes them."""

import json
import shutil

import jax.numpy as jnp
import pytest

from experiments import reject
from rlm import files, jsonl, stopping
from rlm.checkpoint.manager import CheckpointManager
from rlm.data.chat import load_messages
from rlm.rl import rejection
from rlm.rl.config import RejectionConfig
from tests.rl.chooser import Chooser, wrong
from tests.rl.reciter import CHAT, TASK
from tests.tiny_model import tiny_config

KEPT_FILES = ("metrics.jsonl", "traces/rejection.jsonl", "messages.jsonl")


def config(policy, **rejection_changes):
  return dict(
    stage="rejection",
    seed=3,
    init_from=str(policy),
    task=dict(
      name="column_addition",
      heldout_fraction=0.1,
      letters="abcdef",
      forget_carry=0.0,
      slip=0.0,
    ),
    rejection=dict(
      levels=(2, 3),
      problems_per_level=(4, 3),
      samples_per_problem=6,
      require_steps=False,
      keep_per_problem=2,
      problems_per_chunk=3,
    )
    | rejection_changes,
    sampling=dict(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=40),
    slots=4,
    sampling_mesh=dict(data=1, fsdp=1, expert=1, context=1, tensor=1),
    prompt_length=16,
  )


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
  """A training run's folder, as far as this stage reads it."""
  path = tmp_path_factory.mktemp("policy")
  model = tiny_config(vocab_size=272, n_vocab_used=268)
  files.write_json(
    path / "config.json", {"tokenizer": "bytes", "model": vars(model)}
  )
  with CheckpointManager(path / "checkpoints", keep=1) as manager:
    manager.save(1, {"variables": {"params": {"w": jnp.ones(2)}}})
  return path


@pytest.fixture
def chooser(monkeypatch):
  """Puts a `Chooser` in the sampler's place; its arguments are set here."""
  arguments = {}

  def sampler(model, sampling, **_):
    cfg = RejectionConfig(**config("")["rejection"])
    return Chooser(rejection.draw_problems(TASK, cfg, seed=3), **arguments)

  monkeypatch.setattr("rlm.sampling.sampler.Sampler", sampler)
  return arguments


def contents(folder):
  """Everything of a run that must not depend on kills."""
  summary = files.read_json(folder / "summary.json")
  summary.pop("seconds")
  return [summary] + [(folder / name).read_bytes() for name in KEPT_FILES]


def test_a_run_writes_its_set_and_says_what_became_of_the_samples(
  policy, chooser, tmp_path, capsys
):
  summary = reject.run(config(policy), tmp_path / "r")
  assert summary["problems"] == 7 and summary["sampled"] == 42
  assert 0 < summary["kept"] <= summary["accepted"] < summary["correct"] < 42
  assert summary["levels"]["2"]["sampled"] == 24
  chunks = jsonl.read_jsonl(tmp_path / "r" / "metrics.jsonl")
  assert [c["step"] for c in chunks] == [0, 1, 2]
  assert [c["problems"] for c in chunks] == [3, 3, 1]
  assert sum(c["kept"] for c in chunks) == summary["kept"]
  # Every line is a conversation that fine-tuning can read.
  messages = tmp_path / "r" / "messages.jsonl"
  documents = load_messages(messages, CHAT, row_length=96)
  assert len(documents) == summary["kept"]
  assert sum(sum(mask) for _, mask in documents) == summary["kept_tokens"]
  traces = jsonl.read_jsonl(tmp_path / "r" / "traces" / "rejection.jsonl")
  asked = [json.loads(line) for line in messages.read_text().splitlines()]
  assert [t["completion"] for t in traces] == [
    m["messages"][1]["content"] for m in asked
  ]
  assert all(t["correct"] and t["finished"] for t in traces)
  # At most two of a problem, the shorter first.
  by_problem = {}
  for trace in traces:
    by_problem.setdefault(trace["identity"], []).append(trace["completion"])
  assert len(by_problem) == summary["solved"]
  for said in by_problem.values():
    assert len(said) <= 2 and len(set(said)) == len(said)
    assert list(map(len, said)) == sorted(map(len, said))
  # Once more: it says so, and samples nothing.
  chooser["stop_after"] = 0
  capsys.readouterr()
  assert reject.run(config(policy), tmp_path / "r") == summary
  assert "is finished" in capsys.readouterr().out


def test_a_run_killed_anywhere_continues_to_the_same_files(
  policy, chooser, tmp_path, monkeypatch
):
  reject.run(config(policy), tmp_path / "whole")
  expected = contents(tmp_path / "whole")

  # Inside `generate`, in the middle of each chunk.
  for asked in (0, 10, 30, 41):
    chooser["stop_after"] = asked
    with pytest.raises(KeyboardInterrupt):
      reject.run(config(policy), tmp_path / f"asked_{asked}")
    chooser["stop_after"] = None
    reject.run(config(policy), tmp_path / f"asked_{asked}")
    assert contents(tmp_path / f"asked_{asked}") == expected

  # At every line of every file: before it, or with half of it written.
  write = jsonl.JsonlWriter.write
  killed_at = -1

  def torn_write(self, record):
    nonlocal killed_at
    killed_at -= 1
    if killed_at == -1:
      line = json.dumps(record).encode()
      self._file.write(line[: len(line) // 2 * (record["step"] % 2)])
      raise KeyboardInterrupt
    write(self, record)

  monkeypatch.setattr(jsonl.JsonlWriter, "write", torn_write)
  lines = sum(
    (tmp_path / "whole" / name).read_text().count("\n")
    for name in (*KEPT_FILES[:2], "timing.jsonl")
  )
  for place in range(lines):
    folder = tmp_path / f"line_{place}"
    killed_at = place
    with pytest.raises(KeyboardInterrupt):
      reject.run(config(policy), folder)
    reject.run(config(policy), folder)
    assert contents(folder) == expected, place
  killed_at = lines
  reject.run(config(policy), tmp_path / "last")  # there was no further line


def test_killed_while_the_set_is_written(
  policy, chooser, tmp_path, monkeypatch
):
  reject.run(config(policy), tmp_path / "whole")
  for name in ("messages.jsonl", "summary.json"):
    write_bytes = files.write_bytes

    def killed(path, data, name=name, write_bytes=write_bytes):
      if path.name == name:
        raise KeyboardInterrupt
      write_bytes(path, data)

    folder = tmp_path / name
    with monkeypatch.context() as patch:
      patch.setattr(files, "write_bytes", killed)
      with pytest.raises(KeyboardInterrupt):
        reject.run(config(policy), folder)
    reject.run(config(policy), folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_signal_finishes_the_chunk(policy, chooser, tmp_path):
  reject.run(config(policy), tmp_path / "whole")
  with stopping.catch_signals() as stop:
    stop.requested = True
    for chunks in (1, 2):
      with pytest.raises(stopping.Stopped, match=f"after step {chunks} "):
        reject.run(config(policy), tmp_path / "r")
    reject.run(config(policy), tmp_path / "r")  # its last chunk
  assert contents(tmp_path / "r") == contents(tmp_path / "whole")


def test_mistakes_are_told_before_anything_is_sampled(
  policy, chooser, tmp_path
):
  def refused(message, **changes):
    with pytest.raises(ValueError, match=message):
      reject.run(config(policy) | changes, tmp_path / "r")
    assert not (tmp_path / "r").exists()

  refused("unknown key 'sede'; did you mean 'seed'", sede=1)
  refused(r"there is no .*nowhere/config.json", init_from="nowhere")
  sampling = config(policy)["sampling"]
  refused("own EOS may end", sampling=sampling | {"stop_tokens": (3,)})
  refused(
    "has levels", rejection=config(policy)["rejection"] | {"levels": (2, 99)}
  )
  refused(
    "config.rejection: keep_per_problem=9 exceeds",
    rejection=config(policy)["rejection"] | {"keep_per_problem": 9},
  )


def test_another_policy_is_refused(policy, chooser, tmp_path):
  chooser["stop_after"] = 20
  with pytest.raises(KeyboardInterrupt):
    reject.run(config(policy), tmp_path / "r")
  chooser["stop_after"] = None
  moved = tmp_path / "moved"
  shutil.copytree(policy, moved)  # elsewhere, but the same weights
  with CheckpointManager(tmp_path / "other" / "checkpoints", keep=1) as manager:
    manager.save(1, {"variables": {"params": {"w": jnp.zeros(2)}}})
  shutil.copy(policy / "config.json", tmp_path / "other")
  with pytest.raises(ValueError, match="another input 'init_from'"):
    reject.run(config(tmp_path / "other"), tmp_path / "r")
  reject.run(config(moved), tmp_path / "r")


def test_a_run_that_keeps_nothing_says_so(policy, chooser, tmp_path):
  chooser["ways"] = (wrong,)
  with pytest.raises(ValueError, match=r"none of 42 samples .*42 well formed"):
    reject.run(config(policy), tmp_path / "r")
