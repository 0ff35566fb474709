"""Held-out accuracy after each stage, by level, as data and as figures."""

import dataclasses
import re
from collections.abc import Collection, Sequence

from markupsafe import Markup

from rlm.report import svg
from rlm.report.run_folder import Record, Run, stage_label
from rlm.report.text import is_number, percent

# What an evaluation measures, in the order of the table. A pattern stands for
# each k; a report of another k than these words explain is still complete.
_MEASURES = (
  (r"pass_at_1", "pass@1"),
  (r"pass_at_1_given_format", "given format"),
  (r"steps_correct", "right steps"),
  (r"maj_at_(\d+)", r"maj@\1"),
  (r"pass_at_(\d+)", r"pass@\1"),
  (r"format", "good format"),
)


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean as a fraction, with n problems behind it.

  Attributes:
    mean: the estimate.
    ends: (low, high) of its 95% interval; None where none was measured.
    n: problems; None where not said.
  """

  mean: float
  ends: tuple[float, float] | None
  n: int | None

  def __str__(self) -> str:
    if self.ends is None:
      return f"{percent(self.mean)}%"
    low, high = map(percent, self.ends)
    return f"{percent(self.mean)}% [{low}, {high}]"

  @property
  def bounds(self) -> str:
    """The interval alone; "" where there is none."""
    return "" if self.ends is None else " – ".join(map(percent, self.ends))


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One stage's held-out evaluation.

  Attributes:
    name: the stage.
    measures: name in the summary -> Interval; see `measure_labels`.
    levels: level -> the same.
    headline: levels that `measures` are over.
    n_problems, n_samples: its size; None if not said.
  """

  name: str
  measures: dict[str, Interval]
  levels: dict[int, dict[str, Interval]]
  headline: frozenset[int]
  n_problems: int | None
  n_samples: int | None

  @property
  def label(self) -> str:
    return stage_label(self.name)

  def level_measure(self, level: int, measure: str) -> Interval | None:
    """The interval at a level; None if it was not measured."""
    return self.levels.get(level, {}).get(measure)


def interval(value: object) -> Interval | None:
  """{"mean", "low", "high", "n"} -> Interval; None without a finite mean."""
  if not isinstance(value, dict):
    return None
  mean, low, high, n = (value.get(k) for k in ("mean", "low", "high", "n"))
  if not is_number(mean):
    return None
  return Interval(
    mean=mean,
    ends=(low, high) if is_number(low) and is_number(high) else None,
    n=int(n) if is_number(n) else None,
  )


def _measures(record: Record) -> dict[str, Interval]:
  found = {key: interval(value) for key, value in record.items()}
  return {key: value for key, value in found.items() if value is not None}


def _levels(value: object) -> frozenset[int]:
  levels = value if isinstance(value, list) else []
  return frozenset(int(level) for level in levels if str(level).isdecimal())


def evaluation(name: str, record: Record) -> Evaluation:
  """Reads one evaluation's summary; what it lacks is empty."""
  levels = record.get("levels")
  by_level = {
    int(level): _measures(value)
    for level, value in (levels if isinstance(levels, dict) else {}).items()
    if str(level).isdecimal() and isinstance(value, dict)
  }
  n_problems, n_samples = record.get("n_problems"), record.get("n_samples")
  return Evaluation(
    name=name,
    measures=_measures(record),
    levels=dict(sorted(by_level.items())),
    headline=_levels(record.get("levels_trained")),
    n_problems=int(n_problems) if is_number(n_problems) else None,
    n_samples=int(n_samples) if is_number(n_samples) else None,
  )


def measure_labels(rows: Sequence[Evaluation]) -> dict[str, str]:
  """Name in the summary -> heading, of those that any row has, in order."""
  names = sorted({name for row in rows for name in row.measures})
  labels: dict[str, str] = {}
  for pattern, label in _MEASURES:
    for name in names:
      if match := re.fullmatch(pattern, name):
        labels.setdefault(name, match.expand(label))
  return labels


def evaluations(run: Run) -> list[Evaluation]:
  """The run's evaluations in the order of its stages; those with a pass@1."""
  read = [evaluation(name, record) for name, record in run.evaluations.items()]
  return [e for e in read if "pass_at_1" in e.measures]


def stage_figure(rows: Sequence[Evaluation]) -> Markup:
  """pass@1 of every stage with its interval, a row per stage.

  A hollow dot beside it is the accuracy given good format: where it lies far
  right of the filled one, a stage lost its points to form.
  """
  figure, axes = svg.make_axes(
    40 + 30 * len(rows), width=380, left=122, right=16, bottom=30, top=4
  )
  for y, row in enumerate(rows):
    value = row.measures["pass_at_1"]
    given = row.measures.get("pass_at_1_given_format")
    if given is not None:
      if given.ends is not None:
        axes.plot(
          given.ends,
          [y + 0.2] * 2,
          color=svg.COLOURS["line2"],
          lw=1.25,
          alpha=0.7,
        )
      axes.plot(
        given.mean,
        y + 0.2,
        marker="o",
        ms=5,
        mew=1.5,
        clip_on=False,
        mfc=svg.COLOURS["page"],
        mec=svg.COLOURS["line2"],
      )
    if value.ends is not None:
      axes.plot(value.ends, [y - 0.1] * 2, color=svg.COLOURS["line1"], lw=2.5)
    axes.plot(
      value.mean,
      y - 0.1,
      marker="o",
      ms=7,
      mew=0,
      clip_on=False,
      color=svg.COLOURS["line1"],
    )
  axes.set_ylim(len(rows) - 0.4, -0.6)
  axes.set_yticks(
    range(len(rows)), [row.label for row in rows], color=svg.COLOURS["ink"]
  )
  axes.tick_params(axis="y", pad=120)
  for label in axes.get_yticklabels():
    label.set_horizontalalignment("left")
  axes.set_xlim(0, 1)
  ticks = (0, 0.25, 0.5, 0.75, 1)
  axes.set_xticks(ticks, svg.percent_ticks(ticks))
  axes.grid(axis="x")
  axes.spines["bottom"].set_visible(False)
  return svg.to_svg(figure, "Held-out pass@1 after each stage")


def level_figure(
  row: Evaluation,
  before: Evaluation | None,
  levels: Sequence[int],
  *,
  shaded: Collection[int],
  unseen: Collection[int],
) -> Markup:
  """pass@1 by level after one stage, over the stage before it in grey.

  Args:
    row: the stage.
    before: what it started from, if that was evaluated.
    levels: on the axis, in order.
    shaded: levels on a shaded ground.
    unseen: levels with hollow dots.
  """
  figure, axes = svg.make_axes(150, width=190, left=34, right=6, bottom=36)
  positions = {level: x for x, level in enumerate(levels)}
  for level in levels:
    if level in shaded:
      x = positions[level]
      axes.axvspan(x - 0.5, x + 0.5, color=svg.COLOURS["beyond"], lw=0)
  for each, colour, width in (
    (before, svg.COLOURS["faint"], 1.25),
    (row, svg.COLOURS["line1"], 1.75),
  ):
    points = [
      (positions[level], value)
      for level in levels
      if each is not None
      and (value := each.level_measure(level, "pass_at_1")) is not None
    ]
    axes.plot(
      [x for x, _ in points],
      [v.mean for _, v in points],
      color=colour,
      lw=width,
      clip_on=False,
    )
    if each is row:
      for x, value in points:
        if value.ends is not None:
          axes.vlines(x, *value.ends, color=colour, lw=2.5)
      for x, value in points:
        axes.plot(
          x,
          value.mean,
          marker="o",
          ms=6,
          mew=1.5,
          mec=colour,
          clip_on=False,
          mfc=svg.COLOURS["page"] if levels[x] in unseen else colour,
        )
  axes.set_xlim(-0.5, len(levels) - 0.5)
  every = -(-len(levels) // 8)  # room for eight labels
  axes.set_xticks(
    range(0, len(levels), every), [str(level) for level in levels[::every]]
  )
  axes.set_xlabel("level", loc="right", labelpad=4)
  axes.set_ylim(0, 1)
  ticks = (0, 0.5, 1)
  axes.set_yticks(ticks, svg.percent_ticks(ticks))
  axes.grid(axis="y")
  return svg.to_svg(figure, f"Held-out pass@1 by level: {row.label}")
