"""Figures of the cases in `tools/mla_cases`: timed, beside their bounds."""

import os
import statistics
from collections.abc import Iterable, Mapping
from concurrent import futures
from typing import Any

import jax

from rlm.kernels.backend import backend, chip
from tools import interleave
from tools.journal import Journal, Record, attempt, message_of
from tools.measured import Rates, Stage, lower, measure, measured_rates
from tools.mla_cases import (
  Attention,
  Decode,
  Way,
  Work,
  sets_of,
  stays_cached,
)

Case = Attention | Decode
# By the names of their records.
Compiled = Mapping[str, "futures.Future[Stage]"]


def lowered(way: Way) -> Stage:
  """A way on its way to be timed, with as many caches as it takes."""
  return lower(way.make, way.run, calls=sets_of(way.work))


def job_of(case: Case, way: str) -> str:
  """The name of a record."""
  return f"{case.name} | {way}"


def figures(secs: list[float], work: Work, dtype: str, rates: Rates) -> Record:
  """Milliseconds of the median and of the two bounds; the larger's share."""
  ms = 1e3 * statistics.median(secs)
  bytes_ms = 1e3 * work.nbytes / rates.read
  flops_ms = 1e3 * work.flops / rates.matmul[dtype]
  return {
    "ms": ms,
    "bytes_ms": bytes_ms,
    "flops_ms": flops_ms,
    "share": max(bytes_ms, flops_ms) / ms,
    "bytes": work.nbytes,
    "flops": work.flops,
    "rounds_ms": [1e3 * s for s in secs],
  }


def time_case(
  case: Case,
  ways: dict[str, Way],
  journal: Journal,
  *,
  rates: Rates,
  rounds: int,
  remarks: Record | None = None,
  compiled: Compiled | None = None,
) -> None:
  """Measures ways of a case in turn, and records each.

  One that cannot be prepared is recorded with its message; the others go on.

  Args:
    case: what its ways compute.
    ways: by name.
    journal: where.
    rates: for the bounds.
    rounds: samples of each way.
    remarks: that go into each record.
    compiled: those that are, by the names of their records.
  """
  programs: dict[str, Any] = {}
  about = {}
  for name, way in ways.items():
    calls = sets_of(way.work)
    about[name] = {
      "case": case.name,
      "way": name,
      "caches": calls,
      "stays_cached": isinstance(case, Decode) and stays_cached(way.work),
    } | (remarks or {})

    def prepare(name=name, way=way, calls=calls):
      ahead = (compiled or {}).get(job_of(case, name))
      stage = ahead.result() if ahead else lowered(way).compile()
      program = stage.program()
      jax.block_until_ready(program.dispatch())
      programs[name] = program
      return {"status": "started"}  # its figures are yet to come

    attempt(journal, job_of(case, name), about[name], prepare)
  try:
    measured = measure(programs, rounds=rounds)
  except Exception as error:  # a runtime's, of any kind
    why = {"status": "raised", "message": message_of(error)}
    for name in programs:
      journal.put(job_of(case, name), about[name] | why)
    return
  for name, secs in measured.items():
    record = figures(secs, ways[name].work, case.dtype, rates)
    journal.put(job_of(case, name), about[name] | {"status": "ok"} | record)


def add_backward(case: Case, journal: Journal, *, rates: Rates) -> None:
  """Of a case of training, records backward passes: it less forward."""
  if not isinstance(case, Attention) or case.part != "train":
    return
  both, one = case.work, case.forward.work
  work = Work(both.nbytes - one.nbytes, both.flops - one.flops)
  backward = case.name.replace("train", "backward", 1)
  for train in list(journal.records.values()):
    if train.get("case") != case.name:
      continue
    forward = journal.records.get(job_of(case.forward, train["way"]), {})
    # Of the smallest, noise may leave nothing.
    if 0 < forward.get("ms", 0) < train.get("ms", 0):
      secs = [(train["ms"] - forward["ms"]) / 1e3]
      about = {"case": backward, "way": train["way"], "status": "ok"}
      record = about | figures(secs, work, case.dtype, rates)
      journal.put(f"{backward} | {train['way']}", record)


def prepare_rates(
  cases: Iterable[Case], journal: Journal, *, rounds: int
) -> Rates:
  """What this machine reads and multiplies; the journal's, if it has them."""
  if "rates" not in journal.content:
    rates = measured_rates({case.dtype for case in cases}, rounds=rounds)
    journal.content["rates"] = {"read": rates.read, "matmul": rates.matmul}
    try:
      about = interleave.circumstances(("jax", "jaxlib"), os.cpu_count() or 1)
    except OSError:  # there is no git
      about = {"versions": {"jax": jax.__version__}}
    journal.content["circumstances"] = about
    on_cpu = backend() == "cpu"
    journal.content["device"] = about.get("cpu") if on_cpu else chip()
    journal.write()
  return Rates(**journal.content["rates"])
