"""The report of a run: one report.html that needs nothing but a browser.

It holds no script and names no address, so it opens from a disk, a mail or an
artefact store and looks the same everywhere. Model text is hostile: jinja2
escapes every value, `visible` spells out what could not be seen, and a policy
in the page's head would refuse to run or load anything.
"""

import dataclasses
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
from rlm.report.cost import costs
from rlm.report.curves import Chart, charts, expert_balance, text_entropies
from rlm.report.expert_load import balance_charts, heatmaps
from rlm.report.findings import findings
from rlm.report.heldout_text import heldout_text
from rlm.report.lineage import (
  descent,
  drawn_by_rl,
  level_note,
  levels_seen,
  rl_pair,
  started_from,
)
from rlm.report.overview import (
  evaluation_size,
  key_figures,
  listed,
  notices,
  subtitle,
  total_cost,
)
from rlm.report.run_folder import (
  Record,
  Run,
  Stage,
  flat,
  inline_label,
  read_run,
  recipe_order,
  stage_label,
)
from rlm.report.traces import compare, samples

_FOLDER = Path(__file__).parent
_MAX_LINES = 250  # of a config or a run.json


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
  path = run.path / "report.html"
  write_page(path, "report.html.jinja", context)
  return path


def write_page(path: Path, template: str, context: dict[str, Any]) -> None:
  """Fills in a template of this folder, safely, and writes it in one move.

  Args:
    path: of the page.
    template: its file's name.
    context: everything that it names, but for `css`.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    finalize=_visible,
  )
  environment.filters.update(
    percent=text.percent,
    seconds=text.seconds,
    count=text.count,
    bits=text.significant,
  )
  css = Markup((_FOLDER / "report.css").read_text(encoding="utf-8"))
  page = environment.get_template(template).render(context, css=css)
  files.write_bytes(path, page.encode("utf-8", "backslashreplace"))


def _visible(value: Any) -> Any:
  if isinstance(value, str) and not isinstance(value, Markup):
    return text.visible(value)
  return value


def _context(run: Run) -> dict[str, Any]:
  """Everything the template names."""
  rows = evaluations(run)
  levels = sorted({level for row in rows for level in row.levels})
  notes = {level: level_note(level, run) for level in levels}
  seen = levels_seen(run)
  training = [
    (stage, charts(stage.metrics, text_entropies(stage.summary)))
    for stage in run.stages
  ]
  experts = [(stage, _expert_charts(run, stage)) for stage in run.stages]
  is_rl = {
    s.name: any("reward/mean" in r for r in s.metrics) for s, _ in training
  }
  compared = compare(run)
  stage_costs = costs(run)
  origin = started_from(run)
  by_name: dict[str | None, Evaluation] = {row.name: row for row in rows}
  context: dict[str, Any] = {
    "title": run.path.resolve().name,
    "subtitle": subtitle(run),
    "key_figures": key_figures(run, rows, stage_costs),
    "notices": notices(run, rows),
    "findings": findings(run, rows),
    "evaluations": rows,
    "evaluation_size": evaluation_size(rows, drawn_by_rl(run)),
    "measures": measure_labels(rows),
    "stage_figure": stage_figure(rows) if rows else "",
    "levels": list(notes.items()),
    "has_origin": any(origin.get(row.name) in by_name for row in rows),
    "seen": [
      (stage_label(name), listed(drawn)) for name, drawn in seen.items()
    ],
    "level_figures": [
      Chart(
        row.label,
        "",
        level_figure(
          row,
          by_name.get(origin.get(row.name)),
          levels,
          shaded=[level for level in levels if notes[level]],
          unseen=_unseen(run, row.name, levels),
        ),
        [],
      )
      for row in rows
      if row.levels
    ],
    "comparisons": compared,
    "samples": [] if compared else samples(run),
    "inline": inline_label,
    "rl_stages": _staged(run, [p for p in training if is_rl[p[0].name]]),
    "other_stages": _staged(run, [p for p in training if not is_rl[p[0].name]]),
    "heldout_text": heldout_text(run),
    "expert_stages": _staged(run, experts),
    "costs": stage_costs,
    "longest": max((c.seconds or 0 for c in stage_costs), default=0),
    "total_cost": total_cost(run, stage_costs),
    "counts_evaluations": any(c.is_evaluation for c in stage_costs),
    "documents": _documents(run),
  }
  names = {
    "accuracy": ("Accuracy", "evaluations"),
    "levels": ("Levels", "levels"),
    "traces": ("Traces", "comparisons" if compared else "samples"),
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


def _expert_charts(run: Run, stage: Stage) -> list[Chart]:
  balance = expert_balance(stage.metrics)
  drawn = [] if balance is None else [balance]
  if stage.name in _unfolded(run) or not run.is_recipe:
    drawn = heatmaps(stage.metrics) + drawn + balance_charts(stage.metrics)
  return drawn


def _unseen(run: Run, name: str, levels: list[int]) -> list[int]:
  """Levels that neither a stage nor what it descends from drew."""
  seen = levels_seen(run)
  line = [n for n in descent(run, name) if n in seen]
  if not line:
    return []
  return [k for k in levels if not any(k in seen[n] for n in line)]


def _unfolded(run: Run) -> set[str]:
  """Of many stages, those shown open: the first, and the RL of the gain."""
  pair = rl_pair(run, [stage.name for stage in run.stages])
  return {recipe_order(run.config)[0], *(pair or ())[1:]}


def _staged(
  run: Run, pairs: list[tuple[Stage, list[Chart]]]
) -> list[StageCharts]:
  """Stages with charts; all open if there is one, else the main ones."""
  kept = [(stage, drawn) for stage, drawn in pairs if drawn]
  return [
    StageCharts(
      stage.label,
      f"{len(stage.metrics):,} steps",
      len(kept) == 1 or stage.name in _unfolded(run),
      drawn,
    )
    for stage, drawn in kept
  ]


def _documents(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
  """(heading, [(sub-heading, "key = value" lines)]) of config and run.json.

  A stage of a recipe repeats only what its run.json has of its own.
  """
  found = []
  if run.is_recipe:
    found.append(("Versions and machine", [("", _lines(run.run))]))
    found.append(("Config of the whole run", [("", _lines(run.config))]))
  shared = flat(run.run) if run.is_recipe else []
  for stage in run.stages:
    own = dict(pair for pair in flat(stage.run) if pair not in shared)
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
    f"{key} = {text.shorten(str(value), 300)}" for key, value in flat(document)
  ]
  more = len(lines) - _MAX_LINES
  return "\n".join(lines[:_MAX_LINES] + [f"… and {more} more"] * (more > 0))
