"""Several seeds of a recipe and its controls: tables and a page of their own.

Every seed is shown; a mean stands beside the seeds it is made of.
"""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlm.report import svg
from rlm.report.findings import signed
from rlm.report.html import write_page
from rlm.report.run_folder import Record, stage_label
from rlm.report.text import count, is_number, percent, visible

_VERDICTS = {
  "holds": "holds here",
  "reversed": "the reverse holds here",
  "undecided": "undecided: the interval spans zero",
}
_STYLES = {"holds": "green", "reversed": "red", "undecided": "yellow"}


def verdict_text(claim: Record) -> str:
  """What the study says of a claim, and why it says nothing if so."""
  if claim["verdict"] == "undecided" and claim["low"] is None:
    seeds, measured = len(claim["by_seed"]), claim["n"]
    if measured < seeds:
      return f"undecided: measured in {measured} of {seeds} seeds"
    return "undecided: one seed has no interval"
  return _VERDICTS[claim["verdict"]]


def difference_text(claim: Record, value: object) -> str:
  """A difference in its unit: +43.9 points, or +3.1 tokens."""
  if not is_number(value):
    return "–"
  if claim["measure"] == "response_length":
    return f"{signed(value)} tokens"
  return f"{signed(100 * value)} points"


def interval_text(claim: Record) -> str:
  """A claim's interval, without the unit: −1.2 to +4.0."""
  if claim["low"] is None:
    return "no interval"
  scale = 1 if claim["measure"] == "response_length" else 100
  low, high = (signed(scale * claim[key]) for key in ("low", "high"))
  return f"{low} to {high}"


def comparison_tables(comparison: Record) -> Group:
  """The claims with their verdicts, and every stage's accuracy by seed.

  Args:
    comparison: what `rlm.eval.comparison.compare` gives.

  Returns:
    Tables for `rich.console.Console().print`.
  """
  confidence = f"{100 * comparison['confidence']:g}%"
  claims = Table(
    title="R1's findings, stage minus control, paired by seed",
    caption=f"mean over seeds, its {confidence} t interval, then each seed",
    **_LOOK,
  )
  claims.add_column("claim", ratio=3)
  claims.add_column("difference", justify="right", ratio=2)
  claims.add_column("seeds", justify="right", ratio=1)
  claims.add_column("verdict", ratio=2)
  for claim in comparison["claims"]:
    seeds = [
      difference_text(claim, value).split()[0]
      for value in claim["by_seed"].values()
    ]
    pair = f"{stage_label(claim['stage'])} − {stage_label(claim['control'])}"
    claims.add_row(
      Text.assemble(claim["statement"], "\n", (visible(pair), "dim")),
      Text.assemble(
        difference_text(claim, claim["mean"]),
        "\n",
        (interval_text(claim), "dim"),
      ),
      "\n".join(seeds),
      Text(verdict_text(claim), _STYLES[claim["verdict"]]),
    )
  stages = Table(
    title="Held-out pass@1 of every seed",
    caption=f"percent; mean over seeds with its {confidence} t interval",
    **_LOOK,
  )
  stages.add_column("stage", no_wrap=True)
  stages.add_column("mean", justify="right", no_wrap=True)
  stages.add_column("interval", justify="right", no_wrap=True)
  for seed in comparison["seeds"]:
    stages.add_column(f"seed {seed}", justify="right", no_wrap=True)
  for name, measures in comparison["stages"].items():
    value = measures["pass_at_1"]
    stages.add_row(
      Text(visible(stage_label(name))),
      percent(value["mean"]),
      Text(_bounds(value), "dim"),
      *(percent(seed["mean"]) for seed in value["by_seed"].values()),
    )
  return Group(claims, stages)


_LOOK: dict[str, Any] = {
  "title_justify": "left",
  "caption_justify": "left",
  "title_style": "bold",
  "caption_style": "dim",
  "box": box.SIMPLE_HEAD,
  "pad_edge": False,
}


def _bounds(value: Record) -> str:
  if value["low"] is None:
    return "–"
  return f"{percent(value['low'])} – {percent(value['high'])}"


def write_comparison(path: Path, comparison: Record) -> None:
  """Writes the page: verdicts, accuracy and length by seed, levels, cost.

  Args:
    path: of the page.
    comparison: what `rlm.eval.comparison.compare` gives, with "title", and
      "costs": stage -> {"flops": {seed: number}}.
  """
  stages = comparison["stages"]
  levels = sorted(
    {level for s in stages.values() for level in s.get("levels", {})}, key=int
  )
  with svg.drawing():
    figure = _figure(comparison)
  write_page(
    path,
    "comparison.html.jinja",
    {
      "title": comparison["title"],
      "confidence": f"{100 * comparison['confidence']:g}%",
      "seeds": comparison["seeds"],
      "claims": [
        claim
        | {
          "stage": stage_label(claim["stage"]),
          "control": stage_label(claim["control"]),
          "difference": difference_text(claim, claim["mean"]),
          "interval": interval_text(claim),
          "seeds": [
            difference_text(claim, v).split()[0]
            for v in claim["by_seed"].values()
          ],
          "said": verdict_text(claim),
        }
        for claim in comparison["claims"]
      ],
      "figure": figure,
      "accuracy": [
        (
          stage_label(name),
          percent(measures["pass_at_1"]["mean"]),
          _bounds(measures["pass_at_1"]),
          [
            (percent(seed["mean"]), _bounds(seed))
            for seed in measures["pass_at_1"]["by_seed"].values()
          ],
          _number(measures["pass_at_1_given_format"]["mean"], 100),
          _number(measures["response_length"]["mean"], 1),
        )
        for name, measures in stages.items()
      ],
      "levels": levels,
      "by_level": [
        (
          stage_label(name),
          [
            (percent(value["mean"]), _bounds(value))
            for level in levels
            for value in [measures["levels"][level]["pass_at_1"]]
          ],
        )
        for name, measures in stages.items()
        if "levels" in measures
      ],
      "costs": [
        (stage_label(name), [count(v) for v in cost["flops"].values()])
        for name, cost in comparison["costs"].items()
      ],
    },
  )


def _number(value: object, scale: float) -> str:
  return f"{scale * value:.1f}" if is_number(value) else "–"


def _figure(comparison: Record) -> Any:
  """pass@1 of every stage: a dot per seed, and the mean as a stroke."""
  stages = comparison["stages"]
  figure, axes = svg.make_axes(
    40 + 30 * len(stages), width=380, left=130, right=16, bottom=30, top=4
  )
  for y, measures in enumerate(stages.values()):
    value = measures["pass_at_1"]
    axes.plot(
      [value["mean"]] * 2, [y - 0.3, y + 0.3], color=svg.COLOURS["ink"], lw=1.75
    )
    means = [seed["mean"] for seed in value["by_seed"].values()]
    axes.plot(
      means,
      [y] * len(means),
      linestyle="none",
      marker="o",
      ms=6,
      mew=0,
      alpha=0.7,
      clip_on=False,
      color=svg.COLOURS["line1"],
    )
  axes.set_ylim(len(stages) - 0.4, -0.6)
  axes.set_yticks(
    range(len(stages)),
    [stage_label(s) for s in stages],
    color=svg.COLOURS["ink"],
  )
  axes.tick_params(axis="y", pad=128)
  for label in axes.get_yticklabels():
    label.set_horizontalalignment("left")
  axes.set_xlim(0, 1)
  ticks = (0, 0.25, 0.5, 0.75, 1)
  axes.set_xticks(ticks, svg.percent_ticks(ticks))
  axes.grid(axis="x")
  axes.spines["bottom"].set_visible(False)
  return svg.to_svg(figure, "Held-out pass@1 of every stage and seed")
