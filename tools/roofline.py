"""A step's time by term: matrix units, HBM and links of the chip.

A prediction needs an efficiency of the matrix units. It is not assumed: it is
solved from the published speed of another program for the same model and chips,
of which the operations and bytes are known, under the same assumptions.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlm.hardware import Chip
from tools import torus as links
from tools.hlo_groups import MeshAxes
from tools.hlo_traffic import Collective


@dataclasses.dataclass(frozen=True)
class Reference:
  """A published speed, with what its program does in a step.

  Attributes:
    name: of the program and where its figures are from.
    tokens_per_second: of a chip.
    tokens: of a chip in a step.
    model_flops: of a token, forward and backward, by formula.
    executed_flops: of a token, recomputation included.
    gathered: bytes of all-gathers that a chip sends in a step.
    reduced: bytes of all-reduces that a chip sends in a step.
    links: of a chip that both keep busy.
  """

  name: str
  tokens_per_second: float
  tokens: int
  model_flops: float
  executed_flops: float
  gathered: float
  reduced: float
  links: int

  @property
  def step_secs(self) -> float:
    return self.tokens / self.tokens_per_second

  def mfu(self, chip: Chip) -> float:
    """Model operations per second over the chip's peak."""
    return self.tokens_per_second * self.model_flops / chip.peak_flops


# MaxText's own table gives the speed of DeepSeek-V3 671B on v5p-1024, that is
# 512 chips: 542 tokens/s/chip at sequences of 8192, 6 to a chip. Its program,
# compiled ahead of time for v5p:8x8x8, is pure FSDP over the 512 chips and
# sends 2.68 TB of all-gathers and 2.67 TB of all-reduces a chip and step.
# Operations of a token: 281 GFLOP, attention causal; it recomputes every layer
# in full, one forward pass more: 4/3. Its HBM bytes and its exchange of 90 GB a
# chip with the host are in neither: they count as hidden behind the rest.
MAXTEXT = Reference(
  name="MaxText, DeepSeek-V3 671B, v5p:8x8x8, 8192 tokens, 6 rows a chip",
  tokens_per_second=542.0,
  tokens=8192 * 6,
  model_flops=281e9,
  executed_flops=281e9 * 4 / 3,
  gathered=2.68e12,
  reduced=2.67e12,
  links=6,  # three rings of 8, both ways
)


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """Share of the peak that matrix products reach, solved from a reference.

  Attributes:
    summed: where nothing overlaps: products, then collectives.
    overlapped: where collectives hide behind products completely.
  """

  summed: float
  overlapped: float


@dataclasses.dataclass(frozen=True)
class Term:
  """The collectives of one kind over the same axes.

  Attributes:
    name: of the collective and its axes.
    sent: bytes of a chip in a step.
    secs: that they take at least, over all links that lead the right way.
    emitted_secs: likewise, over those that the compiler's algorithm uses.
    unnamed: of `sent`, bytes of gathers, reductions and scatters whose
      algorithm the program does not name: `emitted_secs` has them over all
      links.
  """

  name: str
  sent: float
  secs: float
  emitted_secs: float
  unnamed: float


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A step's time under the two extreme assumptions.

  The HBM term is a lower bound that overlaps with products in both: what
  products lose to it is in the efficiency.

  Attributes:
    products_summed: seconds of products, at the efficiency `summed`.
    products_overlapped: seconds of products, at the efficiency `overlapped`.
    hbm: seconds of HBM traffic at full bandwidth.
    collectives: by kind and axes, longest first.
    tokens: of a chip in a step.
    model_flops: of a token, by formula.
    peak_flops: of the chip.
  """

  products_summed: float
  products_overlapped: float
  hbm: float
  collectives: Sequence[Term]
  tokens: float
  model_flops: float
  peak_flops: float

  def communication(self, *, emitted: bool) -> float:
    """Seconds of all collectives, one after the other.

    Args:
      emitted: over the links that the compiler's algorithms use; otherwise over
        all that lead the right way, which no algorithm beats.
    """
    return sum(t.emitted_secs if emitted else t.secs for t in self.collectives)

  def step_secs(self, *, overlap: bool, emitted: bool) -> float:
    """Seconds of a step.

    Args:
      overlap: collectives run behind the longest other term; otherwise none
        does.
      emitted: see `communication`.
    """
    communication = self.communication(emitted=emitted)
    if overlap:
      return max(self.products_overlapped, self.hbm, communication)
    return max(self.products_summed, self.hbm) + communication

  def tokens_per_second(self, secs: float) -> float:
    """Of a chip, in steps of this length."""
    return self.tokens / secs

  def mfu(self, secs: float) -> float:
    """Model operations over peak, in steps of this length."""
    return self.tokens_per_second(secs) * self.model_flops / self.peak_flops


def calibrate(chip: Chip, reference: Reference = MAXTEXT) -> Efficiency:
  """Solves the efficiency of the matrix units from a published speed.

  Args:
    chip: that the reference ran on.
    reference: its speed, operations and bytes.

  Raises:
    ValueError: the figures leave products no time, or ask for more than the
      peak.
  """
  sent = reference.gathered + reference.reduced
  communication = sent / (reference.links * chip.link_bandwidth)
  products = reference.tokens * reference.executed_flops / chip.peak_flops
  left = reference.step_secs - communication
  if not 0 < products <= left:
    raise ValueError(
      f"{reference.name}: products of {products:.1f} s at peak and collectives"
      f" of {communication:.1f} s do not fit into {reference.step_secs:.1f} s"
      f" of a step on a {chip.name}. Correct the reference's figures."
    )
  # Overlapped, the step is as long as its products: they are the longer term.
  return Efficiency(products / left, products / reference.step_secs)


def predict(
  *,
  chip: Chip,
  flops: float,
  hbm_bytes: float,
  collectives: Sequence[Collective],
  mesh: MeshAxes,
  efficiency: Efficiency,
  tokens: float,
  model_flops: float,
) -> Prediction:
  """A step's time from what its program executes.

  Args:
    chip: that it was compiled for.
    flops: of matrix products of a chip in a step, as executed.
    hbm_bytes: of a chip in a step.
    collectives: of a step, from `hlo_traffic.read_traffic`.
    mesh: with the coordinates of its devices.
    efficiency: of products, from `calibrate`.
    tokens: of a chip in a step.
    model_flops: of a token, by formula.

  Raises:
    ValueError: the chip or the mesh is none that `collective_secs` knows.
  """
  terms: dict[str, np.ndarray] = {}
  for c in collectives:
    times = [
      c.executions * collective_secs(c, chip, mesh, emitted=emitted)
      for emitted in (False, True)
    ]
    name = f"{c.kind} over {'+'.join(c.axes)}"
    unnamed = c.total if c.rings is None and c.kind in _NAMED else 0.0
    terms[name] = terms.get(name, 0.0) + np.array([c.total, *times, unnamed])
  return Prediction(
    products_summed=flops / (efficiency.summed * chip.peak_flops),
    products_overlapped=flops / (efficiency.overlapped * chip.peak_flops),
    hbm=hbm_bytes / chip.hbm_bandwidth,
    collectives=sorted(
      (Term(name, *map(float, sums)) for name, sums in terms.items()),
      key=lambda t: -t.emitted_secs,
    ),
    tokens=tokens,
    model_flops=model_flops,
    peak_flops=chip.peak_flops,
  )


def collective_secs(
  c: Collective, chip: Chip, mesh: MeshAxes, *, emitted: bool
) -> float:
  """Seconds of one execution of a collective, a lower bound.

  Args:
    c: the collective.
    emitted: over no more links than the compiler's algorithm for it uses at
      once (a ring through a whole plane uses two of the four that are there).
    chip: on a torus, or behind a switch (`torus_dims` 0), where a chip sends
      over all its links at once whatever the group.
    mesh: all devices of a slice, with their coordinates.

  Raises:
    ValueError: a chip of several devices, or a mesh without coordinates or that
      is not a whole slice.
  """
  if not chip.torus_dims:
    return c.sent / chip.fabric_bandwidth
  if chip.devices_per_chip != 1:
    raise ValueError(
      f"{chip.name} has {chip.devices_per_chip} devices a chip, whose links the"
      " model does not share out. Use a chip of one device, such as v5p."
    )
  torus, coords = slice_of(chip, mesh)
  key = (c.kind, c.groups.shape, c.groups.tobytes(), torus, coords.tobytes())
  if key not in _loads:
    _loads[key] = _busy(c.kind, torus, coords, c.groups)
  # `_busy` is the load of the busiest link per byte that a chip sends.
  busy = _loads[key]
  if emitted and c.rings is not None:
    busy = max(busy, 1.0 / c.rings)
  return c.sent * busy / chip.link_bandwidth


def slice_of(chip: Chip, mesh: MeshAxes) -> tuple[links.Torus, np.ndarray]:
  """The torus that a mesh fills, and each of its devices' place there.

  Raises:
    ValueError: the devices have no coordinates, or do not fill a block.
  """
  if mesh.coords is None:
    raise ValueError(
      "the mesh's devices have no coordinates. Make it of the devices of a TPU"
      " topology, as jax.experimental.topologies describes them."
    )
  coords = mesh.coords - mesh.coords.min(axis=0)
  shape = tuple(int(n) for n in coords.max(axis=0) + 1)
  # A v5e's coordinates have a third entry, always 0.
  if chip.torus_dims == 2 and len(shape) == 3 and shape[2] == 1:
    coords, shape = coords[:, :2], shape[:2]
  if len(np.unique(coords, axis=0)) != np.prod(shape):
    raise ValueError(
      f"{len(coords)} devices do not fill a block of {shape} chips. Give the"
      " mesh of a whole slice."
    )
  return links.Torus.of(shape, chip.torus_dims), coords


# Kinds for which TPU programs name an algorithm, unless they are asynchronous.
_NAMED = ("all-gather", "all-reduce", "reduce-scatter")
_loads: dict[tuple, float] = {}


def _busy(
  kind: str, torus: links.Torus, coords: np.ndarray, groups: np.ndarray
) -> float:
  """Bytes over the busiest link for each byte that a chip sends."""
  if kind == "collective-permute":
    return links.permute_load(torus, coords, groups, 1.0)
  n = groups.shape[1]
  if kind in ("all-to-all", "ragged-all-to-all"):
    sent = (n - 1) / n
    return links.exchange_load(torus, coords, groups, 1.0) / sent
  # All-gather, reduce-scatter, and an all-reduce, which is both.
  return 1.0 / links.gather_links(torus, coords, groups)
