"""Curves over a stage's steps: what is drawn, and how to read it.

`PANELS` is the table: a panel appears for every stage that logged one of its
metrics, so pretraining, SFT and RL need no cases of their own.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from rlm.report import svg
from rlm.report.run_folder import Record, flat, natural
from rlm.report.series import Series, decimate, nested, series, smooth
from rlm.report.text import is_number, significant

_BUCKETS = 150  # a panel is 350 pixels wide: more points would not be seen


@dataclasses.dataclass(frozen=True)
class Panel:
  """One plot.

  Attributes:
    title: what it shows.
    explanation: one sentence for a reader new to it.
    lines: (regular expression of the metric's whole name, label); a group of
      the expression can be used in the label, and each match is a line.
    log: logarithmic values.
    fraction: values are shares, shown in percent.
    limits: (lowest, highest) value on the axis; None fits the data.
    reference: (value, label) of a line to compare with, or None.
    text_entropies: the caller's references (entropies of the text) go here.
    smoothed: whether values are noisy enough for a moving average.
    whole: whole numbers, held from step to step.
    idle: where every value is this one, nothing happened: no panel, or, if
      `idle_note` says so, the panel with that note.
    idle_note: a sentence; where every ratio is 1, that on-policy updates have
      nothing to clip stands in its place.
  """

  title: str
  explanation: str
  lines: tuple[tuple[str, str], ...]
  log: bool = False
  fraction: bool = False
  limits: tuple[float | None, float | None] = (None, None)
  reference: tuple[float, str] | None = None
  text_entropies: bool = False
  smoothed: bool = True
  whole: bool = False
  idle: float | None = None
  idle_note: str = ""


_ON_POLICY = (
  "On-policy throughout: a rollout makes one update, so every ratio is 1 and"
  " there is nothing to clip."
)

PANELS = (
  Panel(
    "Loss",
    "Cross-entropy per predicted token, in nats; lower is better. MTP is the"
    " extra head that predicts a token further ahead.",
    (
      (r"loss/next_token", "next token"),
      (r"loss/mtp", "MTP"),
    ),
  ),
  Panel(
    "Held-out bits per byte",
    "How many bits the model needs for a byte of text that it never trained"
    " on. Below the dashed lines it knows more than letter and letter-pair"
    " frequencies.",
    ((r"heldout/(.+)/bits_per_byte", r"\1"),),
    text_entropies=True,
  ),
  Panel(
    "Worked problems",
    "Share of held-out problems whose whole worked answer is the model's first"
    " choice, token by token.",
    ((r"level/(\d+)/worked_accuracy", r"level \1"),),
    fraction=True,
    limits=(0, 1),
  ),
  Panel(
    "Balance loss",
    "The sequence-wise term that keeps experts evenly used.",
    ((r"loss/balance", "balance"),),
  ),
  Panel(
    "Reward",
    "Mean over the completions of a step: what RL maximises.",
    ((r"reward/mean", "total"), (r"reward/(?!mean$|std$)(.+)", r"\1")),
    limits=(0, None),
  ),
  Panel(
    "Accuracy while training",
    "Share of sampled completions with the right answer. “Given format”"
    " counts only the well-formed ones, so the gap is format, not reasoning.",
    (
      (r"accuracy", "accuracy"),
      (r"accuracy_given_format", "given format"),
      (r"steps_correct", "right steps"),
    ),
    fraction=True,
    limits=(0, 1),
  ),
  Panel(
    "Accuracy by level",
    "The same, by difficulty of the problem.",
    ((r"level/(\d+)/accuracy", r"level \1"),),
    fraction=True,
    limits=(0, 1),
  ),
  Panel(
    "Curriculum level",
    "The hardest level drawn; it rises when success passes a threshold.",
    ((r"curriculum/level", "level"),),
    smoothed=False,
    whole=True,
  ),
  Panel(
    "Response length",
    "Tokens per completion; “finished” leaves out those cut at the limit.",
    (
      (r"response_length/mean", "all"),
      (r"response_length/finished", "finished"),
    ),
    limits=(0, None),
  ),
  Panel(
    "Cut at the length limit",
    "Share of completions that never reached their end.",
    ((r"truncated", "truncated"),),
    fraction=True,
    limits=(0, None),
    idle=0.0,
  ),
  Panel(
    "Entropy",
    "Nats per sampled token. Near zero the policy has stopped exploring.",
    ((r"entropy", "entropy"),),
    limits=(0, None),
  ),
  Panel(
    "KL to the reference",
    "How far the policy has moved from its reference, nats per token (k3).",
    ((r"kl", "KL"),),
    limits=(0, None),
  ),
  Panel(
    "Clipped tokens",
    "Share of tokens whose probability ratio hit the clip and gave no"
    " gradient.",
    (
      (r"clip_fraction/high", "above"),
      (r"clip_fraction/low", "below"),
    ),
    fraction=True,
    limits=(0, None),
    idle=0.0,
    idle_note="No token's ratio reached the clip.",
  ),
  Panel(
    "Probability ratio",
    "Extremes of new over old probability in a step; 1 is on-policy.",
    ((r"ratio/max", "largest"), (r"ratio/min", "smallest")),
    log=True,
    idle=1.0,
    idle_note=_ON_POLICY,
  ),
  Panel(
    "Groups without signal",
    "Share of prompts whose completions all got the same reward: they teach"
    " nothing.",
    ((r"zero_std_groups", "groups"),),
    fraction=True,
    limits=(0, None),
  ),
  Panel(
    "Gradient norm",
    "Before clipping. Spikes point at instability.",
    ((r"grad_norm", "norm"),),
    log=True,
  ),
  Panel(
    "Sampler against trainer",
    "Difference of the log-probability of the same token, with experts"
    " replayed. It should stay below the dashed line.",
    (
      (r"sampler_diff/max", "largest"),
      (r"sampler_diff/mean", "mean"),
    ),
    log=True,
    reference=(1e-4, "bound"),
  ),
  Panel(
    "Expert routes that flip",
    "Share of (layer, token) pairs whose router, along the sampler's route,"
    " would choose other experts in the trainer than it did in the sampler.",
    ((r"route_flip_rate", "flips"),),
    fraction=True,
    limits=(0, None),
  ),
  Panel(
    "MTP acceptance",
    "Chance that a speculative decoder takes the token drafted by the extra"
    " head.",
    ((r"mtp_acceptance", "accepted"),),
    fraction=True,
    limits=(0, 1),
  ),
  Panel(
    "Learning rate",
    "As scheduled.",
    ((r"learning_rate", "rate"),),
    limits=(0, None),
    smoothed=False,
  ),
  Panel(
    "Skipped updates",
    "Steps whose loss or gradient was not finite, masked.",
    ((r"nonfinite", "skipped"),),
    smoothed=False,
    whole=True,
    idle=0.0,
  ),
)


@dataclasses.dataclass(frozen=True)
class Key:
  """A legend's entry, set in HTML outside the data.

  Attributes:
    colour: a CSS variable's name.
    label: what the line is; may be text of strangers.
    last: its last value, formatted; "" for a reference.
    dashed: a reference line.
  """

  colour: str
  label: str
  last: str
  dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
  """A drawn panel; its texts are plain, not yet escaped."""

  title: str
  explanation: str
  svg: Markup
  keys: list[Key]


def charts(
  records: list[Record], references: Mapping[str, float]
) -> list[Chart]:
  """Every panel of `PANELS` for which `records` hold a finite value.

  Args:
    records: metrics of one stage.
    references: label -> bits per byte, drawn beside the held-out ones.

  Returns:
    Charts in the table's order, over one common range of steps; see
    `Panel.idle` for those in which nothing happened.
  """
  names = sorted({name for record in records for name in record})
  steps = series(records, "step").steps
  ratios = [series(records, f"ratio/{end}").values for end in ("max", "min")]
  on_policy = all(len(r) and (r == 1).all() for r in ratios)
  drawn = []
  for panel in PANELS:
    lines = _matches(panel, names, records)
    if not lines:
      continue
    if all((s.values == panel.idle).all() for _, s in lines):
      if not panel.idle_note:
        continue
      note = _ON_POLICY if on_policy else panel.idle_note
      panel = dataclasses.replace(
        panel, explanation=f"{panel.explanation} {note}"
      )
    reference = [] if panel.reference is None else [panel.reference]
    if panel.text_entropies:
      reference += [(value, label) for label, value in references.items()]
    drawn.append(draw(panel, lines, reference, steps))
  return drawn


def _matches(
  panel: Panel, names: list[str], records: list[Record]
) -> list[tuple[str, Series]]:
  found = []
  for pattern, label in panel.lines:
    matches = [m for n in names if (m := re.fullmatch(pattern, n))]
    matches.sort(key=lambda m: natural(m[0]))  # level/9 before level/10
    for match in matches:
      column = series(records, match[0])
      if len(column):
        found.append((match.expand(label), column))
  return found


def draw(
  panel: Panel,
  lines: list[tuple[str, Series]],
  references: list[tuple[float, str]],
  steps: np.ndarray,
) -> Chart:
  """One panel's chart: labelled lines over steps, and levels to compare."""
  figure, axes = svg.make_axes()
  colours = (
    [svg.COLOURS[f"line{i + 1}"] for i in range(len(lines))]
    if len(lines) <= 4 and "level" not in lines[0][0]
    else svg.ramp(len(lines))
  )
  keys: list[Key] = []
  for (label, data), colour in reversed(list(zip(lines, colours, strict=True))):
    last = data.last
    if panel.log:  # zeros have no place on it
      positive = data.values > 0
      data = Series(data.steps[positive], data.values[positive])
    if len(data) > 40 and panel.smoothed:
      thin = decimate(data, _BUCKETS)
      axes.plot(thin.steps, thin.values, color=colour, lw=0.8, alpha=0.3)
      data = smooth(data, _BUCKETS)
      last = data.last
    elif len(data) > 2 * _BUCKETS:
      data = decimate(data, _BUCKETS)
    axes.plot(
      data.steps,
      data.values,
      color=colour,
      marker="o" if len(data) <= 12 else None,
      markersize=4,
      clip_on=len(data) > 12,
      drawstyle="steps-post" if panel.whole else None,
    )
    shown = (
      f"{significant(100 * last)}%" if panel.fraction else significant(last)
    )
    keys.insert(0, Key(svg.colour_name(colour), label, shown))
  for value, label in references:
    axes.axhline(value, color=svg.COLOURS["muted"], lw=1, ls=(0, (4, 3)))
    keys.append(Key("muted", f"{label} {significant(value)}", "", True))
  if len(steps) and steps.max() > steps.min():
    axes.set_xlim(steps.min(), steps.max())
  low, high = panel.limits
  if low is not None:
    axes.set_ylim(bottom=low)
  if high is not None:
    axes.set_ylim(top=high)
  axes.margins(y=0.08)
  svg.style_values(axes, log=panel.log, fraction=panel.fraction)
  svg.style_steps(axes)
  if panel.whole:
    lowest = math.floor(min(data.values.min() for _, data in lines))
    highest = math.ceil(max(data.values.max() for _, data in lines))
    ticks = range(lowest, highest + 1, (highest - lowest) // 5 + 1)
    axes.set_ylim(lowest - 0.5, highest + 0.5)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
  return Chart(
    panel.title, panel.explanation, svg.to_svg(figure, panel.title), keys
  )


def text_entropies(summary: Record) -> dict[str, float]:
  """Entropies of the text, bits per byte, that a stage's summary reports.

  Any number under a key that names a unigram or bigram counts, nested or not:
  {"text": {"unigram_bits_per_byte": 4.7}} -> {"unigram entropy": 4.7}.
  """
  found: dict[str, float] = {}
  for key, value in flat(summary):
    for name in ("unigram", "bigram"):
      if name in key and is_number(value):
        found.setdefault(f"{name} entropy", value)
  return found


def expert_balance(records: list[Record]) -> Chart | None:
  """The busiest expert's load over the even share, a line per MoE layer."""
  steps, values = nested(records, "expert_load/max_over_mean")
  if values.ndim != 2 or not values.size:
    return None
  n = values.shape[1]
  shown = np.unique(np.linspace(0, n - 1, min(n, 8)).astype(int))
  panel = Panel(
    "Busiest expert",
    "Its tokens over the even share, a line per layer; 1 is perfect balance.",
    (),
    reference=(1.0, "even"),
  )
  lines = []
  for layer in shown:
    finite = np.isfinite(values[:, layer])
    if finite.any():
      column = Series(steps[finite], values[finite, layer])
      lines.append((f"MoE layer {layer + 1}", column))
  if not lines:
    return None
  return draw(panel, lines, [(1.0, "even")], steps)
