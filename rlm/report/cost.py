"""What a run cost: seconds, tokens and FLOPs, stage by stage."""

import dataclasses
import statistics
from collections.abc import Iterable

from rlm.report.run_folder import (
  Record,
  Run,
  recipe_order,
  stage_label,
  summary_stages,
)
from rlm.report.text import is_number


@dataclasses.dataclass(frozen=True)
class StageCost:
  """One stage's cost; None where it was not recorded.

  Attributes:
    label: the stage, or all held-out evaluations together.
    seconds: of the whole stage, its evaluation included.
    tokens: trained on or sampled.
    flops: by formula.
    tokens_per_second: median over steps, so that compilation does not count.
    mfu: share of the device's peak, median over steps.
    is_evaluation: whether it is the evaluations' row, whose seconds are in
      those of the stages.
  """

  label: str
  seconds: float | None
  tokens: float | None
  flops: float | None
  tokens_per_second: float | None
  mfu: float | None
  is_evaluation: bool = False


def costs(run: Run) -> list[StageCost]:
  """Costs by stage, in order; from the summaries, else from the records.

  The held-out evaluations of a recipe follow as one row, if they were counted.
  """
  entries = {str(e["name"]): e for e in summary_stages(run.summary)}
  stages = {stage.name: stage for stage in run.stages}
  found = []
  # Those of the recipe in order, then the others as they were read.
  names = dict.fromkeys([*recipe_order(run.config), *entries, *stages])
  for name in names:
    sources: list[Record] = [entries[name]] if name in entries else []
    metrics: list[Record] = []
    timing: list[Record] = []
    if name in stages:
      sources.append(stages[name].summary)
      metrics, timing = stages[name].metrics, stages[name].timing
    seconds = _first(sources, "seconds")
    tokens = _first(sources, "tokens")
    cost = StageCost(
      label=stage_label(name),
      seconds=_total(timing, "seconds") if seconds is None else seconds,
      tokens=_total(metrics, "tokens") if tokens is None else tokens,
      flops=_first(sources, "flops"),
      tokens_per_second=_median(timing, "tokens_per_second"),
      mfu=_median(timing, "mfu"),
    )
    if any(v is not None for v in (cost.seconds, cost.tokens, cost.flops)):
      found.append(cost)
  evaluated = StageCost(
    label="Held-out evaluations",
    seconds=None,
    tokens=total(e.get("tokens") for e in run.evaluations.values()),
    flops=total(e.get("flops") for e in run.evaluations.values()),
    tokens_per_second=None,
    mfu=None,
    is_evaluation=True,
  )
  if run.is_recipe and evaluated.flops is not None:
    found.append(evaluated)
  return found


def total(values: Iterable[object]) -> float | None:
  """The sum of those that are numbers; None if none is."""
  numbers = [value for value in values if is_number(value)]
  return sum(numbers) if numbers else None


def _first(records: list[Record], name: str) -> float | None:
  values = (record.get(name) for record in records)
  return next((value for value in values if is_number(value)), None)


def _total(records: list[Record], name: str) -> float | None:
  return total(record.get(name) for record in records)


def _median(records: list[Record], name: str) -> float | None:
  values = [v for record in records if is_number(v := record.get(name))]
  return statistics.median(values) if values else None
