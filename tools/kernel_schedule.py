"""What libtpu's compiler made of a Mosaic kernel: its instruction bundles.

A TPU core issues one bundle a cycle, in order, so that the bundles of a loop
are the cycles of a turn, waits for memory apart. libtpu writes them as text, on
a machine without a TPU too, when `DUMP_FLAGS` stand in LIBTPU_INIT_ARGS before
it is loaded.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Mapping

DUMP_FLAGS = (
  "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
  " --xla_mosaic_dump_to={folder}"
)
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s*(?:[A-Z]{2})?\s*:\s*(>*)\s*\{")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Bundles of one kernel.

  Attributes:
    by_depth: bundles in loops so deep and no deeper; 0 is outside of all.
    slots: by unit ("MXU", "VALU", "VSTORE:SPILL", ...), (used, there were) in
      the bundles of the deepest loops.
  """

  by_depth: Mapping[int, int]
  slots: Mapping[str, tuple[int, int]]

  @property
  def depth(self) -> int:
    """Of the deepest loop."""
    return max(self.by_depth)

  def share(self, unit: str) -> float:
    """Of a unit's slots that the deepest loops use."""
    used, there = self.slots[unit]
    return used / there


def read_schedule(folder: pathlib.Path, kernel: str) -> Schedule:
  """Reads what libtpu wrote of the kernel whose `pallas_call` has this name.

  Raises:
    ValueError: it wrote nothing of that name, or in another layout than that of
      libtpu 0.0.42.
  """
  bundles = sorted(folder.glob(f"*{kernel}*-final_bundles.txt"))
  bundles = [p for p in bundles if "schedule-analysis" not in p.name]
  units = sorted(
    folder.glob(f"*{kernel}*-final_hlo-static-per-bundle-utilization.txt")
  )
  if not bundles or not units:
    raise ValueError(
      f"{folder} holds no bundles of {kernel}. Set LIBTPU_INIT_ARGS to"
      f" {DUMP_FLAGS!r} before jax starts."
    )
  text = bundles[-1].read_text()
  depths = [
    len(found[1])
    for line in text.splitlines()
    if (found := _BUNDLE.match(line))
  ]
  return Schedule(
    dict(collections.Counter(depths)), _slots(units[-1].read_text(), depths)
  )


def _slots(text: str, depths: list[int]) -> dict[str, tuple[int, int]]:
  lines = text.splitlines()
  at = next((i for i, line in enumerate(lines) if "CAPAC" in line), None)
  rows = [line.split() for line in lines if re.fullmatch(r"[\d ]+", line)]
  if at is None or len(rows) != len(depths) + 1:
    raise ValueError(
      f"{len(depths)} bundles and {len(rows)} lines of units do not belong"
      " together: this libtpu writes another layout."
    )
  names = [name.strip() for name in lines[at + 1].split(",")]
  capacity = [int(n) for n in rows[0]]
  deepest = max(depths)
  inner = [
    row for row, depth in zip(rows[1:], depths, strict=True) if depth == deepest
  ]
  return {
    name: (sum(int(row[i]) for row in inner), capacity[i] * len(inner))
    for i, name in enumerate(names)
  }
