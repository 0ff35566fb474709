import importlib
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
import rich.console

from experiments import distill, pretrain, sft
from rlm import stopping, train
from rlm.checkpoint import initial
from rlm.checkpoint.manager import restore_part
from rlm.config import build, plain
from rlm.eval import heldout
from rlm.jsonl import read_jsonl
from rlm.optim.config import ScheduleConfig
from rlm.optim.schedule import batch_rows
from tests.tiny_model import tiny_config, tiny_variables

MODEL = dict(vocab_size=272, n_vocab_used=268)
ROW_LENGTH = 48
BATCH = dict(
  rows=4, first_rows=2, ramp_steps=3, microbatch_rows=2, training_devices=2
)


def load(path):
  """A config file's data, as plain dicts."""
  module = path.removesuffix(".py").replace("/", ".")
  return plain(importlib.import_module(module).get_config())


def config(tmp_path, **changes):
  """Six steps of everything: ramp, EMA, mixed sources, scheduled weights."""
  texts = tmp_path / "texts"
  if not texts.exists():
    texts.mkdir()
    for i in range(6):
      words = " ".join(f"word{(i * j) % 7}" for j in range(40))
      (texts / f"{i}.txt").write_text(words)
  c = load("configs/pretrain/laptop.py")
  c["model"] = {
    name: getattr(tiny_config(**MODEL), name) for name in c["model"]
  }
  c["data"] = dict(
    row_length=ROW_LENGTH,
    packing_window=64,
    heldout_rows=4,
    sources=dict(
      texts=dict(
        kind="text",
        weight=1.0,
        layout="cross_document",
        heldout_fraction=0.3,
        fim_rate=0.5,
        path=str(texts),
        suffixes=(".txt",),
      ),
      sums=dict(
        c["data"]["sources"]["sums"],
        documents=50,
        heldout_documents=4,
        levels=(2,),
      ),
    ),
  )
  c |= dict(
    steps=6,
    batch=BATCH,
    mtp_weight=dict(
      peak=0.3,
      phases=(
        dict(shape="constant", steps=3, factor=1.0),
        dict(shape="constant", steps=1, factor=0.5),
      ),
    ),
    optimizer=dict(c["optimizer"], muon=None),  # compiles faster
    ema_decay=0.9,
    checkpoint_every_steps=3,
    peak_flops=1e12,
    eval=dict(
      every_steps=4,
      batch_rows=4,
      use_ema=True,
      task="sums",
      levels=(2,),
      problems_per_level=3,
    ),
  )
  return c | changes


@pytest.fixture(scope="module", autouse=True)
def compile_once():
  """Runs of one model share what they compile, which is most of their time."""
  make_training, make_score_rows = (
    pretrain.make_training,
    heldout.make_score_rows,
  )
  trainings, scorers = {}, {}

  def cached_training(cfg):
    if cfg.model not in trainings:
      trainings[cfg.model] = make_training(cfg)
    return trainings[cfg.model]

  def cached_scorer(model):
    return scorers.setdefault(model.cfg, make_score_rows(model))

  def random_variables(model, key):
    del key
    return tiny_variables(model)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pretrain, "make_training", cached_training)
    patch.setattr(heldout, "make_score_rows", cached_scorer)
    patch.setattr(initial, "random_variables", random_variables)
    yield


@pytest.fixture(scope="module")
def scored():
  """The variables that runs were evaluated with, in order."""
  return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scored):
  """(config, folder, summary) of a run that nothing disturbed."""
  bits_per_byte = heldout.bits_per_byte

  def recording(score_rows, variables, rows):
    scored.append(jax.device_get(variables))
    return bits_per_byte(score_rows, variables, rows)

  tmp_path = tmp_path_factory.mktemp("finished")
  c = config(tmp_path)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(heldout, "bits_per_byte", recording)
    summary = pretrain.run(c, tmp_path / "run", console=quiet())
  return c, tmp_path / "run", summary


def quiet():
  return rich.console.Console(quiet=True)


def without_clock(summary):
  return {k: v for k, v in summary.items() if k != "seconds"}


def results(folder):
  """Everything of a finished run that a clock does not write."""
  summary = without_clock(json.loads((folder / "summary.json").read_text()))
  state = {
    name: restore_part(folder / "checkpoints", name)
    for name in ("step", "variables", "opt_state", "ema")
  }
  return (folder / "metrics.jsonl").read_bytes(), summary, state


def disturb(monkeypatch, *, at, what):
  """Calls `what` before step `at` of this process; returns the steps begun."""
  begun = []

  def split_microbatches(batch, **sizes):
    begun.append(None)
    if len(begun) == at:
      what()
    return SPLIT(batch, **sizes)

  monkeypatch.setattr(train, "split_microbatches", split_microbatches)
  return begun


SPLIT = train.split_microbatches


def die():
  raise KeyboardInterrupt


def test_a_run_reports_what_it_did(finished):
  _, folder, summary = finished
  records = read_jsonl(folder / "metrics.jsonl")
  assert [r["step"] for r in records] == list(range(6))
  assert summary["tokens"] == sum(r["tokens"] for r in records)
  # Rows ramp 2, 2, 2 (not yet 3.3), 4, 4, 4, all nearly full.
  assert records[0]["tokens"] < records[5]["tokens"] <= 4 * ROW_LENGTH
  evaluated = [r["step"] for r in records if "level/2/worked_accuracy" in r]
  assert evaluated == [3, 5]
  last = records[-1]
  for name in ("loss", "loss/next_token", "loss/mtp", "loss/balance"):
    assert np.isfinite(last[name])
  weight = [0.3, 0.3, 0.3, 0.15, 0.15, 0.15]
  for record, mtp_weight in zip(records, weight, strict=True):
    np.testing.assert_allclose(
      record["loss"],
      record["loss/next_token"]
      + mtp_weight * record["loss/mtp"]
      + 1e-4 * record["loss/balance"],
      rtol=1e-5,
    )
  assert len(last["expert_load"][0]) == 4
  assert set(summary["heldout"]) == {"texts", "sums"}
  texts = summary["heldout"]["texts"]
  assert texts["bits_per_byte"] == last["heldout/texts/bits_per_byte"]
  assert 0 < texts["bigram_bits_per_byte"] < texts["unigram_bits_per_byte"] < 8
  assert summary["heldout"]["sums"]["unigram_bits_per_byte"] is None
  assert summary["worked_accuracy"] == {"2": last["level/2/worked_accuracy"]}
  timing = read_jsonl(folder / "timing.jsonl")
  assert all(t["tokens_per_second"] > 0 and t["mfu"] > 0 for t in timing)
  np.testing.assert_allclose(
    summary["flops"] / summary["tokens"],
    timing[-1]["mfu"] * 1e12 / timing[-1]["tokens_per_second"],
    rtol=1e-6,
  )
  inputs = json.loads((folder / "run.json").read_text())["inputs"]
  assert len(inputs["data"]["texts"]["train"]["sha256"]) == 64


def test_the_average_is_scored_and_not_the_last_weights(finished, scored):
  _, folder, _ = finished
  average, last = (
    restore_part(folder / "checkpoints", name) for name in ("ema", "variables")
  )
  jax.tree.map(np.testing.assert_array_equal, scored[-1]["params"], average)
  jax.tree.map(
    np.testing.assert_array_equal, scored[-1]["router"], last["router"]
  )
  assert initial.digest(average) != initial.digest(last["params"])


def test_a_run_killed_and_stopped_repeats_to_the_bit(
  finished, tmp_path, monkeypatch
):
  c, reference, _ = finished
  folder = tmp_path / "run"
  # Dies in step 4; the checkpoint is of 3 steps, the log may hold 4.
  disturb(monkeypatch, at=5, what=die)
  with pytest.raises(KeyboardInterrupt):
    pretrain.run(c, folder, console=quiet())
  # Goes on from step 3 and is asked to stop in step 4.
  disturb(monkeypatch, at=2, what=lambda: os.kill(os.getpid(), signal.SIGTERM))
  with pytest.raises(stopping.Stopped, match="pretrain stopped after step 5"):
    pretrain.run(c, folder, console=quiet())
  begun = disturb(monkeypatch, at=0, what=die)
  pretrain.run(c, folder, console=quiet())
  assert len(begun) == 1  # the last step alone

  metrics, summary, state = results(folder)
  expected_metrics, expected_summary, expected_state = results(reference)
  assert metrics == expected_metrics
  assert summary == expected_summary
  jax.tree.map(np.testing.assert_array_equal, state, expected_state)


def test_a_loss_that_is_not_finite_stops_with_its_batch(tmp_path, monkeypatch):
  def broken(model, key):
    del key
    return jax.tree.map(lambda x: x * np.nan, tiny_variables(model))

  monkeypatch.setattr(initial, "random_variables", broken)
  with pytest.raises(FloatingPointError, match="step 0: grad_norm = nan"):
    pretrain.run(config(tmp_path), tmp_path / "run", console=quiet())
  with np.load(tmp_path / "run" / "nonfinite_step_000000.npz") as batch:
    assert batch["tokens"].shape == (2, 2, ROW_LENGTH)
  assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_finished_run_says_so(finished, tmp_path):
  c, folder, summary = finished
  out = tmp_path / "out.txt"
  with out.open("w") as file:
    again = pretrain.run(
      c, folder, console=rich.console.Console(file=file, width=200)
    )
  assert again == summary
  assert "is finished" in out.read_text()


def test_the_start_may_move_but_not_change(finished, tmp_path, monkeypatch):
  _, folder, _ = finished
  conversations = tmp_path / "conversations.jsonl"
  messages = [
    {"role": "user", "content": "word1 word2"},
    {"role": "assistant", "content": "<think>a</think><answer>b</answer>"},
  ]
  conversations.write_text((json.dumps({"messages": messages}) + "\n") * 3)
  c = config(tmp_path, init_from=str(folder), stage="cold_start")
  c["data"]["sources"]["traces"] = dict(
    kind="messages", weight=3.0, layout="isolated", path=str(conversations)
  )
  summary = sft.run(c, tmp_path / "sft", console=quiet())
  assert summary["stage"] == "cold_start"
  first = read_jsonl(tmp_path / "sft" / "metrics.jsonl")[0]
  # It goes on from trained weights, not from random ones.
  start = read_jsonl(folder / "metrics.jsonl")
  assert first["loss/next_token"] < start[0]["loss/next_token"]

  # Dead before its first checkpoint, it must find the same weights again.
  moved = tmp_path / "moved"
  disturb(monkeypatch, at=1, what=die)
  with pytest.raises(KeyboardInterrupt):
    sft.run(c, moved, console=quiet())
  disturb(monkeypatch, at=0, what=die)
  c["init_from"] = str(tmp_path / "sft")
  with pytest.raises(ValueError, match="began with another input 'init_from'"):
    sft.run(c, moved, console=quiet())
  shutil.copytree(folder, tmp_path / "copy")
  c["init_from"] = str(tmp_path / "copy")
  assert without_clock(sft.run(c, moved, console=quiet())) == (
    without_clock(summary)
  )


def test_a_start_of_another_model_is_refused(finished, tmp_path):
  _, folder, _ = finished
  c = config(tmp_path, init_from=str(folder))
  c["model"]["rope_theta"] = 50.0  # no array tells
  with pytest.raises(ValueError, match=r"rope_theta: 100.0 -> 50.0"):
    sft.run(c, tmp_path / "a", console=quiet())
  c = config(tmp_path, init_from=str(tmp_path / "nowhere"))
  with pytest.raises(ValueError, match="nowhere"):
    sft.run(c, tmp_path / "b", console=quiet())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(steps=0), "steps=0 must be at least 1"),
    (
      dict(batch=dict(BATCH, first_rows=3)),
      "config.batch: first_rows=3 and rows=4 must be multiples of"
      " microbatch_rows=2",
    ),
    (
      dict(batch=dict(BATCH, training_devices=3)),
      "config.batch: microbatch_rows=2 cannot be divided among 3 devices. Make"
      " it a multiple of training_devices",
    ),
    (
      dict(
        batch=dict(
          rows=9,
          first_rows=9,
          ramp_steps=0,
          microbatch_rows=9,
          training_devices=9,
        )
      ),
      "batch.training_devices=9, but jax has 8 devices",
    ),
    (dict(ema_decay=None), "eval.use_ema needs averaged weights"),
    (dict(tasks={}), "eval.task='sums' is not among the tasks"),
    (dict(tokenizer="nowhere"), "nowhere"),
    (dict(stepz=1), "unknown key 'stepz'; did you mean 'steps'"),
  ],
)
def test_mistakes_are_named_before_anything_is_done(tmp_path, changes, message):
  c = config(tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    pretrain.run(c, tmp_path / "run", console=quiet())
  assert not (tmp_path / "run").exists()


def test_sizes_that_do_not_fit_are_named(tmp_path):
  c = config(tmp_path)
  c["data"]["row_length"] = 65
  with pytest.raises(ValueError, match="exceeds model.max_position_embeddings"):
    pretrain.run(c, tmp_path / "run", console=quiet())
  c = config(tmp_path)
  c["model"]["n_vocab_used"] = 200
  with pytest.raises(ValueError, match="uses 268 ids"):
    pretrain.run(c, tmp_path / "run", console=quiet())


def test_fine_tuning_refuses_what_is_not_fine_tuning(tmp_path):
  c = config(tmp_path)
  with pytest.raises(ValueError, match="fine-tuning starts from a run"):
    sft.run(c, tmp_path / "run", console=quiet())
  c = config(tmp_path, init_from="runs/any")
  c["data"]["sources"]["sums"]["layout"] = "cross_document"
  with pytest.raises(ValueError, match="sums.layout='cross_document'"):
    sft.run(c, tmp_path / "run", console=quiet())


def test_distillation_wants_a_dense_student_and_traces(tmp_path):
  c = config(tmp_path)
  with pytest.raises(ValueError, match="leaves 1 layers with experts"):
    distill.run(c, tmp_path / "run", console=quiet())
  c["model"]["first_k_dense_replace"] = 2
  with pytest.raises(ValueError, match="add one of kind 'messages'"):
    distill.run(c, tmp_path / "run", console=quiet())


def test_a_dense_student_learns_from_traces(tmp_path):
  c = load("configs/distill/laptop.py") | dict(
    {
      key: value
      for key, value in config(tmp_path).items()
      if key not in ("model", "mtp_weight", "schedule")
    },
    init_from=None,
  )
  c["model"] |= dict(hidden_size=16, num_hidden_layers=1)
  c["model"]["first_k_dense_replace"] = 1
  traces = tmp_path / "traces.jsonl"
  messages = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "<think>2</think><answer>2</answer>"},
  ]
  traces.write_text(json.dumps({"messages": messages}) + "\n")
  c["data"]["sources"] = dict(
    traces=dict(
      kind="messages", weight=1.0, layout="isolated", path=str(traces)
    )
  )
  c["schedule"]["peak"] = 0.05
  summary = distill.run(c, tmp_path / "run", console=quiet())
  records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
  assert summary["loss"] < 0.8 * records[0]["loss/next_token"]
  assert "expert_load" not in records[0]
  assert records[0]["tokens"] % 13 == 0


@pytest.mark.parametrize(
  "path",
  [f"configs/pretrain/{n}.py" for n in ("deepseek_v3", "deepseek_v2_lite")],
)
def test_the_large_configs_go_through_a_step_by_its_shapes(path):
  """Nothing of the 671B is computed."""
  cfg = build(pretrain.Config, load(path))
  model, start, step = pretrain.make_training(cfg)
  state = jax.eval_shape(start, initial.shapes(model))
  b = cfg.batch
  lead = (b.rows // b.microbatch_rows, b.microbatch_rows)
  row = jax.ShapeDtypeStruct((*lead, cfg.data.row_length), np.int32)
  batch = dict.fromkeys(("tokens", "positions", "segment_ids"), row)
  batch["loss_mask"] = jax.ShapeDtypeStruct(row.shape, np.bool_)
  batch["num_live"] = jax.ShapeDtypeStruct((), np.int32)
  batch |= pretrain.make_rates(cfg)(0)
  after, metrics = jax.eval_shape(step, state, batch, jax.random.key(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert metrics["loss"].shape == ()


def test_schedules_of_the_large_configs_end_with_their_steps():
  for name in ("deepseek_v3", "deepseek_v2_lite"):
    cfg = build(pretrain.Config, load(f"configs/pretrain/{name}.py"))
    for schedule in (cfg.schedule, cfg.mtp_weight, cfg.bias_update_rate):
      if isinstance(schedule, ScheduleConfig):
        assert sum(p.steps for p in schedule.phases) == cfg.steps
    rows = [
      batch_rows(
        step,
        first_rows=cfg.batch.first_rows,
        last_rows=cfg.batch.rows,
        ramp_steps=cfg.batch.ramp_steps,
        multiple=cfg.batch.microbatch_rows,
      )
      for step in range(cfg.batch.ramp_steps + 1)
    ]
    tokens = (sum(rows[:-1]) + (cfg.steps - len(rows) + 1) * rows[-1]) * 4096
    trained_on = {"deepseek_v3": 14.8e12, "deepseek_v2_lite": 5.7e12}[name]
    assert abs(tokens / trained_on - 1) < 0.002


def test_configs_of_fine_tuning_pass_its_checks():
  for path in pathlib.Path("configs/sft").glob("*.py"):
    c = load(str(path))
    if (
      c["init_from"] is not None
    ):  # else the sizes are those of a model to come
      sft.check(build(sft.Config, c))
  for path in pathlib.Path("configs/distill").glob("*.py"):
    distill.check(build(distill.Config, load(str(path))))
