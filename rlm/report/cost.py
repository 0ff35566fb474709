"""What a run cost: seconds, tokens and FLOPs, stage by stage."""

import dataclasses
from collections.abc import Iterable

from rlm.report.run_folder import (
  Record,
  Run,
  stage_label,
  stage_order,
  summary_stages,
)
from rlm.report.text import is_number


@dataclasses.dataclass(frozen=True)
class StageCost:
  """One stage's cost; None where it was not recorded."""

  label: str
  seconds: float | None
  tokens: float | None
  flops: float | None


def costs(run: Run) -> list[StageCost]:
  """Costs by stage, in order; from the summaries, else from the records."""
  entries = {str(e["name"]): e for e in summary_stages(run.summary)}
  stages = {stage.name: stage for stage in run.stages}
  flops_by_stage = run.summary.get("flops")
  found = []
  for name in sorted({*entries, *stages}, key=stage_order):
    sources: list[Record] = [entries[name]] if name in entries else []
    if name in stages:
      sources.append(stages[name].summary)
    seconds = _first(sources, "seconds")
    tokens = _first(sources, "tokens")
    flops = _first(sources, "flops")
    if flops is None and isinstance(flops_by_stage, dict):
      flops = _first([flops_by_stage], name)
    if name in stages and seconds is None:
      seconds = total(record.get("seconds") for record in stages[name].timing)
    if name in stages and tokens is None:
      tokens = total(record.get("tokens") for record in stages[name].metrics)
    if (seconds, tokens, flops) != (None, None, None):
      found.append(StageCost(stage_label(name), seconds, tokens, flops))
  return found


def total(values: Iterable[object]) -> float | None:
  """The sum of those that are numbers; None if none is."""
  numbers = [value for value in values if is_number(value)]
  return sum(numbers) if numbers else None


def _first(records: list[Record], name: str) -> float | None:
  values = (record.get(name) for record in records)
  return next((value for value in values if is_number(value)), None)
