"""Who did the work: the share of tokens each expert got, over steps.

Beside it, from runs that logged them (`rlm.models.balance`), how far from even
the load was and where the expert bias that evens it stood.
"""

import itertools

import numpy as np
from markupsafe import Markup

from rlm.report import svg
from rlm.report.curves import Chart, Panel, draw
from rlm.report.run_folder import Record
from rlm.report.series import Series, nested

_COLUMNS = 120
_LAYERS = 8
# Over and under the even share; strength is opacity, so the page's own
# background shows through where the load is even, in both themes.
_OVER = (0xD9, 0x6A, 0x1F)
_UNDER = (0x3B, 0x7D, 0xC4)


def load_over_even(loads: np.ndarray) -> np.ndarray:
  """Token counts or shares [..., E] -> load over the even share; 1 is even.

  Rows without any token are NaN.
  """
  total = loads.sum(axis=-1, keepdims=True)
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.where(total > 0, loads * loads.shape[-1] / total, np.nan)


def load_colours(ratio: np.ndarray) -> np.ndarray:
  """uint8 [..., 4] colours of loads over the even share.

  log2 of the ratio, saturated at a quarter and at four times the even share;
  NaN is clear.
  """
  log = np.log2(np.clip(np.nan_to_num(ratio, nan=1.0), 0.25, 4.0)) / 2
  rgb = np.where((log > 0)[..., None], np.array(_OVER), np.array(_UNDER))
  alpha = np.round(255 * np.abs(log))[..., None]
  return np.concatenate([rgb, alpha], axis=-1).astype(np.uint8)


def heatmaps(records: list[Record]) -> list[Chart]:
  """A chart per MoE layer (eight at most, evenly chosen): experts by steps."""
  steps, loads = nested(records, "expert_load")
  if loads.ndim != 3 or not loads.size:
    return []
  edges = np.linspace(0, len(steps), min(len(steps), _COLUMNS) + 1).astype(int)
  with np.errstate(invalid="ignore"):
    columns = np.stack(
      [loads[a:b].mean(axis=0) for a, b in itertools.pairwise(edges)]
    )  # [columns, layers, experts]
  n_layers, n_experts = columns.shape[1:]
  return [
    Chart(
      f"MoE layer {layer + 1}",
      "",
      _heatmap(
        load_over_even(columns[:, layer]),
        steps,
        f"Expert load, MoE layer {layer + 1}",
      ),
      [],
    )
    for layer in _shown(n_layers)
    if n_experts
  ]


def balance_charts(records: list[Record]) -> list[Chart]:
  """MaxVio and the expert bias over steps; none that was not logged.

  A bias that is 0 throughout (a router without one) has no chart.
  """
  drawn = []
  steps, violation = nested(records, "expert_load/max_violation")
  if violation.ndim == 2 and violation.size:
    panel = Panel(
      "Load violation",
      "MaxVio of a step's batch: how far the busiest expert is above the mean,"
      " over the mean. 0 is perfect balance.",
      (),
      limits=(0, None),
    )
    columns = {
      "worst layer": violation.max(axis=1),
      "mean of layers": violation.mean(axis=1),
    }
    drawn += _chart(panel, steps, columns)
  steps, highest = nested(records, "expert_bias/highest")
  _, lowest = nested(records, "expert_bias/lowest")
  _, mean = nested(records, "expert_bias/mean")
  same = highest.ndim == 2 and highest.shape == lowest.shape == mean.shape
  if same and (highest.any() or lowest.any()):
    panel = Panel(
      "Expert bias",
      "What is added to the router's scores, 0 to 1, before it chooses: over"
      " all experts of all layers.",
      (),
      smoothed=False,
    )
    columns = {
      "highest": highest.max(axis=1, initial=-np.inf),
      "mean": mean.mean(axis=1),
      "lowest": lowest.min(axis=1, initial=np.inf),
    }
    drawn += _chart(panel, steps, columns)
  steps, spread = nested(records, "expert_bias/std")
  if spread.ndim == 2 and np.nan_to_num(spread).any():
    panel = Panel(
      "Spread of the bias",
      "Standard deviation over a layer's experts: what the bias decides, since"
      " a constant on all of them changes no choice.",
      (),
      limits=(0, None),
      smoothed=False,
    )
    shown = _shown(spread.shape[1])
    columns = {f"MoE layer {i + 1}": spread[:, i] for i in shown}
    drawn += _chart(panel, steps, columns)
  return drawn


def _chart(
  panel: Panel, steps: np.ndarray, columns: dict[str, np.ndarray]
) -> list[Chart]:
  """The panel with its columns where they are finite; [] if nowhere."""
  lines = []
  for label, values in columns.items():
    finite = np.isfinite(values)
    if finite.any():
      lines.append((label, Series(steps[finite], values[finite])))
  return [draw(panel, lines, [], steps)] if lines else []


def _shown(n_layers: int) -> np.ndarray:
  """Of many layers, those drawn: eight at most, evenly chosen."""
  return np.unique(
    np.linspace(0, n_layers - 1, min(n_layers, _LAYERS)).astype(int)
  )


def _heatmap(ratio: np.ndarray, steps: np.ndarray, label: str) -> Markup:
  n_experts = ratio.shape[1]
  figure, axes = svg.make_axes(max(120, min(200, 42 + 14 * n_experts)))
  last = steps[-1] if steps[-1] > steps[0] else steps[0] + 1
  axes.imshow(
    load_colours(ratio.T),
    extent=(steps[0], last, n_experts + 0.5, 0.5),
    aspect="auto",
    interpolation="none",
  )
  svg.style_steps(axes)
  ticks = np.unique(
    np.linspace(1, n_experts, min(n_experts, 4)).round().astype(int)
  )
  axes.set_yticks(ticks)
  axes.set_ylabel("expert", loc="top", labelpad=4)
  return svg.to_svg(figure, label)
