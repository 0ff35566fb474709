"""The head of a report: what ran, its key figures, what is missing."""

from collections.abc import Iterable

from rlm.report import text
from rlm.report.accuracy import Evaluation
from rlm.report.authors import noisy_authors
from rlm.report.cost import StageCost, total
from rlm.report.findings import evaluated_pair, points, signed
from rlm.report.lineage import last_of_model, rl_pair
from rlm.report.run_folder import (
  Run,
  inline_label,
  stage_label,
  summary_stages,
)


def subtitle(run: Run) -> str:
  """Stages, seed and commit in a line."""
  n = len(run.stages)
  recipe = f"The recipe, {n} stage{'s' if n != 1 else ''}"
  parts = [recipe if run.is_recipe else "One run"]
  source = run.run or next((s.run for s in run.stages if s.run), {})
  if text.is_number(seed := run.summary.get("seed", run.config.get("seed"))):
    parts.append(f"seed {seed}")
  if isinstance(commit := source.get("commit"), str):
    dirty = "-dirty" if commit.endswith("-dirty") else ""
    parts.append(f"commit {commit[:12]}{dirty}")
  return " · ".join(parts)


def key_figures(
  run: Run, rows: list[Evaluation], stage_costs: list[StageCost]
) -> list[tuple[str, str, str]]:
  """(name, figure, what it means): the run at a glance."""
  found = []
  if pair := evaluated_pair(rl_pair(run, [r.name for r in rows]), rows):
    before, after = (e.measures["pass_at_1"] for e in pair)
    found.append(
      (
        "Gain by RL",
        f"{signed(points(before, after))} points",
        f"held-out pass@1, over {inline_label(pair[0].label)}"
        + (
          ", which learned from erring authors"
          if noisy_authors(run, pair[0].name)
          else ""
        ),
      )
    )
  if rows:
    name = last_of_model(run, [r.name for r in rows])
    last = next((r for r in rows if r.name == name), rows[-1])
    value = last.measures["pass_at_1"]
    interval = f", 95%: {value.bounds}" if value.bounds else ""
    found.append(
      (
        f"Accuracy after {inline_label(last.label)}",
        f"{text.percent(value.mean)}%",
        f"held-out pass@1{interval}",
      )
    )
  summaries = [run.summary, *(stage.summary for stage in run.stages)]
  model = next((s["model"] for s in summaries if "model" in s), None)
  if isinstance(model, dict) and text.is_number(model.get("total")):
    found.append(
      (
        "Parameters",
        text.count(model["total"]),
        f"{text.count(model.get('activated'))} active per token",
      )
    )
  cost = total_cost(run, stage_costs)
  if cost.seconds:
    tokens = f"{text.count(cost.tokens)} tokens" if cost.tokens else ""
    found.append(("Time", text.seconds(cost.seconds), tokens))
  return found


def total_cost(run: Run, stage_costs: list[StageCost]) -> StageCost:
  """The sum of the rows; of time, what the summary says of its own stages."""
  seconds = run.summary.get("seconds_total")
  if text.is_number(seconds):
    own = {stage_label(str(e["name"])) for e in summary_stages(run.summary)}
    others = (c.seconds for c in stage_costs if c.label not in own)
    seconds += total(others) or 0.0
  else:
    seconds = total(c.seconds for c in stage_costs)
  return StageCost(
    "Whole run",
    seconds,
    total(c.tokens for c in stage_costs),
    total(c.flops for c in stage_costs),
    None,
    None,
  )


def notices(run: Run, rows: list[Evaluation]) -> list[str]:
  """What is missing or broken, in sentences."""
  found = []
  if run.missing:
    names = ", ".join(stage_label(name) for name in run.missing)
    found.append(f"Not in this folder: {names}.")
  unfinished = [s.label for s in run.stages if not s.summary]
  if unfinished:
    found.append(
      f"Without a summary, so not finished: {', '.join(unfinished)}."
    )
  if run.is_recipe and not rows:
    found.append("No stage has been evaluated on held-out problems yet.")
  if unreadable := sum(stage.unreadable for stage in run.stages):
    found.append(
      f"{unreadable} unreadable line{'s' if unreadable > 1 else ''} passed"
      " over in metrics.jsonl and timing.jsonl."
    )
  return found


def evaluation_size(rows: list[Evaluation], drawn: frozenset[int]) -> str:
  """How many problems and answers, if it was the same after every stage.

  Args:
    rows: the evaluations.
    drawn: levels that RL drew.
  """
  sizes = {(row.n_problems, row.n_samples, row.headline) for row in rows}
  if len(sizes) != 1:
    return ""
  n_problems, n_samples, headline = sizes.pop()
  if n_problems is None or n_samples is None:
    return ""
  of = f" of {listed(headline)}" if headline else ""
  if headline and headline == drawn:
    of += ", those that RL draws"
  return f"{n_problems:,} problems{of}, each answered {n_samples} times."


def listed(levels: Iterable[int]) -> str:
  """[2, 3, 4] -> "levels 2–4", [6] -> "level 6"; "" for none."""
  ordered = sorted(levels)
  if len(ordered) < 2:
    return f"level {ordered[0]}" if ordered else ""
  if ordered == list(range(ordered[0], ordered[-1] + 1)):
    return f"levels {ordered[0]}–{ordered[-1]}"
  return f"levels {', '.join(map(str, ordered))}"
