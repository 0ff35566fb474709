"""Metrics: a step late, exact, checked, and the same after a resume."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.jsonl import read_jsonl
from rlm.metrics import MetricsWriter, NonFiniteError, is_due
from tests.events_test import read_events


def records(folder, name="metrics"):
  return read_jsonl(folder / f"{name}.jsonl")


def open_log(folder, next_step=0, on_nonfinite="stop"):
  return MetricsWriter(folder, next_step=next_step, on_nonfinite=on_nonfinite)


def test_is_due():
  assert [step for step in range(10) if is_due(step, 4)] == [3, 7]
  assert not any(is_due(step, 0) for step in range(10))


def test_records_hold_exact_values_in_stable_order(tmp_path):
  loss = jnp.float32(1) / 3
  load = jax.random.uniform(jax.random.key(0), (2, 3))
  with open_log(tmp_path) as log:
    log.push(
      0,
      {
        "loss": loss,
        "expert_load": load,
        "accuracy": 0.1,
        "tokens": np.int64(7),
        "bf16": jnp.asarray([0.1, 2], jnp.bfloat16),
        "kl": None,
      },
    )
  (record,) = records(tmp_path)
  assert list(record) == [
    "step", "accuracy", "bf16", "expert_load", "kl", "loss", "tokens",
  ]  # fmt: skip
  assert np.float32(record["loss"]) == loss
  np.testing.assert_array_equal(np.float32(record["expert_load"]), load)
  assert record["accuracy"] == 0.1 and record["tokens"] == 7
  assert record["bf16"] == [0.10009765625, 2.0] and record["kl"] is None


def test_a_step_is_written_when_the_next_is_pushed(tmp_path):
  with open_log(tmp_path) as log:
    log.push(0, {"loss": jnp.float32(5)})
    assert records(tmp_path) == [] and log.figures("loss") == {}
    log.push(1, {"loss": jnp.float32(4), "list": jnp.ones(2)})
    assert [r["step"] for r in records(tmp_path)] == [0]
    assert log.figures("loss", "absent") == {"loss": 5.0}
    log.flush()
    assert [r["step"] for r in records(tmp_path)] == [0, 1]
    assert log.figures("loss", "list") == {"loss": 4.0}


def test_pushes_of_one_step_make_one_record(tmp_path):
  with open_log(tmp_path) as log:
    log.push(3, {"loss": 1.0})
    log.push(3, {"heldout": 2.0}, timing={"evaluate_seconds": 9.0})
    log.push(4, {"loss": 3.0})
  assert records(tmp_path)[0] == {"step": 3, "heldout": 2.0, "loss": 1.0}
  assert records(tmp_path, "timing")[0]["evaluate_seconds"] == 9.0


def test_mistakes_of_the_loop_are_named(tmp_path):
  with open_log(tmp_path, next_step=2) as log:
    with pytest.raises(ValueError, match="step 1 came after step 1"):
      log.push(1, {})
    log.push(2, {"loss": 1.0})
    with pytest.raises(ValueError, match="metric 'loss' was pushed twice"):
      log.push(2, {"loss": 1.0})
    with pytest.raises(ValueError, match="metric 'step' was pushed twice"):
      log.push(2, {"step": 1.0})
    log.flush()
    with pytest.raises(ValueError, match="step 2 came after step 2"):
      log.push(2, {"other": 1.0})
  with pytest.raises(ValueError, match="must be 'stop' or 'skip', got 'warn'"):
    open_log(tmp_path, on_nonfinite="warn")


def push_steps(log, steps):
  for step in steps:
    x = jax.random.uniform(jax.random.key(step), (3,))
    log.push(step, {"loss": x[0], "list": x}, tokens=10)
    if is_due(step, 4):
      log.flush()


@pytest.mark.parametrize("restored", [0, 4, 8])
def test_a_resumed_file_is_equal_to_the_bit(tmp_path, restored):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  with open_log(whole) as log:
    push_steps(log, range(12))
  log = open_log(killed)
  push_steps(log, range(11))
  log.close()  # as a kill: step 10 was never flushed
  with open(killed / "metrics.jsonl", "a") as file:
    file.write('{"step": 10, "li')
  with open_log(killed, next_step=restored) as log:
    push_steps(log, range(restored, 12))
  a, b = (folder / "metrics.jsonl" for folder in (whole, killed))
  assert a.read_bytes() == b.read_bytes()
  assert [r["step"] for r in records(killed, "timing")] == list(range(12))


def test_time_stays_out_of_the_metrics(tmp_path):
  with open_log(tmp_path) as log:
    for step in range(3):
      log.push(step, {"loss": 1.0}, tokens=100)
      with log.paused():
        pass
  assert all(set(r) == {"step", "loss"} for r in records(tmp_path))
  timing = records(tmp_path, "timing")
  assert all(r["seconds"] >= 0 for r in timing)
  assert timing[1]["tokens_per_second"] == 100 / timing[1]["seconds"]
  assert timing[1]["paused_seconds"] > 0


def test_seconds_of_earlier_processes_count(tmp_path):
  (tmp_path / "timing.jsonl").write_text(
    '{"step": 0, "seconds": 100.0}\n'
    '{"step": 1, "seconds": 20.0, "paused_seconds": 5.0}\n'
    '{"step": 2, "seconds": 7000.0}\n'
  )
  with open_log(tmp_path, next_step=2) as log:
    assert 125.0 <= log.total_seconds < 1000.0


BATCH = {"tokens": np.arange(6).reshape(2, 3), "aux": [np.ones(2)]}


def test_a_nonfinite_step_stops_with_its_batch(tmp_path):
  with open_log(tmp_path) as log:
    log.push(11, {"loss": jnp.float32(1), "nonfinite": jnp.int32(0)})
    metrics = {"loss": jnp.float32(jnp.nan), "nonfinite": jnp.int32(1)}
    log.push(12, metrics, batch=BATCH)
    with pytest.raises(
      NonFiniteError,
      match=r"step 12: loss = nan\. The update was masked.*on_nonfinite='skip'"
      r".*The batch is in .*nonfinite_step_000012\.npz",
    ) as caught:
      log.push(13, {"loss": jnp.float32(1)}, batch={"tokens": np.zeros(1)})
  assert (caught.value.step, caught.value.metric) == (12, "loss")
  with np.load(tmp_path / "nonfinite_step_000012.npz") as saved:
    np.testing.assert_array_equal(saved["tokens"], BATCH["tokens"])
    np.testing.assert_array_equal(saved["aux.0"], BATCH["aux"][0])
  assert [r["step"] for r in records(tmp_path)] == [11]


def test_flush_refuses_a_nonfinite_last_step(tmp_path):
  with open_log(tmp_path) as log:
    log.push(0, {"loss": 1.0, "list": jnp.array([1, jnp.inf])})
    with pytest.raises(
      NonFiniteError, match=r"step 0: list = .*did not mask it"
    ):
      log.flush()


def test_a_masked_step_alone_stops_too(tmp_path):
  with open_log(tmp_path) as log:
    log.push(0, {"loss": 1.0, "nonfinite": 1})
    with pytest.raises(NonFiniteError, match="step 0: nonfinite = 1"):
      log.flush()


def test_skip_records_masked_steps_and_goes_on(tmp_path):
  with open_log(tmp_path, on_nonfinite="skip") as log:
    log.push(0, {"loss": jnp.float32(jnp.nan), "nonfinite": 1}, batch=BATCH)
    log.push(1, {"loss": jnp.float32(2), "nonfinite": 0})
  text = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(text[0]) == {"step": 0, "loss": None, "nonfinite": 1}
  assert json.loads(text[1])["loss"] == 2.0
  assert not list(tmp_path.glob("*.npz"))


def test_skip_stops_at_what_nobody_masked(tmp_path):
  with open_log(tmp_path, on_nonfinite="skip") as log:
    log.push(0, {"kl": jnp.float32(jnp.inf), "nonfinite": 0})
    with pytest.raises(NonFiniteError, match=r"step 0: kl = inf\. .*not set"):
      log.flush()


def test_tensorboard_gets_scalars_and_flat_lists(tmp_path):
  with open_log(tmp_path) as log:
    log.push(0, {"loss": 1.5, "load": jnp.ones(2), "nested": jnp.ones((2, 2))})
  (path,) = (tmp_path / "tensorboard").iterdir()
  (event,) = (e for e in read_events(path) if e.summary.value)
  tags = {value.tag: value.simple_value for value in event.summary.value}
  assert event.step == 0
  assert tags["loss"] == 1.5 and tags["load/1"] == 1.0
  assert "timing/seconds" in tags
  assert not any(tag.startswith("nested") for tag in tags)
