"""`tools/bench_mla.py --gpu`: checks first, then figures until time is up."""

import faulthandler
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent import futures

import jax
import jax.numpy as jnp

from rlm.kernels.backend import backend
from tools.journal import Journal, Record, attempt, message_of
from tools.mla_cases import Way, sets_of
from tools.mla_checks import check
from tools.mla_figures import (
  Case,
  Compiled,
  add_backward,
  job_of,
  lowered,
  prepare_rates,
  time_case,
)

# Whoever takes longer to compile, check or time hangs.
_HANGS_SECS = 120
# Exit status of a process whose device answers no more.
_LOST_DEVICE = 3
# What is compiled at once: autotuning allocates operands of its own.
_TOGETHER = 12
_TOGETHER_BYTES = 8e9

Job = tuple[Case, str, Way]


def on_gpu(
  small_cases: Iterable[Case],
  cases: Iterable[Case],
  journal: Journal,
  *,
  rounds: int,
  only: str,
  until: float,
) -> None:
  """Checks every way, then measures, one by one, what is not in the journal.

  Args:
    small_cases: to be checked, one of each kind.
    cases: to be measured; a way that fails to run in the check of its kind is
      not.
    journal: what is known, and will be.
    rounds: samples of each way.
    only: a regular expression; "CASE | WAY" must match.
    until: when to stop, in seconds of the epoch.
  """
  jobs = [
    (case, name, way)
    for case in cases
    for name, way in case.ways().items()
    if re.search(only, job_of(case, name))
  ]
  jobs.sort(key=lambda job: job[2].rank)
  with _Watch():
    rates = prepare_rates([case for case, *_ in jobs], journal, rounds=rounds)
  wanted = {(case.kind, name) for case, name, _ in jobs}
  for case in small_cases:
    for name, way in case.ways().items():
      job = _check_of(case, name)
      if (case.kind, name) in wanted and job not in journal.records:
        with _Watch():
          attempt(journal, job, {}, lambda way=way: check(way))
          _tell(job, journal.records[job])
  jobs = [job for job in jobs if job_of(*job[:2]) not in journal.records]
  left = len(jobs)
  for batch in _batches(jobs, journal.suspects):
    left -= len(batch)
    batch = _checked(batch, journal)
    left += len(batch)
    if time.time() > until:
      break
    with _Watch():
      compiled = _compiled(batch, journal) if len(batch) > 1 else {}
    for case, name, way in batch:
      if time.time() > until:
        break
      left -= 1
      job = job_of(case, name)
      verdict = journal.records.get(_check_of(case, name), {})
      wrong = {} if verdict.get("passes", True) else {"wrong": True}
      with _Watch():
        time_case(
          case,
          {name: way},
          journal,
          rates=rates,
          rounds=rounds,
          remarks=wrong,
          compiled=compiled,
        )
        add_backward(case, journal, rates=rates)
        _tell(job, journal.records[job])
  if left:
    print(f"time is up: {left} figures are missing", flush=True)


def _check_of(case: Case, way: str) -> str:
  return f"check {case.kind} | {way}"


def _checked(jobs: list[Job], journal: Journal) -> list[Job]:
  """Without those whose check did not run: they are recorded as skipped."""
  able = []
  for case, name, way in jobs:
    verdict = journal.records.get(_check_of(case, name), {"status": "ok"})
    if verdict["status"] == "ok":
      able.append((case, name, way))
      continue
    about = {"case": case.name, "way": name, "status": "skipped"}
    why = f"its check {verdict['status']}: {verdict['message']}"
    journal.put(job_of(case, name), about | {"message": why})
  return able


def _batches(jobs: list[Job], alone: set[str]) -> Iterator[list[Job]]:
  """Jobs in their order, as many as are compiled together."""
  batch: list[Job] = []
  size = 0.0
  for case, name, way in jobs:
    nbytes = sets_of(way.work) * way.work.nbytes if way.rank else 0
    single = job_of(case, name) in alone
    full = len(batch) == _TOGETHER or size + nbytes > _TOGETHER_BYTES
    if batch and (full or single):
      yield batch
      batch, size = [], 0.0
    batch.append((case, name, way))
    size += _TOGETHER_BYTES if single else nbytes
  if batch:
    yield batch


def _compiled(jobs: list[Job], journal: Journal) -> Compiled:
  """Compiles side by side; lowers one after the other."""
  result = {}
  journal.together([job_of(case, name) for case, name, _ in jobs])
  with futures.ThreadPoolExecutor(len(jobs)) as pool:
    for case, name, way in jobs:
      try:
        future = pool.submit(lowered(way).compile)
      except Exception as error:  # a refusal, recorded where it is asked for
        future = futures.Future()
        future.set_exception(error)
      result[job_of(case, name)] = future
  journal.together([])
  return result


class _Watch:
  """Within it, a hang ends the process; after it, so does a broken device."""

  def __enter__(self):
    if backend() == "gpu":
      faulthandler.dump_traceback_later(_HANGS_SECS, exit=True)

  def __exit__(self, *_):
    if backend() != "gpu":
      return
    try:
      jax.block_until_ready(jnp.ones(8) + 1)
    except Exception as error:
      print(f"the device is lost: {message_of(error)}", flush=True)
      os._exit(_LOST_DEVICE)  # its journal is written; nothing else ends well
    faulthandler.cancel_dump_traceback_later()


def _tell(job: str, record: Record) -> None:
  """One line as soon as something is known."""
  if "ms" in record:
    told = f"{record['ms']:.4g} ms, {record['share']:.0%} of the bound"
  elif "errors" in record:
    told = "pass" if record["passes"] else "FAIL"
    for name, (error, least) in record["errors"].items():
      told += f", {name} {error:.1e} ({least:.1e})"
  else:
    told = f"{record['status']}: {record.get('message', '')}"
  print(f"{job}: {told}", flush=True)
