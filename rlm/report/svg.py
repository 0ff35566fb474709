"""Matplotlib figures as small inline SVG that follows the page's theme.

A figure is drawn in sentinel colours, each of which becomes a CSS variable:
the same picture is dark on light or light on dark, as the reader prefers, and
text stays text. One unit is one CSS pixel on a phone, so labels stay legible
there. Figures need no pyplot and leave no global state.
"""

import contextlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from rlm.report.text import significant

# Names of report.css; the hex values appear nowhere else in a figure.
COLOURS = {
  name: f"#fe{i:02x}01"
  for i, name in enumerate(
    ["ink", "muted", "faint", "rule", "page", "beyond"]
    + [f"line{i}" for i in range(1, 5)]
    + [f"ramp{i}" for i in range(1, 9)]
  )
}
_NAMES = {code: name for name, code in COLOURS.items()}
_RC: dict[Any, Any] = {
  "font.size": 11,
  "svg.fonttype": "none",  # text stays text, in the page's font
  "text.parse_math": False,  # labels may hold a $
  "axes.unicode_minus": True,
  "axes.edgecolor": COLOURS["rule"],
  "axes.linewidth": 1,
  "axes.axisbelow": True,
  "axes.spines.left": False,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "grid.color": COLOURS["rule"],
  "grid.linewidth": 0.8,
  "xtick.color": COLOURS["muted"],
  "ytick.color": COLOURS["muted"],
  "xtick.major.size": 0,
  "ytick.major.size": 0,
  "text.color": COLOURS["ink"],
  "axes.labelcolor": COLOURS["muted"],
  "lines.linewidth": 1.75,
  "lines.solid_capstyle": "round",
}
_STEPS = (1, 2, 2.5, 5, 10)  # between round ticks
WIDTH = 350  # of a panel, in pixels


def ramp(n: int) -> list[str]:
  """`n` colours in order, for levels or layers; they repeat past eight."""
  if n <= 1:
    return [COLOURS["line1"]] * n
  if n > 8:
    return [COLOURS[f"ramp{i % 8 + 1}"] for i in range(n)]
  return [COLOURS[f"ramp{1 + round(7 * i / (n - 1))}"] for i in range(n)]


def colour_name(code: str) -> str:
  """The CSS variable's name behind a sentinel colour."""
  return _NAMES[code]


@contextlib.contextmanager
def drawing() -> Iterator[None]:
  """Figures made, drawn and written inside have the report's style."""
  with matplotlib.rc_context():
    matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
    matplotlib.rcParams.update(_RC)
    yield


def make_axes(
  height: int = 190,
  *,
  width: int = WIDTH,
  left: int = 46,
  right: int = 10,
  bottom: int = 34,
  top: int = 8,
) -> tuple[Figure, Axes]:
  """A figure of `width` by `height` pixels; margins in pixels too."""
  figure = Figure(figsize=(width / 72, height / 72))
  axes = figure.add_axes(
    (
      left / width,
      bottom / height,
      (width - left - right) / width,
      (height - top - bottom) / height,
    )
  )
  axes.tick_params(pad=5)
  return figure, axes


def style_values(axes: Axes, *, log: bool, fraction: bool) -> None:
  """Grid and labels of a vertical axis of values."""
  axes.grid(axis="y")
  if log:
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    ticks = log_ticks(*axes.get_ylim())
    axes.set_yticks(ticks, [significant(tick, 1) for tick in ticks])
    return
  axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
  if fraction:
    axes.yaxis.set_major_formatter(
      FuncFormatter(lambda value, _: f"{significant(100 * value, 2)}%")
    )
  else:
    axes.yaxis.set_major_formatter(
      FuncFormatter(lambda value, _: significant(value, 3))
    )


def log_ticks(low: float, high: float) -> list[float]:
  """At most five round values in [low, high] > 0, evenly spread in the log."""
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for mantissas in (range(1, 10), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
    ticks = [m * 10.0**d for d in decades for m in mantissas]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) <= 5:
      return ticks
  return ticks[:: math.ceil(len(ticks) / 5)]


def style_steps(axes: Axes, label: str = "step") -> None:
  """A horizontal axis of whole steps."""
  axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=True))
  axes.xaxis.set_major_formatter(
    FuncFormatter(lambda value, _: _short_step(value))
  )
  axes.set_xlabel(label, loc="right", labelpad=2)


def _short_step(value: float) -> str:
  if abs(value) >= 1e6:
    return f"{value / 1e6:g}M"
  return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def percent_ticks(axis_ticks: Sequence[float]) -> list[str]:
  """[0, 0.5, 1] -> ["0", "50", "100%"]: the sign once, at the end."""
  labels = [f"{100 * tick:.0f}" for tick in axis_ticks]
  return [*labels[:-1], f"{labels[-1]}%"]


def to_svg(figure: Figure, label: str) -> Markup:
  """The figure as an <svg> element for the middle of an HTML page.

  Args:
    figure: drawn inside `drawing()`.
    label: what it shows, for those who do not see it; unescaped.

  Returns:
    SVG without fixed size, fonts, metadata, namespaces or addresses.
  """
  buffer = io.StringIO()
  # Clip paths are named by a hash: the salt keeps them apart on one page.
  with matplotlib.rc_context({"svg.hashsalt": label}):
    figure.savefig(
      buffer,
      format="svg",
      transparent=True,
      metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
  svg = re.sub(
    r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL
  )
  svg = re.sub(
    r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>",
    lambda m: (
      f'<svg viewBox="{m[1]}" role="img" aria-label={quoteattr(label)}>'
    ),
    svg,
    count=1,
  )
  svg = svg.replace("xlink:href", "href")
  used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", svg))
  svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
  svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', _rounded, svg)
  svg = re.sub(
    r"#[0-9a-f]{6}",
    lambda m: f"var(--{_NAMES[m[0]]})" if m[0] in _NAMES else m[0],
    svg,
  )
  # The page's font, at the size asked for.
  svg = re.sub(r"; font-family: [^;\"]*", "", svg)
  svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", svg)
  return Markup(re.sub(r"\n\s*", "\n", svg))


def _rounded(match: re.Match[str]) -> str:
  text = re.sub(r"(\d+\.\d)\d+", r"\1", match[0])
  return re.sub(r"\s*([MLCQz])\s*", r"\1", text)
