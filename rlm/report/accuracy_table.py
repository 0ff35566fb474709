"""Held-out accuracy after each stage, as tables for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlm.report.accuracy import (
  Evaluation,
  Interval,
  evaluation,
  measure_labels,
)
from rlm.report.run_folder import Record, summary_stages
from rlm.report.text import is_number, percent, visible

_WITH_INTERVAL = ("pass_at_1", "pass_at_1_given_format")


def accuracy_tables(summary: Record) -> Group:
  """What a recipe run reached: a table by stage, and one by level.

  Both are 80 columns wide or less at up to six levels. Print it with
  `rich.console.Console().print(accuracy_tables(summary))`.

  Args:
    summary: the recipe's summary.json; stages without an evaluation have no
      row.

  Returns:
    Tables in percent, with 95% intervals.
  """
  entries = [e for e in summary_stages(summary) if "pass_at_1" in e]
  rows = [evaluation(str(entry["name"]), entry) for entry in entries]
  tables = [_by_stage(rows, [entry.get("seconds") for entry in entries])]
  if any(row.levels for row in rows):
    tables.append(_by_level(rows))
  return Group(*tables)


def _table(title: str, caption: str) -> Table:
  return Table(
    title=title,
    caption=caption,
    title_justify="left",
    caption_justify="left",
    title_style="bold",
    caption_style="dim",
    box=box.SIMPLE_HEAD,
    pad_edge=False,
  )


def _by_stage(rows: Sequence[Evaluation], times: Sequence[object]) -> Table:
  labels = measure_labels(rows)
  shown = [k for k in labels if k not in ("format", "steps_correct")]
  table = _table(
    "Held-out accuracy after each stage",
    "percent, 95% interval; given format: among well-formed answers only",
  )
  table.add_column("stage")
  for key in shown:
    table.add_column(labels[key], justify="right", no_wrap=True)
  table.add_column("time", justify="right", no_wrap=True)
  for row, time in zip(rows, times, strict=True):
    cells = [
      _with_interval(row.measures.get(key))
      if key in _WITH_INTERVAL
      else _mean(row.measures.get(key))
      for key in shown
    ]
    table.add_row(Text(visible(row.label)), *cells, _clock(time))
  return table


def _by_level(rows: Sequence[Evaluation]) -> Table:
  levels = sorted({level for row in rows for level in row.levels})
  beyond = frozenset().union(*(row.beyond for row in rows))
  table = _table(
    "pass@1 by level",
    "* harder than the levels trained on" if beyond & {*levels} else "",
  )
  table.add_column("stage", min_width=11)
  for level in levels:
    star = "*" if level in beyond else ""
    table.add_column(f"level {level}{star}", justify="right", no_wrap=True)
  for row in rows:
    if row.levels:
      cells = [
        _with_interval(row.level_measure(k, "pass_at_1"), "\n") for k in levels
      ]
      table.add_row(Text(visible(row.label)), *cells)
  return table


def _mean(value: Interval | None) -> Text:
  return Text("–" if value is None else percent(value.mean))


def _with_interval(value: Interval | None, between: str = " ") -> Text:
  if value is None:
    return Text("–")
  bounds = f"{percent(value.low)}–{percent(value.high)}"
  return Text.assemble(percent(value.mean), between, (f"{bounds:>10}", "dim"))


def _clock(value: object) -> str:
  """104.2 seconds -> "1:44"."""
  if not is_number(value):
    return "–"
  minutes, seconds = divmod(round(value), 60)
  return f"{minutes}:{seconds:02d}"
