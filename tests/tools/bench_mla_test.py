"""The benchmark of latent attention: bounds by hand, every way, untimed."""

import dataclasses
import json
import re
import time

import jax
import jax.numpy as jnp
import pytest

from tools import bench_mla as bench
from tools import journal, measured, mla_figures, mla_on_gpu
from tools.mla_cases import LITE, V3, Attention, Decode, Sizes, Way, Work
from tools.mla_checks import check

RATES = measured.Rates(1e9, {"float32": 1e9, "bfloat16": 1e9})
SMALL = Sizes(2, 128, 16, 8, 16)
TRAIN = Attention("train", SMALL, 1, 8)
DECODE = Decode(SMALL, 2, 64)
PASSES = {"passes": True, "errors": {}}


@pytest.fixture(autouse=True)
def short(monkeypatch):
  """No rate is measured, and no sample lasts."""
  monkeypatch.setattr(mla_figures, "measured_rates", lambda *_, **__: RATES)
  monkeypatch.setattr(measured, "_SAMPLE_SECS", 0.0)
  monkeypatch.setattr(mla_figures, "sets_of", lambda _: 2)


def test_bounds_of_decoding():
  """2 x 1024 tokens of 1152 bytes or 656; 16 queries of 576 and outputs of 512
  numbers a row."""
  vectors = 2 * 16 * (576 + 512) * 2
  plain = Decode(LITE, 2, 1024)
  assert plain.work == Work(2 * 1024 * 1152 + vectors, 71_303_168)
  assert plain.work.nbytes == 2_428_928
  assert Decode(LITE, 2, 1024, "paged").work == plain.work
  assert Decode(LITE, 2, 1024, "float8").work.nbytes == 1_343_488 + vectors
  work = Decode(V3, 1, 2**17).work
  assert work.flops / work.nbytes == pytest.approx(242, rel=0.01)
  expanded = plain.ways()["cudnn, expanded"].work
  assert expanded.nbytes == 2 * 1024 * 16 * 320 * 2 + 2 * 16 * 320 * 2
  assert expanded.flops == 2 * 2 * 16 * 1024 * 320


def test_bounds_of_training():
  """4 tokens see 10 pairs for each of 2 heads; keys have 24 numbers, values 16.

  A token has 2 (24 + 16 + 16) + 8 = 120 numbers of operands and 32 of output,
  and 2 log-sum-exps.
  """
  sizes = Sizes(2, 32, 16, 8, 16)
  train = Attention("train", sizes, 1, 4)
  assert train.forward.work == Work(4 * (152 * 2 + 8), 1600)
  assert train.work == Work(4 * (3 * 152 * 2 + 16), 1600 + 4160)
  published = Attention("train", V3, 1, 1).work
  assert published.flops == 128 * 2 * (4 * 192 + 3 * 128)


def test_figures_are_medians_beside_both_bounds():
  record = mla_figures.figures(
    [3e-3, 1e-3, 2e-3], Work(10**6, 5 * 10**5), "float32", RATES
  )
  assert record["ms"] == pytest.approx(2)
  assert record["bytes_ms"] == pytest.approx(1)
  assert record["flops_ms"] == pytest.approx(0.5)
  assert record["share"] == pytest.approx(0.5)


@pytest.mark.parametrize("cache", ["plain", "paged", "float8"])
def test_every_cache_gives_what_it_must(cache):
  case = Decode(SMALL, 2, 64, cache)
  names = {
    "plain": ("jax.nn xla, latents", "jax.nn xla, expanded"),
    "paged": ("xla",),
    "float8": ("xla",),
  }[cache]
  for name in names:
    result = check(case.ways()[name])
    assert result["passes"], (name, result)


@pytest.mark.parametrize("factor", [1.1, jnp.nan])
def test_wrong_results_do_not_pass(factor):
  def make(key):
    return jax.random.normal(key, (4,), "bfloat16"), None

  def right(x, _):
    return {"out": x + 1}

  def wrong(x, _):
    return {"out": (x + 1) * factor}

  way = Way(make, right, right, Work(1, 1), 0)
  assert check(way)["passes"]
  assert not check(dataclasses.replace(way, run=wrong))["passes"]


def test_backward_is_training_less_forward():
  book = journal.Journal(None)
  for case, ms in ((TRAIN, 3.0), (TRAIN.forward, 1.0)):
    record = {"case": case.name, "way": "xla", "status": "ok", "ms": ms}
    book.put(f"{case.name} | xla", record)
  mla_figures.add_backward(TRAIN, book, rates=RATES)
  backward = book.records["backward 1 x 8, 2 heads, bfloat16 | xla"]
  assert backward["ms"] == pytest.approx(2)
  assert backward["flops"] == 36 * 2 * 2 * (3 * 24 + 2 * 16)


def test_one_that_raises_is_recorded_and_the_others_go_on(
  tmp_path, monkeypatch, capsys
):
  output = tmp_path / "mla.json"
  cases = [TRAIN.forward, DECODE]
  monkeypatch.setattr(bench, "CPU_CASES", cases)
  only = "xla$|tokamax|splash"
  assert bench.main(["--rounds=1", f"--output={output}", f"--only={only}"]) == 0
  records = json.loads(output.read_text())["records"]
  for case in cases:
    for name in case.ways():
      if re.search(only, name):
        fails = re.search("tokamax|splash", name)
        record = records[f"{case.name} | {name}"]
        assert record["status"] == ("raised" if fails else "ok")
        assert ("ms" in record) == (not fails)
  tokamax = records[f"{DECODE.name} | tokamax, expanded"]
  assert tokamax["status"] == "raised"
  assert "tokamax is not installed" in tokamax["message"]
  printed = capsys.readouterr().out
  assert "splash attention is a kernel for TPU" in printed
  assert DECODE.name in printed


def test_gpu_without_one_is_refused(tmp_path, capfd):
  output = tmp_path / "mla.json"
  assert bench.main(["--gpu", f"--output={output}"]) == journal.REFUSED
  assert "--gpu, but jax runs on cpu" in capfd.readouterr().err
  assert not output.exists()


def on_gpu(book, until=None, cases=(TRAIN, DECODE), only=""):
  until = time.time() + 1e6 if until is None else until
  small = [TRAIN, DECODE]
  mla_on_gpu.on_gpu(small, cases, book, rounds=1, only=only, until=until)


def test_what_fails_its_check_is_not_timed_and_what_is_known_not_again(
  tmp_path,
):
  path, only = str(tmp_path / "mla.json"), "train.*(jax.nn xla|tokamax)$"
  on_gpu(journal.Journal(path), only=only)
  records = journal.Journal(path, resume=True).records
  assert records[f"{TRAIN.name} | jax.nn xla"]["ms"] > 0
  assert records[f"check {TRAIN.kind} | jax.nn xla"]["passes"]
  skipped = records[f"{TRAIN.name} | tokamax"]
  assert skipped["status"] == "skipped"
  assert "tokamax is not installed" in skipped["message"]
  book = journal.Journal(path, resume=True)
  on_gpu(book, only=only)
  assert book.records == records


def test_time_that_is_up_is_told(capsys, monkeypatch):
  monkeypatch.setattr(mla_on_gpu, "check", lambda _: PASSES)
  book = journal.Journal(None)
  on_gpu(book, until=0, only="xla")
  assert "time is up: 5 figures are missing" in capsys.readouterr().out


def test_who_took_the_process_down_is_not_tried_again(tmp_path, monkeypatch):
  monkeypatch.setattr(mla_on_gpu, "check", lambda _: PASSES)
  path = str(tmp_path / "mla.json")
  book = journal.Journal(path)
  job = f"{DECODE.name} | xla"
  book.together([job, f"{DECODE.name} | reference"])
  book = journal.Journal(path, resume=True)
  assert book.suspects == {job, f"{DECODE.name} | reference"}
  jobs = [(DECODE, name, DECODE.ways()[name]) for name in ("xla", "reference")]
  assert [len(b) for b in mla_on_gpu._batches(jobs, book.suspects)] == [1, 1]
  assert [len(b) for b in mla_on_gpu._batches(jobs, set())] == [2]
  book.put(job, {"case": DECODE.name, "way": "xla", "status": "started"})
  book = journal.Journal(path, resume=True)
  on_gpu(book, cases=[DECODE], only="plain [|] (xla|reference)")
  assert book.records[job]["status"] == "died"
  assert book.records[f"{DECODE.name} | reference"]["status"] == "ok"


def test_a_process_that_gets_further_is_started_again(tmp_path, monkeypatch):
  path = tmp_path / "mla.json"
  statuses = iter([1, 3, 3, 0])

  class Done:
    def __init__(self, *_, **__):
      self.returncode = next(statuses)
      if self.returncode == 1:
        path.write_text("figures")

  monkeypatch.setattr(journal.subprocess, "run", Done)
  assert journal.persist("tools.bench_mla", [], str(path), {}) == 3
  assert list(statuses) == [3, 0]  # the second left what the first did


def draw(key):
  return jax.random.normal(key, (4,)), jnp.ones(4)


def add(new, shared):
  return {"out": new + shared}


def test_calls_of_a_gpu_are_one_program(monkeypatch):
  monkeypatch.setattr(measured, "backend", lambda: "gpu")
  program = measured.lower(draw, add, calls=3).compile().program()
  results = program.dispatch()
  assert program.calls == len(results) == 3
  a, b, _ = (x["out"] for x in results)
  assert not jnp.array_equal(a, b)  # each reads something new


def test_what_does_not_fit_is_refused(monkeypatch):
  class Device:
    def memory_stats(self):
      return {"bytes_limit": 10}

  stage = measured.lower(draw, add, calls=1).compile()
  monkeypatch.setattr(measured.jax, "devices", lambda: [Device()])
  with pytest.raises(MemoryError, match="GB"):
    stage.program()


def test_rates_are_of_this_machine():
  assert measured.read_bandwidth(nbytes=2**20, rounds=1) > 0
  assert measured.matmul_rate("float32", sizes=(8, 16), rounds=1) > 0
