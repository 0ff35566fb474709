"""How long a collective keeps the links of a torus of chips busy.

Lower bounds from counting bytes on links: messages go by dimension-ordered
routing, the shorter way around a ring and half each way at a tie. Latency,
contention of collectives with each other and the compiler's choice of a worse
algorithm are left out.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Torus:
  """A block of chips, joined to their neighbours in each dimension.

  Attributes:
    shape: chips along each dimension.
    wraps: whether the last chip of a dimension is joined to the first.
  """

  shape: tuple[int, ...]
  wraps: tuple[bool, ...]

  @classmethod
  def of(cls, shape: Sequence[int], torus_dims: int) -> "Torus":
    """A TPU slice of this shape.

    3-dimensional slices (v4, v5p, 7x) are made of cubes of 4x4x4 that optical
    switches join into rings: a side that is a multiple of 4 wraps around. In
    2-dimensional ones (v5e, v6e) only the full side of 16 does. Source: How to
    Scale Your Model (jax-ml.github.io/scaling-book), chapter 2.

    Args:
      shape: chips along each dimension.
      torus_dims: of the chip's network.

    Raises:
      ValueError: it is neither 2 nor 3.
    """
    if torus_dims not in (2, 3):
      raise ValueError(f"{torus_dims=}: a TPU's network has 2 or 3 dimensions")
    if torus_dims == 2:
      return cls(tuple(shape), tuple(s == 16 for s in shape))
    return cls(tuple(shape), tuple(s % 4 == 0 for s in shape))


def link_loads(
  torus: Torus, source: np.ndarray, target: np.ndarray, size: np.ndarray | float
) -> np.ndarray:
  """Bytes over each directed link, for messages routed dimension by dimension.

  Args:
    torus: of chips.
    source: int [messages, dims], coordinates.
    target: int [messages, dims].
    size: bytes of each message.

  Returns:
    float [dims, 2, *torus.shape]: over the link that leaves a chip along a
    dimension, up ([:, 0]) and down ([:, 1]).
  """
  loads = np.zeros((len(torus.shape), 2, *torus.shape))
  at = np.array(source)
  size = np.broadcast_to(np.asarray(size, dtype=float), at.shape[:1])
  for d, (side, wrap) in enumerate(zip(torus.shape, torus.wraps, strict=True)):
    up = (target[:, d] - at[:, d]) % side if wrap else target[:, d] - at[:, d]
    if wrap:
      tie = 2 * up == side
      shares = (
        np.where(tie, 0.5, 2 * up < side),
        np.where(tie, 0.5, 2 * up > side),
      )
      hops = (up, side - up)
    else:
      shares = (np.where(up > 0, 1.0, 0.0), np.where(up < 0, 1.0, 0.0))
      hops = (up, -up)
    for way, (share, hop) in enumerate(zip(shares, hops, strict=True)):
      step = 1 - 2 * way
      for k in range(int(np.max(np.where(share > 0, hop, 0), initial=0))):
        on = (share > 0) & (hop > k)
        link = at[on].copy()
        link[:, d] = (link[:, d] + step * k) % side
        np.add.at(loads[d, way], tuple(link.T), (share * size)[on])
    at[:, d] = target[:, d]
  return loads


def all_to_all_load(torus: Torus, sent: float) -> float:
  """Bytes over the busiest link when all chips exchange evenly.

  Half of a ring of s chips sends half of its bytes to the other half, over two
  links each way: with V bytes from each chip, its own share counted, V s / 8
  over each link; without wrap-around one link each way: V s / 4. The longest
  dimension decides.

  Args:
    torus: all of its chips take part.
    sent: V, bytes of each chip for all chips, itself included.
  """
  return max(
    sent * side / (8 if wrap and side > 2 else 4) if side > 1 else 0.0
    for side, wrap in zip(torus.shape, torus.wraps, strict=True)
  )


def exchange_load(
  torus: Torus, coords: np.ndarray, groups: np.ndarray, buffer: float
) -> float:
  """Bytes over the busiest link when the members of each group exchange.

  Args:
    torus: of chips.
    coords: int [devices, dims].
    groups: int [groups, members]; all of them exchange at once.
    buffer: bytes of each device, an equal part for each member, itself too.
  """
  n = groups.shape[1]
  source = coords[np.repeat(groups, n, axis=1).ravel()]
  target = coords[np.tile(groups, (1, n)).ravel()]
  return float(link_loads(torus, source, target, buffer / n).max(initial=0.0))


def permute_load(
  torus: Torus, coords: np.ndarray, pairs: np.ndarray, buffer: float
) -> float:
  """Bytes over the busiest link when each source sends to its target.

  Args:
    torus: of chips.
    coords: int [devices, dims].
    pairs: int [pairs, 2], of devices.
    buffer: bytes of a message.
  """
  source, target = coords[pairs[:, 0]], coords[pairs[:, 1]]
  return float(link_loads(torus, source, target, buffer).max(initial=0.0))


def gather_links(torus: Torus, coords: np.ndarray, groups: np.ndarray) -> float:
  """Links that an all-gather or reduce-scatter keeps busy at each chip.

  A group that is a block of the torus gathers along all its k dimensions at
  once, each part of the data in another order of them: 2 links for each
  dimension that wraps around and that it fills, or lies evenly around, 1 for a
  line (the last chip of one receives all through one link). Groups that share
  links, because their members are not neighbours, share them evenly. Any other
  group is a ring of its members in order.

  Args:
    torus: of chips.
    coords: int [devices, dims].
    groups: int [groups, members]; all of them gather at once.
  """
  links = 0.0
  for d, side in enumerate(torus.shape):
    chains = _chains(coords, groups, d)
    if chains is None:
      return 2.0 / _ring_sharing(torus, coords, groups)
    if chains.shape[1] < 2:
      continue
    closed = torus.wraps[d] and _goes_around(coords[chains, d], side)
    following = np.roll(chains, -1, axis=1) if closed else chains[:, 1:]
    leading = chains if closed else chains[:, :-1]
    pairs = np.stack([leading.ravel(), following.ravel()], axis=1)
    shared = permute_load(torus, coords, pairs, 1.0)
    links += (2.0 if closed else 1.0) / shared
  return links


def _goes_around(at: np.ndarray, side: int) -> bool:
  """Whether chains [chains, members] lie evenly around a ring."""
  n = at.shape[1]
  return n > 2 and side % n == 0 and bool((np.diff(at) == side // n).all())


def _chains(
  coords: np.ndarray, groups: np.ndarray, dim: int
) -> np.ndarray | None:
  """Members of a group that differ in one dimension only, in its order.

  Returns:
    int [chains, members of each]; None where a group is no block.
  """
  chains = []
  for group in groups:
    at = coords[group]
    sides = [len(np.unique(at[:, k])) for k in range(at.shape[1])]
    if math.prod(sides) != len(group):
      return None
    others = [at[:, k] for k in range(at.shape[1]) if k != dim]
    chains.append(
      group[np.lexsort([at[:, dim], *others])].reshape(-1, sides[dim])
    )
  if len({c.shape for c in chains}) != 1:
    return None
  return np.concatenate(chains)


def _ring_sharing(
  torus: Torus, coords: np.ndarray, groups: np.ndarray
) -> float:
  """Messages over the busiest link, each member sending to the next."""
  pairs = np.stack(
    [groups.ravel(), np.roll(groups, -1, axis=1).ravel()], axis=1
  )
  return max(permute_load(torus, coords, pairs, 1.0), 1.0)


def all_coords(torus: Torus) -> np.ndarray:
  """Coordinates of all chips, int [chips, dims], the last one fastest."""
  return np.array(list(itertools.product(*map(range, torus.shape))))
