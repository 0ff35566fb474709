"""Replica groups of HLO collectives, and the mesh axes that they run over."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from tools.hlo_program import HloError, Instruction

OTHER = ("other",)


@dataclasses.dataclass(frozen=True)
class MeshAxes:
  """A mesh by its axes; partition p of the program is its p-th device.

  The ids in an SPMD program's groups count the devices in the order of
  `mesh.devices.flat`, whatever their own ids are.

  Attributes:
    names: of the axes, slowest first.
    sizes: devices along each.
    coords: [devices, k], each device's place on the torus, in the order of
      `mesh.devices.flat`; None where there is none (CPU).
  """

  names: tuple[str, ...]
  sizes: tuple[int, ...]
  coords: np.ndarray | None = dataclasses.field(default=None, compare=False)

  @classmethod
  def of(cls, mesh) -> "MeshAxes":
    """From a `jax.sharding.Mesh`, of real or of described devices."""
    devices = list(mesh.devices.flat)
    coords = [getattr(d, "coords", None) for d in devices]
    return cls(
      tuple(mesh.axis_names),
      tuple(mesh.devices.shape),
      None if None in coords else np.array(coords, dtype=int),
    )

  @property
  def size(self) -> int:
    return math.prod(self.sizes)

  def groups(self, axes: Sequence[str]) -> np.ndarray:
    """Devices that differ in these axes only, int [groups, members]."""
    ids = np.arange(self.size).reshape(self.sizes)
    within = [self.names.index(a) for a in self.names if a in axes]
    across = [k for k in range(len(self.sizes)) if k not in within]
    n = math.prod(self.sizes[k] for k in within)
    return ids.transpose(across + within).reshape(-1, n)

  def axes_of(self, groups: np.ndarray) -> tuple[str, ...]:
    """Names of the axes that these groups span, `OTHER` if none fit.

    Axes of size 1 are left out; no axes at all: each device is alone.
    """
    if groups.size != self.size or groups.shape[1] == 1:
      return () if groups.shape[-1] == 1 else OTHER
    names = [n for n, s in zip(self.names, self.sizes, strict=True) if s > 1]
    wanted = _canonical(groups)
    for k in range(1, len(names) + 1):
      for axes in itertools.combinations(names, k):
        candidate = self.groups(axes)
        if candidate.shape == groups.shape and np.array_equal(
          _canonical(candidate), wanted
        ):
          return axes
    return OTHER

  def axes_of_pairs(self, pairs: np.ndarray) -> tuple[str, ...]:
    """Names of the axes along which (source, target) pairs move."""
    moved = pairs[pairs[:, 0] != pairs[:, 1]]
    if not len(moved):
      return ()
    source, target = (np.unravel_index(moved[:, k], self.sizes) for k in (0, 1))
    return tuple(
      n
      for n, s, t in zip(self.names, source, target, strict=True)
      if (s != t).any()
    )


def replica_groups(i: Instruction, partitions: int) -> np.ndarray:
  """A collective's groups.

  Args:
    i: the collective.
    partitions: devices of the program; `replica_groups={}` is all of them.

  Returns:
    int [groups, members].

  Raises:
    HloError: the groups differ in size, or are in no form known.
  """
  text = i.attributes.get("replica_groups", "{}")
  return parse_groups(text, partitions)


@functools.lru_cache(maxsize=1024)
def parse_groups(text: str, partitions: int) -> np.ndarray:
  """Groups in any of the forms that XLA prints; see `replica_groups`.

  `{{0,1},{2,3}}` in full; `[2,4]<=[8]` and `[64,8]<=[8,64]T(1,0)` as an iota,
  reshaped and transposed; `mesh['a'=8,'b'=64], device_ids=([64,8]T(1,0))
  {'a'}` as axes of a mesh of devices, in which `'a':(2)4` is the part of size 4
  of an axis whose slower part is of size 2.
  """
  text = text.strip()
  if text in ("", "{}"):
    return np.arange(partitions)[None]
  if text.startswith("mesh"):
    return _mesh_groups(text)
  if "<=" in text:
    shape, _, source = text.partition("<=")
    return _iota(source).reshape(_numbers(shape))
  if re.fullmatch(r"\{(\{[\d,\s]*\},?\s*)*\}", text):
    groups = [_numbers(g) for g in re.findall(r"\{([\d,\s]*)\}", text[1:-1])]
    if len({len(g) for g in groups}) != 1:
      raise HloError(f"groups of different sizes: {text[:80]}")
    return np.array(groups)
  raise HloError(f"replica_groups in no known form: {text[:80]}")


def source_target_pairs(i: Instruction) -> np.ndarray:
  """Who sends to whom in a collective-permute, int [pairs, 2].

  Raises:
    HloError: it has none.
  """
  numbers = i.integers("source_target_pairs")
  if not numbers:
    raise HloError(f"{i.name}: no source_target_pairs")
  return np.array(numbers).reshape(-1, 2)


def _canonical(groups: np.ndarray) -> np.ndarray:
  """The same partition always as the same array."""
  ordered = np.sort(groups, axis=1)
  return ordered[np.argsort(ordered[:, 0])]


def _numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
  """`[8,64]T(1,0)`: 0, 1, ... reshaped and then transposed."""
  form = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip())
  if not form:
    raise HloError(f"not an iota of devices: {text[:80]}")
  dims = _numbers(form[1])
  ids = np.arange(math.prod(dims)).reshape(dims)
  return ids.transpose(_numbers(form[2])) if form[2] else ids


def _mesh_groups(text: str) -> np.ndarray:
  form = re.fullmatch(
    r"mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>.*)\))?"
    r"\s*\{(?P<over>[^}]*)\}",
    text,
  )
  if not form:
    raise HloError(f"replica_groups on a mesh, not understood: {text[:80]}")
  sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", form["axes"])}
  ids = np.arange(math.prod(sizes.values()))
  if form["ids"]:
    listed = "[" not in form["ids"]
    ids = np.array(_numbers(form["ids"])) if listed else _iota(form["ids"])
  over = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", form["over"])
  # Each axis in three: what is slower than the part in use, it, what is faster.
  dims, within = [], []
  for name, size in sizes.items():
    parts = [(int(b), int(s)) for n, b, s in over if n == name and s]
    if any(n == name and not s for n, _, s in over):
      parts = [(1, size)]
    done = 1
    for before, part in sorted(parts):
      dims.append(before // done)
      within.append(len(dims))
      dims.append(part)
      done = before * part
    dims.append(size // done)
  ids = ids.reshape(dims)
  across = [k for k in range(len(dims)) if k not in within]
  n = math.prod(dims[k] for k in within)
  return ids.transpose(across + within).reshape(-1, n)
