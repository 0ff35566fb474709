"""Who did the work: the share of tokens each expert got, over steps."""

import itertools

import numpy as np
from markupsafe import Markup

from rlm.report import svg
from rlm.report.curves import Chart
from rlm.report.run_folder import Record
from rlm.report.series import nested

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
  shown = np.unique(
    np.linspace(0, n_layers - 1, min(n_layers, _LAYERS)).astype(int)
  )
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
    for layer in shown
    if n_experts
  ]


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
