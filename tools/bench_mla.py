r"""What latent attention costs, beside what bounds it and what others need.

  python -m tools.bench_mla --output=mla.json
  python -m tools.bench_mla --gpu --output=mla.json
  python -m tools.bench_mla --gpu --tiles --output=tiles.json

Every case in milliseconds (median of --rounds), for every implementation of the
front doors and for attention as others offer it (`tools/mla_rivals`); beside
it, the two times that bound the case on this machine: its bytes over the
bandwidth and its FLOPs over the matmul rate, both measured first, in the same
run. The share is that of the larger bound; the ratio is to the fastest of a
case's other ways. What does not apply or fails says why.

On a CPU: a model for a laptop and heads of DeepSeek-V2-Lite, the ways of a case
in alternate rounds. Run it on an idle machine.

--gpu: first every way on small operands against the float32 reference, where an
error is given in units of the bfloat16 reference's own; then the cases of
DeepSeek-V2-Lite and V3, our kernels first, then XLA's form, then the others,
until --minutes are over. It works in a process that is started again when a
kernel hangs or takes the device down; --output is written after every figure,
and what is already in it is not measured again. A backward pass is the
difference between training and forward. Small caches change from call to call,
or would be read from L2; the smallest stay there, and say so. --tiles: choices
of our kernels' tiles in the place of other ways, for
rlm/kernels/mla_attention/tiles.py.
"""

import argparse
import collections
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from rlm.kernels.backend import backend, chip
from rlm.kernels.mla_attention.tiles import gpu_tiles
from tools.journal import REFUSED, Journal, persist
from tools.mla_cases import CPU_CASES, LITE, V3, check_cases, gpu_cases
from tools.mla_figures import (
  Case,
  add_backward,
  job_of,
  prepare_rates,
  time_case,
)
from tools.mla_on_gpu import on_gpu
from tools.mla_tile_cases import small_tile_cases, tile_cases


def on_cpu(
  cases: Iterable[Case], journal: Journal, *, rounds: int, only: str
) -> None:
  """Measures cases, the ways of each in alternate rounds."""
  cases = list(cases)
  rates = prepare_rates(cases, journal, rounds=rounds)
  for case in cases:
    every = case.ways()
    ways = {n: w for n, w in every.items() if re.search(only, job_of(case, n))}
    if ways:
      print(case.name, flush=True)
      time_case(case, ways, journal, rates=rates, rounds=rounds)
      add_backward(case, journal, rates=rates)


def show(journal: Journal) -> None:
  """Prints every figure, then what was not measured, and why."""
  console = Console()
  console = Console(width=max(console.width, 132))
  rates = journal.content.get("rates")
  if rates:
    told = [f"reads {rates['read'] / 1e9:.4g} GB/s"]
    for dtype, rate in rates["matmul"].items():
      told.append(f"multiplies {dtype} at {rate / 1e12:.4g} TFLOP/s")
    console.print(f"{journal.content['device']}: {', '.join(told)}")
  by_case = collections.defaultdict(list)
  missing: collections.Counter[tuple[str, str]] = collections.Counter()
  for record in journal.records.values():
    if "ms" in record:
      by_case[record["case"]].append(record)
    elif "case" in record:
      why = record.get("message", record["status"])
      missing[record["way"], why] += 1
  table = Table("case", "way")
  for column in ("ms", "bytes ms", "FLOPs ms", "share", "ratio"):
    table.add_column(column, justify="right")
  table.add_column("remarks")
  for case, records in by_case.items():
    for record in records:
      others = [r["ms"] for r in records if r is not record]
      numbers = [record[k] for k in ("ms", "bytes_ms", "flops_ms")]
      remarks = ["stays in cache"] if record.get("stays_cached") else []
      remarks += ["WRONG RESULTS"] if record.get("wrong") else []
      table.add_row(
        case if record is records[0] else "",
        record["way"],
        *[f"{x:.4g}" for x in numbers],
        f"{record['share']:.0%}",
        f"{record['ms'] / min(others):.2f}" if others else "",
        ", ".join(remarks),
      )
    table.add_section()
  console.print(table)
  if missing:
    table = Table("way", "cases", "why it has no figure")
    for (way, why), count in missing.items():
      table.add_row(way, str(count), why)
    console.print(table)


def main(argv: list[str] | None = None) -> int:
  """Reads the command, measures, prints, writes; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--gpu", action="store_true", help="check, then time on this GPU")
  add("--tiles", action="store_true", help="with --gpu, choices of tiles")
  add("--only", default="", help="regular expression that CASE | WAY matches")
  add("--rounds", type=int, default=7)
  add("--minutes", type=float, default=8, help="that --gpu may take")
  add("--output", help="JSON file")
  add("--until", type=float, help=argparse.SUPPRESS)  # of --gpu's own process
  a = parser.parse_args(argv)
  if a.tiles and not a.gpu:
    parser.error("--tiles are of GPU kernels; give --gpu too")
  if not a.gpu:
    journal = Journal(a.output)
    on_cpu(CPU_CASES, journal, rounds=a.rounds, only=a.only)
    show(journal)
    return 0
  if a.until is None:
    with tempfile.TemporaryDirectory() as folder:
      output = os.path.abspath(a.output or os.path.join(folder, "mla.json"))
      status = persist(
        "tools.bench_mla",
        [
          "--gpu",
          *["--tiles"] * a.tiles,
          f"--only={a.only}",
          f"--rounds={a.rounds}",
          f"--output={output}",
          f"--until={time.time() + 60 * a.minutes}",
        ],
        output,
        {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"},
      )
      if status != REFUSED:
        show(Journal(output, resume=True))
      return status
  if backend() != "gpu":
    print(
      f"--gpu, but jax runs on {backend()} ({chip()}) here: there is nothing to"
      " measure. Take a machine with a GPU and jax's CUDA plugin, or leave"
      " --gpu out.",
      file=sys.stderr,
    )
    return REFUSED
  if a.tiles and gpu_tiles() is None:
    print(
      f"--tiles, but this is {chip()}: the kernels are for Hopper, an H100,"
      " H200, H800, H20 or GH200. Leave --tiles out to time all other ways.",
      file=sys.stderr,
    )
    return REFUSED
  on_gpu(
    small_tile_cases() if a.tiles else check_cases((LITE, V3)),
    tile_cases() if a.tiles else gpu_cases(),
    Journal(a.output, resume=True),
    rounds=a.rounds,
    only=a.only,
    until=a.until,
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
