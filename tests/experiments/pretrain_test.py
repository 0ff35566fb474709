import importlib
import json
import os
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
from rlm.models.transformer import Transformer
from tests.tiny_model import lay, tiny_config, tiny_variables

MODEL = dict(vocab_size=272, n_vocab_used=268)
ROW_LENGTH = 48
BATCH = dict(rows=8, first_rows=4, ramp_steps=3, microbatch_rows=4)
ONE = dict(data=1, fsdp=1, expert=1, context=1, tensor=1)
MESH = dict(ONE, fsdp=2, expert=2)
EVAL = dict(
  every_steps=4,
  batch_rows=4,
  use_ema=True,
  task="sums",
  levels=(2,),
  problems_per_level=3,
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
    mesh=MESH,
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
    eval=EVAL,
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
    key = (cfg.model, cfg.mesh)
    if key not in trainings:
      trainings[key] = make_training(cfg)
    return trainings[key]

  def cached_scorer(layout):
    if layout not in scorers:
      scorers[layout] = make_score_rows(layout)
    return scorers[layout]

  def random_variables(model, key, places):
    del key
    return jax.device_put(tiny_variables(model), places)

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
  return {k: v for k, v in summary.items() if k not in ("seconds", "ledger")}


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
  # Rows ramp 4, 4, 4 (not yet 6.7), 8, 8, 8, all nearly full.
  assert records[0]["tokens"] < records[5]["tokens"] <= 8 * ROW_LENGTH
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
  # On four devices; what the CPU costs is not known.
  assert summary["ledger"] == {
    "flops": summary["flops"],
    "mfu": summary["flops"] / 1e12 / summary["seconds"],
    "device_hours": 4 * summary["seconds"] / 3600,
  }
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
  def broken(model, key, places):
    del key
    variables = tiny_variables(model)
    nothing = jax.tree.map(lambda x: x * np.nan, variables["params"])
    return jax.device_put({**variables, "params": nothing}, places)

  monkeypatch.setattr(initial, "random_variables", broken)
  with pytest.raises(FloatingPointError, match="step 0: grad_norm = nan"):
    pretrain.run(config(tmp_path), tmp_path / "run", console=quiet())
  with np.load(tmp_path / "run" / "nonfinite_step_000000.npz") as batch:
    assert batch["tokens"].shape == (2, 4, ROW_LENGTH)
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


def test_parameters_go_from_one_mesh_to_another_but_a_run_stays(finished):
  """To the bit; and each device then holds its part."""
  c, folder, _ = finished
  saved = restore_part(folder / "checkpoints", "variables")
  model = Transformer(build(pretrain.Config, c).model)
  for sizes in (dict(data=2), dict(fsdp=4, tensor=2), dict(expert=4)):
    layout = lay(model, **sizes)
    found = initial.initial_variables(layout, str(folder), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    for leaf, place in zip(
      *map(jax.tree.leaves, (found, layout.shardings(found))), strict=True
    ):
      assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
  with pytest.raises(ValueError, match=r"mesh\.expert: 2 -> 1"):
    pretrain.run(c | dict(mesh=ONE), folder, console=quiet())


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
      "config.batch: first_rows=3 and rows=8 must be multiples of"
      " microbatch_rows=4",
    ),
    (
      dict(mesh=dict(MESH, data=3)),
      "batch.microbatch_rows=4 cannot be divided among the 12 parts of mesh"
      r" \(data=3 x fsdp=2 x expert=2\). Make it a multiple of them",
    ),
    (
      dict(mesh=dict(ONE, context=5)),
      "mesh.context=5 does not divide data.row_length=48",
    ),
    (
      dict(mesh=dict(ONE, data=4, context=2, tensor=2)),
      "mesh needs data=4 x fsdp=1 x expert=1 x context=2 x tensor=2 = 16"
      " devices, but jax has 8",
    ),
    (
      dict(mesh=dict(ONE, tensor=4)),
      "mesh.tensor=4 does not divide num_attention_heads=2. Make it one of 1,"
      " 2",
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
  with pytest.raises(ValueError, match="mesh.expert=2, but the model has no e"):
    distill.run(c, tmp_path / "run", console=quiet())
  c["mesh"] = dict(ONE, data=2, fsdp=2)
  summary = distill.run(c, tmp_path / "run", console=quiet())
  records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
  assert summary["loss"] < 0.8 * records[0]["loss/next_token"]
  assert "expert_load" not in records[0]
  assert records[0]["tokens"] % 13 == 0
