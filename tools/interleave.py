"""Rivals timed in alternate rounds: a machine's moods hit both alike."""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata

_HOPELESS = 4


def rates(
  rivals: Mapping[str, Callable[[], None]], *, tokens: int, rounds: int
) -> dict[str, list[float]]:
  """Tokens per second of each rival, A B A B ...

  Args:
    rivals: name -> one repetition, which returns when the work is done. Each
      is called once before the clock runs.
    tokens: tokens that one repetition handles.
    rounds: measured repetitions of each.

  Returns:
    name -> `rounds` rates, in tokens per second.
  """
  for run in rivals.values():
    run()
  result: dict[str, list[float]] = {name: [] for name in rivals}
  for _ in range(rounds):
    for name, run in rivals.items():
      start = time.perf_counter()
      run()
      result[name].append(tokens / (time.perf_counter() - start))
  return result


def fastest(
  variants: Mapping[str, Callable[[], None]], *, rounds: int
) -> tuple[str, dict[str, float]]:
  """The variant with the least median seconds, and the seconds of all.

  Give variants that are warm: one that takes `_HOPELESS` times as long as the
  fastest is called once only, and stays with the seconds of that.
  """
  seconds = {}
  for name, run in variants.items():
    start = time.perf_counter()
    run()
    seconds[name] = time.perf_counter() - start
  limit = _HOPELESS * min(seconds.values())
  hopeful = {n: run for n, run in variants.items() if seconds[n] <= limit}
  measured = rates(hopeful, tokens=1, rounds=rounds)
  for name, rate in measured.items():
    seconds[name] = 1 / statistics.median(rate)
  return min(seconds, key=seconds.__getitem__), seconds


def fastest_usable(
  variants: Mapping[str, Callable[[], Callable[[], None]]], *, rounds: int
) -> tuple[Callable[[], None], dict[str, object]]:
  """The fastest of those variants that can be made and run at all.

  Args:
    variants: name -> a function that makes one repetition.
    rounds: as in `rates`.

  Returns:
    One repetition of the fastest, and what was tried: its name, the seconds of
    all, and why others could not run.
  """
  made, unusable = {}, {}
  for name, make in variants.items():
    try:
      run = make()
      run()
    except (NotImplementedError, RuntimeError) as error:  # torch's refusals
      unusable[name] = str(error).splitlines()[0]
      continue
    made[name] = run
  name, seconds = fastest(made, rounds=rounds)
  tried = {"variant": name, "seconds": seconds, "unusable": unusable}
  return made[name], tried


def summary(measured: list[float]) -> dict[str, object]:
  """Median, extremes and all rounds of one rival, in tokens per second."""
  return {
    "tokens_per_second": statistics.median(measured),
    "slowest": min(measured),
    "fastest": max(measured),
    "rounds": measured,
  }


def circumstances(packages: tuple[str, ...], threads: int) -> dict[str, object]:
  """What a figure must be quoted with: command, commit, machine, versions."""
  commit = subprocess.run(
    ["git", "describe", "--always", "--dirty"],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
  ).stdout.strip()
  return {
    "command": " ".join(["python", "-m", *_module_and_arguments()]),
    "commit": commit or "unknown",
    "cpu": _cpu(),
    "cores": os.cpu_count(),
    "threads": threads,
    "load_average": os.getloadavg()[0],
    "python": platform.python_version(),
    "versions": {name: metadata.version(name) for name in packages},
  }


def report(result: dict[str, object], output: str | None) -> None:
  """Prints the result as JSON, and writes it to a file if one is named."""
  text = json.dumps(result, indent=2)
  print(text)
  if output:
    pathlib.Path(output).write_text(text + "\n")


def _module_and_arguments() -> list[str]:
  return [f"tools.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]]


def _cpu() -> str:
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()
