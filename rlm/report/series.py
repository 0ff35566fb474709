"""Columns of a run's metrics, short enough to draw and honest about spikes."""

import dataclasses
import itertools

import numpy as np

from rlm.report.run_folder import Record
from rlm.report.text import is_number


@dataclasses.dataclass(frozen=True)
class Series:
  """One metric over steps; both float64 [n], finite, n may be 0."""

  steps: np.ndarray
  values: np.ndarray

  def __len__(self) -> int:
    return len(self.steps)

  @property
  def last(self) -> float:
    return float(self.values[-1])


def series(records: list[Record], name: str) -> Series:
  """The steps at which `name` was logged as a finite number."""
  pairs = [
    (record["step"], record[name])
    for record in records
    if name in record
    and is_number(record[name])
    and "step" in record
    and is_number(record["step"])
  ]
  table = np.array(pairs, np.float64).reshape(-1, 2)
  return Series(table[:, 0], table[:, 1])


def nested(records: list[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
  """A metric that is a (nested) list: steps [n] and values [n, ...].

  Steps whose shape differs from the first one's are left out (a run continued
  under another config); nulls become NaN.
  """
  steps: list[float] = []
  values: list[np.ndarray] = []
  for record in records:
    if not isinstance(record.get(name), list) or not is_number(
      record.get("step")
    ):
      continue
    try:
      value = np.array(record[name], np.float64)
    except (TypeError, ValueError):  # ragged, or text
      continue
    if not values or value.shape == values[0].shape:
      steps.append(record["step"])
      values.append(value)
  return np.array(steps), np.array(values)


def decimate(data: Series, buckets: int) -> Series:
  """At most two points a bucket, its lowest and highest: spikes survive."""
  if len(data) <= 2 * buckets:
    return data
  edges = np.linspace(0, len(data), buckets + 1).astype(int)
  keep: list[int] = []
  for start, end in itertools.pairwise(edges):
    window = data.values[start:end]
    keep.extend(
      sorted({start + int(window.argmin()), start + int(window.argmax())})
    )
  return Series(data.steps[keep], data.values[keep])


def smooth(data: Series, points: int) -> Series:
  """A moving average over 5% of the run, thinned to `points`.

  Centred; near an end it is over what there is of the window.
  """
  n = len(data)
  half = max(1, n // 40)
  total = np.concatenate([[0.0], np.cumsum(data.values)])
  start = np.maximum(np.arange(n) - half, 0)
  end = np.minimum(np.arange(n) + half + 1, n)
  mean = (total[end] - total[start]) / (end - start)
  keep = np.unique(np.linspace(0, n - 1, min(n, points)).astype(int))
  return Series(data.steps[keep], mean[keep])
