"""The report of a run: one report.html that needs nothing but a browser.

It holds no script and names no address, so it opens from a disk, a mail or an
artefact store and looks the same everywhere. Model text is hostile: jinja2
escapes every value, `visible` spells out what could not be seen, and a policy
in the page's head would refuse to run or load anything.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlm import files
from rlm.report import svg, text
from rlm.report.accuracy import (
  Evaluation,
  evaluations,
  level_figure,
  measure_labels,
  stage_figure,
)
from rlm.report.cost import StageCost, costs, total
from rlm.report.curves import Chart, charts, expert_balance
from rlm.report.expert_load import heatmaps
from rlm.report.findings import findings, points, rl_pair, signed
from rlm.report.run_folder import (
  STAGES,
  Record,
  Run,
  Stage,
  inline_label,
  read_run,
)
from rlm.report.traces import compare

_FOLDER = Path(__file__).parent
_MAX_LINES = 250  # of a config or a run.json
_OPEN = {"rl", "pretrain"}  # of many stages, those shown unfolded


@dataclasses.dataclass(frozen=True)
class StageCharts:
  """A stage's panels under one heading."""

  label: str
  note: str
  open: bool
  charts: list[Chart]


def write_report(workdir: Path | str) -> Path:
  """Writes `workdir`/report.html from what a run or recipe left there.

  Works on a finished recipe, on one still running and on the folder of a
  single run: the page says what is missing. An older report is replaced in
  one move.

  Args:
    workdir: a run's or a recipe's folder.

  Returns:
    The path of the page.

  Raises:
    ValueError: `workdir` holds nothing that a run wrote.
  """
  run = read_run(workdir)
  with svg.drawing():
    context = _context(run)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    finalize=_visible,
  )
  environment.filters.update(
    percent=text.percent, seconds=text.seconds, count=text.count
  )
  page = environment.get_template("report.html.jinja").render(context)
  path = run.path / "report.html"
  files.write_bytes(path, page.encode("utf-8", "backslashreplace"))
  return path


def _visible(value: Any) -> Any:
  if isinstance(value, str) and not isinstance(value, Markup):
    return text.visible(value)
  return value


def _context(run: Run) -> dict[str, Any]:
  """Everything the template names."""
  rows = evaluations(run)
  levels = sorted({level for row in rows for level in row.levels})
  beyond = sorted({b for row in rows for b in row.beyond} & {*levels})
  training = [
    (stage, _charts(charts(stage.metrics, text_entropies(stage.summary))))
    for stage in run.stages
  ]
  experts = [(stage, _expert_charts(run, stage)) for stage in run.stages]
  is_rl = {
    s.name: any("reward/mean" in r for r in s.metrics) for s, _ in training
  }
  stage_costs = costs(run)
  before_each: list[Evaluation | None] = [None, *rows]  # one longer
  context: dict[str, Any] = {
    "title": run.path.resolve().name,
    "subtitle": _subtitle(run),
    "css": Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
    "key_figures": _key_figures(run, rows, stage_costs),
    "notices": _notices(run, rows),
    "findings": findings(rows),
    "evaluations": rows,
    "evaluation_size": _evaluation_size(rows),
    "measures": measure_labels(rows),
    "stage_figure": Markup(stage_figure(rows)) if rows else "",
    "levels": [(level, level in beyond) for level in levels],
    "beyond": _listed(beyond),
    "level_figures": [
      Chart(row.label, "", Markup(level_figure(row, before, levels)), [])
      for before, row in zip(before_each, rows, strict=False)
      if row.levels
    ],
    "comparisons": compare(run),
    "inline": inline_label,
    "rl_stages": _staged([p for p in training if is_rl[p[0].name]]),
    "other_stages": _staged([p for p in training if not is_rl[p[0].name]]),
    "expert_stages": _staged(experts),
    "costs": stage_costs,
    "longest": max((c.seconds or 0 for c in stage_costs), default=0),
    "total_cost": _total_cost(run, stage_costs),
    "documents": _documents(run),
  }
  names = {
    "accuracy": ("Accuracy", "evaluations"),
    "levels": ("Levels", "levels"),
    "traces": ("Traces", "comparisons"),
    "rl": ("RL", "rl_stages"),
    "training": ("Training", "other_stages"),
    "experts": ("Experts", "expert_stages"),
    "cost": ("Cost", "costs"),
    "config": ("Config", "documents"),
  }
  context["sections"] = [
    (anchor, name) for anchor, (name, key) in names.items() if context[key]
  ]
  return context


def _charts(drawn: list[Chart]) -> list[Chart]:
  return [dataclasses.replace(c, svg=Markup(c.svg)) for c in drawn]


def _expert_charts(run: Run, stage: Stage) -> list[Chart]:
  balance = expert_balance(stage.metrics)
  drawn = [] if balance is None else [balance]
  if stage.name in _OPEN or not run.is_recipe:
    drawn = heatmaps(stage.metrics) + drawn
  return _charts(drawn)


def _staged(pairs: list[tuple[Stage, list[Chart]]]) -> list[StageCharts]:
  """Stages with charts; all open if there is one, else the main ones."""
  kept = [(stage, drawn) for stage, drawn in pairs if drawn]
  return [
    StageCharts(
      stage.label,
      f"{len(stage.metrics):,} steps",
      len(kept) == 1 or stage.name in _OPEN,
      drawn,
    )
    for stage, drawn in kept
  ]


def text_entropies(summary: Record) -> dict[str, float]:
  """Entropies of the text, bits per byte, that a stage's summary reports.

  Any number under a key that names a unigram or bigram counts, nested or not:
  {"text": {"unigram_bits_per_byte": 4.7}} -> {"unigram entropy": 4.7}.
  """
  found: dict[str, float] = {}
  for key, value in _flat(summary):
    for name in ("unigram", "bigram"):
      if name in key and text.is_number(value):
        found.setdefault(f"{name} entropy", value)
  return found


def _flat(value: object, prefix: str = "") -> list[tuple[str, object]]:
  """Nested dicts -> [("model.hidden_size", 64), ...], in order."""
  if not isinstance(value, Mapping) or not value:
    return [(prefix, value)] if prefix else []
  return [
    pair
    for key, inner in value.items()
    for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
  ]


def _subtitle(run: Run) -> str:
  kind = "The recipe" if run.is_recipe else "One run"
  n = len(run.stages)
  parts = [f"{kind}, {n} stage{'s' if n != 1 else ''}"]
  source = run.run or next((s.run for s in run.stages if s.run), {})
  if text.is_number(seed := run.summary.get("seed", run.config.get("seed"))):
    parts.append(f"seed {seed}")
  if isinstance(commit := source.get("commit"), str):
    parts.append(f"commit {commit[:12]}")
  return " · ".join(parts)


def _key_figures(
  run: Run, rows: list[Evaluation], stage_costs: list[StageCost]
) -> list[tuple[str, str, str]]:
  """(name, figure, what it means): the run at a glance."""
  found = []
  if pair := rl_pair(rows):
    before, after = (e.measures["pass_at_1"] for e in pair)
    found.append(
      (
        "Gain by RL",
        f"{signed(points(before, after))} points",
        f"held-out pass@1, over {inline_label(pair[0].label)}",
      )
    )
  if rows:
    last = next((r for r in rows if r.name == "rl_final"), rows[-1])
    value = last.measures["pass_at_1"]
    found.append(
      (
        f"Accuracy after {inline_label(last.label)}",
        f"{text.percent(value.mean)}%",
        f"held-out pass@1, 95%: {value.bounds}",
      )
    )
  model = run.summary.get("model")
  if isinstance(model, dict) and text.is_number(model.get("total")):
    found.append(
      (
        "Parameters",
        text.count(model["total"]),
        f"{text.count(model.get('activated'))} active per token",
      )
    )
  cost = _total_cost(run, stage_costs)
  if cost.seconds:
    tokens = f"{text.count(cost.tokens)} tokens" if cost.tokens else ""
    found.append(("Time", text.seconds(cost.seconds), tokens))
  return found


def _total_cost(run: Run, stage_costs: list[StageCost]) -> StageCost:
  seconds = run.summary.get("seconds_total")
  flops = run.summary.get("flops")
  return StageCost(
    "Whole run",
    seconds
    if text.is_number(seconds)
    else total(c.seconds for c in stage_costs),
    total(c.tokens for c in stage_costs),
    flops if text.is_number(flops) else total(c.flops for c in stage_costs),
  )


def _notices(run: Run, rows: list[Evaluation]) -> list[str]:
  """What is missing or broken, in sentences."""
  found = []
  if run.missing:
    names = ", ".join(STAGES[name] for name in run.missing)
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


def _evaluation_size(rows: list[Evaluation]) -> str:
  sizes = {(row.n_problems, row.n_samples, row.trained) for row in rows}
  if len(sizes) != 1:
    return ""
  n_problems, n_samples, trained = sizes.pop()
  if n_problems is None or n_samples is None:
    return ""
  of = f" of the trained {_listed(trained)}" if trained else ""
  return f"{n_problems:,} problems{of}, each answered {n_samples} times."


def _listed(levels: Iterable[int]) -> str:
  """[2, 3, 4] -> "levels 2–4", [6] -> "level 6"; "" for none."""
  ordered = sorted(levels)
  if len(ordered) < 2:
    return f"level {ordered[0]}" if ordered else ""
  if ordered == list(range(ordered[0], ordered[-1] + 1)):
    return f"levels {ordered[0]}–{ordered[-1]}"
  return f"levels {', '.join(map(str, ordered))}"


def _documents(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
  """(heading, [(sub-heading, "key = value" lines)]) of config and run.json.

  A stage of a recipe repeats only what its run.json has of its own.
  """
  found = []
  if run.is_recipe:
    found.append(("Versions and machine", [("", _lines(run.run))]))
    found.append(("Config of the whole run", [("", _lines(run.config))]))
  shared = _flat(run.run) if run.is_recipe else []
  for stage in run.stages:
    own = dict(pair for pair in _flat(stage.run) if pair not in shared)
    blocks = [("config", _lines(stage.config)), ("run", _lines(own))]
    found.append((stage.label, blocks))
  filled = [
    (heading, [(name, lines) for name, lines in blocks if lines])
    for heading, blocks in found
  ]
  return [(heading, blocks) for heading, blocks in filled if blocks]


def _lines(document: Record) -> str:
  """One "key = value" a line; the hashes of a thousand files are cut short."""
  lines = [
    f"{key} = {text.shorten(str(value), 300)}" for key, value in _flat(document)
  ]
  more = len(lines) - _MAX_LINES
  return "\n".join(lines[:_MAX_LINES] + [f"… and {more} more"] * (more > 0))
