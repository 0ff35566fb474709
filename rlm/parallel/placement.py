"""Where experts and their redundant replicas live when serving, as EPLB does.

A device waits for the busiest one, so that a layer takes as long as the device
with the most tokens. Heavy experts get replicas, among which their tokens are
split evenly, and replicas are packed so that devices carry about the same.

Source: V3 section 3.4 and the description and example of EPLB, DeepSeek's
expert-parallelism load balancer (github.com/deepseek-ai/EPLB). No JAX here: a
plan is made on the host, from loads measured before.

The busiest device's load over the mean, for 256 experts in 8 groups on nodes of
8 devices, of which every token chooses 8 by a Zipf law; placed by eight batches
of 4096 tokens, measured on a ninth (`python -m tools.bench_placement`, mean of
16 layers). "Naive" is experts in order, where these do not divide among the
devices with the first ones twice; it has no redundancy at EP32 and EP64.

| exponent | EP32, 32 more | EP64, 64 more | EP144, 32 more | EP320, 64 more |
|---|---|---|---|---|
| 0, naive | 1.07 | 1.10 | 1.32 | 1.55 |
| 0 | 1.07 | 1.10 | 1.30 | 1.57 |
| 0.5, naive | 1.89 | 2.64 | 4.51 | 8.71 |
| 0.5 | 1.08 | 1.28 | 1.34 | 1.70 |
| 1, naive | 4.16 | 6.89 | 13.46 | 28.57 |
| 1 | 1.19 | 1.88 | 1.93 | 2.48 |

An even law leaves the noise of the batch. At EP64 each node holds one group, so
that a heavy group stays on its node: placed globally (`num_groups=1`) the 1.28
and 1.88 are 1.10 and 1.09, and tokens visit more nodes. At EP320 a device holds
one replica, and no placement of as many does better than 2.39.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Placement:
  """Which expert each slot of each device holds, layer by layer.

  Slots ("physical experts") are numbered device by device, devices node by
  node: slot p is on device p // (P / num_devices).

  Attributes:
    physical_to_logical: int32 [L, P], the expert in each slot.
    logical_to_physical: int32 [L, E, X], the slots of each expert in rising
      order, X the most that any expert has; -1 after the last.
    replica_counts: int32 [L, E], slots of each expert, at least one.
    num_devices: D, which divides P.
  """

  physical_to_logical: np.ndarray
  logical_to_physical: np.ndarray
  replica_counts: np.ndarray
  num_devices: int

  def device_loads(self, load: np.ndarray) -> np.ndarray:
    """What each device carries where replicas share their expert evenly.

    Args:
      load: [L, E], tokens or shares; of those that the placement was made for,
        or of others, to see how it keeps.

    Returns:
      float64 [L, D], in the unit of `load`.
    """
    each = np.asarray(load, np.float64) / self.replica_counts
    slots = np.take_along_axis(each, self.physical_to_logical, axis=1)
    return slots.reshape(len(slots), self.num_devices, -1).sum(axis=2)

  def max_over_mean(self, load: np.ndarray) -> np.ndarray:
    """The busiest device's load over the mean; float64 [L], 1 is even.

    A layer without load is even.
    """
    devices = self.device_loads(load)
    mean = devices.mean(axis=1)
    return np.divide(
      devices.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0
    )


def place_experts(
  load: np.ndarray,
  *,
  num_replicas: int,
  num_groups: int,
  num_nodes: int,
  num_devices: int,
) -> Placement:
  """Replicates heavy experts and packs replicas to devices; V3 section 3.4.

  Hierarchical where nodes divide the groups, as in prefill: groups are packed
  to nodes, so that a token sent to few groups reaches few nodes; then each node
  replicates its own experts and packs the replicas to its devices. Else global,
  as in decoding: as if all devices were one node and all experts one group.

  Packing is greedy: by falling load, each into the lightest bin with room.
  Every extra replica goes to the expert with the highest load per replica,
  which makes the largest such load as small as it can be. Packing may put two
  replicas of an expert on one device. Ties go to the lower index, those between
  experts first to the one with fewer replicas.

  Args:
    load: [L, E], tokens or shares of each expert, as estimated, say a mean over
      the last minutes.
    num_replicas: P, slots over all devices: E and the redundant ones.
    num_groups: routing groups of consecutive experts (`n_group`).
    num_nodes: machines of equally many devices.
    num_devices: D, over all nodes.

  Raises:
    ValueError: loads or sizes that cannot be placed.
  """
  load = _checked(load, num_replicas, num_groups, num_nodes, num_devices)
  layers, experts = load.shape
  if num_groups % num_nodes:
    num_groups, num_nodes = 1, 1
  members = _experts_of_nodes(load, num_groups, num_nodes)
  node_load = np.take_along_axis(load, members.reshape(layers, -1), axis=1)
  # From here on a row is one node of one layer.
  rows = layers * num_nodes
  node_load = node_load.reshape(rows, -1)
  slot_expert, counts = _replicate(node_load, num_replicas // num_nodes)
  each = np.take_along_axis(node_load / counts, slot_expert, axis=1)
  order = _packed_order(each, num_devices // num_nodes)
  local = np.take_along_axis(slot_expert, order, axis=1)
  physical = np.take_along_axis(members.reshape(rows, -1), local, axis=1)
  physical = physical.reshape(layers, num_replicas).astype(np.int32)
  return make_placement(physical, experts, num_devices)


def make_placement(
  physical_to_logical: np.ndarray, num_experts: int, num_devices: int
) -> Placement:
  """A placement of any origin, from the expert in each slot.

  Args:
    physical_to_logical: int [L, P].
    num_experts: E.
    num_devices: D.

  Raises:
    ValueError: a slot without an expert, an expert without a slot, or slots
      that do not divide among the devices.
  """
  physical = np.asarray(physical_to_logical)
  layers, slots = physical.shape
  if num_devices < 1 or slots % num_devices:
    raise ValueError(_divide("num_replicas", slots, num_devices, "devices"))
  if physical.size and not 0 <= physical.min() <= physical.max() < num_experts:
    raise ValueError(
      f"slots hold experts {physical.min()} to {physical.max()}; of"
      f" {num_experts} experts they must hold 0 to {num_experts - 1}."
    )
  chosen = physical[:, :, None] == np.arange(num_experts)
  counts = chosen.sum(axis=1, dtype=np.int32)
  if not counts.all():
    layer, expert = np.argwhere(counts == 0)[0]
    raise ValueError(
      f"expert {expert} of layer {layer} has no slot; each needs at least one."
    )
  width = int(counts.max(initial=1))
  logical = np.full((layers, num_experts, width), -1, np.int32)
  rank = (chosen.cumsum(axis=1) - 1)[
    np.arange(layers)[:, None], np.arange(slots)[None], physical
  ]
  logical[np.arange(layers)[:, None], physical, rank] = np.arange(slots)
  return Placement(physical.astype(np.int32), logical, counts, num_devices)


def _divide(name: str, value: int, parts: int, of: str) -> str:
  return (
    f"{name}={value} does not divide among {parts} {of}. Make it a multiple of"
    f" {parts}."
  )


def _checked(load, num_replicas, num_groups, num_nodes, num_devices):
  """`load` as float64, once everything can be placed."""
  load = np.asarray(load, np.float64)
  if load.ndim != 2 or not load.size:
    raise ValueError(
      f"load has shape {load.shape}; it must be [layers, experts]."
    )
  if not (np.isfinite(load).all() and (load >= 0).all()):
    layer, expert = np.argwhere(~(np.isfinite(load) & (load >= 0)))[0]
    raise ValueError(
      f"the load of expert {expert} of layer {layer} is {load[layer, expert]};"
      " loads must be finite and at least 0."
    )
  experts = load.shape[1]
  sizes = {
    "num_replicas": num_replicas,
    "num_groups": num_groups,
    "num_nodes": num_nodes,
    "num_devices": num_devices,
  }
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"{name}={size} must be at least 1.")
  if num_replicas < experts:
    raise ValueError(
      f"num_replicas={num_replicas} leaves some of {experts} experts without a"
      f" slot. Make it at least {experts}."
    )
  for name, size, parts, of in (
    ("the number of experts", experts, num_groups, "groups"),
    ("num_devices", num_devices, num_nodes, "nodes"),
    ("num_replicas", num_replicas, num_devices, "devices"),
  ):
    if size % parts:
      raise ValueError(_divide(name, size, parts, of))
  return load


def _experts_of_nodes(load, num_groups, num_nodes):
  """Packs whole groups to nodes: int [L, num_nodes, E / num_nodes]."""
  layers, experts = load.shape
  size = experts // num_groups
  order = _packed_order(
    load.reshape(layers, num_groups, size).sum(axis=2), num_nodes
  )
  # Rising within a node, so that ties between experts go by their index.
  order = np.sort(order.reshape(layers, num_nodes, -1), axis=2)
  members = order[..., None] * size + np.arange(size)
  return members.reshape(layers, num_nodes, -1)


def _replicate(load, slots):
  """Slots for the experts of each row: each its own, then extra ones.

  Args:
    load: float64 [R, n].
    slots: P >= n.

  Returns:
    int [R, P], the expert of each slot; int [R, n], replicas of each.
  """
  rows, n = load.shape
  row = np.arange(rows)
  counts = np.ones((rows, n), np.int64)
  slot_expert = np.empty((rows, slots), np.int64)
  slot_expert[:, :n] = np.arange(n)
  for slot in range(n, slots):
    each = load / counts
    heaviest = each == each.max(axis=1, keepdims=True)
    # A layer never seen (all zero) spreads its replicas instead of giving all
    # of them to one expert.
    expert = np.where(heaviest, counts, slots + 1).argmin(axis=1)
    slot_expert[:, slot] = expert
    counts[row, expert] += 1
  return slot_expert, counts


def _packed_order(weight, bins):
  """Packs the items of each row into bins of equally many.

  Args:
    weight: float64 [R, n].
    bins: their number, a divisor of n.

  Returns:
    int [R, n], the items bin by bin, in each in the order in which they came;
    as they stand if each has a bin for itself.
  """
  rows, n = weight.shape
  room = n // bins
  if room == 1:  # any order packs as well; this one moves nothing
    return np.broadcast_to(np.arange(n), (rows, n))
  row = np.arange(rows)
  carried = np.zeros((rows, bins))
  used = np.zeros((rows, bins), np.int64)
  order = np.empty((rows, n), np.int64)
  for item in np.argsort(-weight, axis=1, kind="stable").T:
    lightest = np.where(used < room, carried, np.inf).argmin(axis=1)
    order[row, lightest * room + used[row, lightest]] = item
    carried[row, lightest] += weight[row, item]
    used[row, lightest] += 1
  return order
