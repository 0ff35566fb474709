"""Held-out accuracy after each stage, as tables for the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlm.progress import clock_text
from rlm.report.accuracy import (
  Evaluation,
  Interval,
  evaluation,
  measure_labels,
)
from rlm.report.authors import noisy_authors
from rlm.report.lineage import level_note, rl_pair
from rlm.report.run_folder import Run, summary_stages
from rlm.report.text import is_number, percent, visible

_WITH_INTERVAL = ("pass_at_1", "pass_at_1_given_format")
_LEVELS_ABREAST = 7  # what 80 columns hold


def accuracy_tables(run: Run) -> Group:
  """What a recipe run reached: a table by stage, and one by level.

  Both are 80 columns wide or less; more than seven levels take several tables.
  Print it with `rich.console.Console().print(accuracy_tables(run))`.

  Args:
    run: the recipe's folder; stages without an evaluation in its summary have
      no row, and its stages' configs say which levels they drew.

  Returns:
    Tables in percent, with 95% intervals, and what has to be known of them.
  """
  entries = [e for e in summary_stages(run.summary) if e.get("pass_at_1")]
  rows = [evaluation(str(entry["name"]), entry) for entry in entries]
  shown: list[RenderableType] = [
    _by_stage(rows, [entry.get("seconds") for entry in entries])
  ]
  levels = sorted({level for row in rows for level in row.levels})
  notes = {level: level_note(level, run) for level in levels}
  for first in range(0, len(levels), _LEVELS_ABREAST):
    shown.append(
      _by_level(rows, levels[first : first + _LEVELS_ABREAST], notes)
    )
  if pair := rl_pair(run, [row.name for row in rows]):
    for authors in noisy_authors(run, pair[1]):
      shown.append(Text(visible(f"About RL's gain: {authors.sentence}.")))
  return Group(*shown)


def _table(title: str) -> Table:
  return Table(
    title=title,
    title_justify="left",
    title_style="bold",
    box=box.SIMPLE_HEAD,
    padding=(0, 1, 0, 0),
    pad_edge=False,
  )


def _with_caption(table: Table, caption: str) -> Group:
  """A table's own caption would wrap at the table's width."""
  return Group(table, Text(f"{caption}\n", "dim"))


def _by_stage(rows: Sequence[Evaluation], times: Sequence[object]) -> Group:
  labels = measure_labels(rows)
  shown = [k for k in labels if k not in ("format", "steps_correct")]
  table = _table("Held-out accuracy after each stage")
  table.add_column("stage")
  for key in shown:
    table.add_column(labels[key], justify="right", no_wrap=True)
  table.add_column("time", justify="right", no_wrap=True)
  for row, time in zip(rows, times, strict=True):
    cells = []
    for key in shown:
      value = row.measures.get(key)
      ends = value.ends if value and key in _WITH_INTERVAL else None
      cells.append(_cell(value, map(percent, ends or ())))
    table.add_row(Text(visible(row.label)), *cells, _clock(time))
  return _with_caption(
    table, "percent, 95% interval; given format: among well-formed answers only"
  )


def _by_level(
  rows: Sequence[Evaluation], levels: Sequence[int], notes: Mapping[int, str]
) -> Group:
  """Bounds are whole percents, rounded outwards, so that seven levels fit."""
  kinds = list(dict.fromkeys(notes[k] for k in levels if notes[k]))
  stars = {note: "*" * (i + 1) for i, note in enumerate(kinds)}
  marks = [f"{star} {note}" for note, star in stars.items()]
  table = _table("pass@1 by level")
  table.add_column("stage", min_width=11)
  for level in levels:
    header = f"{level}{stars.get(notes[level], '')}"
    table.add_column(header, justify="right", no_wrap=True)
  for row in rows:
    if row.levels:
      cells = []
      for level in levels:
        value = row.level_measure(level, "pass_at_1")
        ends = value.ends if value else None
        cells.append(_cell(value, _outwards(*ends) if ends else ()))
      table.add_row(Text(visible(row.label)), *cells)
  caption = "; ".join(["no mark: drawn by RL", *marks] if marks else [])
  return _with_caption(table, caption)


def _outwards(low: float, high: float) -> tuple[str, str]:
  """(0.124, 0.356) -> ("12", "36")."""
  digits = 9  # 100 * 0.29 is 28.999999999999996
  return (
    f"{math.floor(round(100 * low, digits))}",
    f"{math.ceil(round(100 * high, digits))}",
  )


def _cell(value: Interval | None, bounds: Iterable[str]) -> Text:
  """The mean, and below it its interval if there is one."""
  if value is None:
    return Text("–")
  under = "–".join(bounds)
  return Text.assemble(
    percent(value.mean), ("\n" + under if under else "", "dim")
  )


def _clock(value: object) -> str:
  return clock_text(value) if is_number(value) else "–"
