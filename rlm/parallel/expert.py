"""Expert parallelism: how rows travel to the devices of their experts.

Experts are divided among the devices of the mesh axis `expert`, in order. A
token's row goes to each device that holds any of its experts, once, however
many these are, and what comes back is one row: the weighed sum of the experts
there. `exchanged` is the whole of it; `models/moe.py` calls it inside the
shard_map of the training step, between routing and the grouped product.

Three transports move the rows. Each is a linear map from the rows of all
devices to the rows that each receives (`send`), with its transpose
(`give_back`), so that either is the other's derivative:

| transport | sends | receives | runs on |
|---|---|---|---|
| `Gather` | every row to every device | n R rows, in order | anything |
| `Padded` | C slots for each device | R C slots, some empty | anything |
| `Ragged` | what is needed | up to n R rows, the used ones first | TPU, GPU |

n tokens of a device, R devices. Without a capacity C is n: the worst case, in
which every token of every device goes to one. No token is dropped, and memory
is bounded by sending `chunk` tokens at a time, recomputed in the backward pass;
with a capacity, the tokens beyond it lose that device's experts, and the share
is reported.

With `node_limited` routing over more devices than groups of experts, `levels`
is two: a row travels once to each group of devices that it needs (`topk_group`
of them), to the device of its own rank there, and from it to the devices within
the group. That is V3's path over InfiniBand, then NVLink (section 3.2); on a
torus the first hops are the long ones.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlm.kernels.backend import backend
from rlm.kernels.recomputed import map_recomputed
from rlm.parallel.config import MeshConfig

Groups = tuple[tuple[int, ...], ...]


class Plan(NamedTuple):
  """Where the rows of this device go; integers only.

  Attributes:
    token: int32 [R, C], the token in each slot to send; n where it is empty.
    slot: int32 [n, J], the slots of each token, r C + c; R C where none.
    counts: int32 [R, R], rows that device s sends to device r.
    dropped: float32 [], choices (of a token, an expert) without a slot.
  """

  token: jax.Array
  slot: jax.Array
  counts: jax.Array
  dropped: jax.Array


@dataclasses.dataclass(frozen=True)
class Level(abc.ABC):
  """One leg of the way: R peers, among whom the experts are divided in order.

  Attributes:
    peers: R.
    groups: of device indices on the axis `expert`, for its collectives; None
      is the whole axis.
    stride: devices on the axis between one peer and the next.
    most: J, peers that a token can need at most.
    capacity: of `MeshConfig.expert_capacity`, or None.
  """

  peers: int
  groups: Groups | None
  stride: int
  most: int
  capacity: float | None

  def rank(self) -> jax.Array:
    """int32 []: which peer this device is."""
    return jax.lax.axis_index("expert") // self.stride % self.peers

  def slots(self, tokens: int) -> int:
    """C, slots for each peer."""
    if self.capacity is None:
      return tokens
    mean = tokens * self.most / self.peers
    return min(tokens, max(1, round(self.capacity * mean)))

  def plan(self, choices: jax.Array) -> Plan:
    """Lays out what goes where.

    Args:
      choices: int32 [n, R], how many experts of each peer a token chose.
    """
    wanted = choices > 0
    n, size = wanted.shape[0], self.slots(wanted.shape[0])
    # For each peer its tokens first, in order.
    token = jnp.argsort(~wanted, axis=0, stable=True)[:size].T
    counts = wanted.sum(axis=0, dtype=jnp.int32)
    kept = jnp.minimum(counts, size)
    used = jnp.arange(size, dtype=jnp.int32)[None] < kept[:, None]
    place = jnp.cumsum(wanted, axis=0, dtype=jnp.int32) - 1
    held = wanted & (place < size)
    peers = jnp.arange(self.peers, dtype=jnp.int32)[None]
    none = self.peers * size
    slot = jnp.where(held, peers * size + place, none)
    # The J that are used, whichever these are.
    slot = jnp.sort(slot, axis=1)[:, : self.most]
    return Plan(
      token=jnp.where(used, token, n).astype(jnp.int32),
      slot=slot.astype(jnp.int32),
      counts=self._everyone(kept),
      dropped=jnp.where(held, 0, choices).sum(dtype=jnp.float32),
    )

  def _everyone(self, x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, "expert", axis_index_groups=self.groups)

  @abc.abstractmethod
  def send(self, rows: jax.Array, plan: Plan) -> jax.Array:
    """[n, W] -> [M, W]: the rows that this device receives, zeros for none."""

  @abc.abstractmethod
  def give_back(self, rows: jax.Array, plan: Plan) -> jax.Array:
    """[M, W] -> [n, W]: the sum of what peers made of each token."""

  def received(self, tokens: int) -> int:
    """M, rows that a device has room for."""
    return self.peers * self.slots(tokens)


@dataclasses.dataclass(frozen=True)
class Gather(Level):
  """Every row to every peer: all-gather, then reduce-scatter."""

  def send(self, rows, plan):
    return jax.lax.all_gather(
      rows, "expert", axis_index_groups=self.groups, tiled=True
    )

  def give_back(self, rows, plan):
    return jax.lax.psum_scatter(
      rows, "expert", axis_index_groups=self.groups, tiled=True
    )

  def slots(self, tokens):
    return tokens


@dataclasses.dataclass(frozen=True)
class Padded(Level):
  """The same number of slots to every peer: all-to-all."""

  def _swap(self, slots):
    return jax.lax.all_to_all(
      slots, "expert", 0, 0, axis_index_groups=self.groups, tiled=True
    )

  def send(self, rows, plan):
    return self._swap(take_rows(rows, plan.token.reshape(-1)))

  def give_back(self, rows, plan):
    return sum_rows(self._swap(rows), plan.slot).astype(rows.dtype)


@dataclasses.dataclass(frozen=True)
class Ragged(Level):
  """As many rows as are needed: ragged all-to-all.

  XLA's CPU backend lacks the primitive; `exchange_rows` is where tests put
  another in its place.
  """

  def send(self, rows, plan):
    out, index = self._outgoing(plan)
    inward = self._incoming(plan)
    buffer = jnp.zeros(
      (self.received(rows.shape[0]), rows.shape[1]), rows.dtype
    )
    return exchange_rows(
      take_rows(rows, index), buffer, *out, *inward, groups=self.groups
    )

  def give_back(self, rows, plan):
    n, most = plan.slot.shape
    (starts, sizes), _ = self._outgoing(plan)
    # The way back: what came in goes out, to where it had been taken from.
    back_starts, back_sizes = self._held(plan)
    places = self._starts_elsewhere(plan)
    buffer = jnp.zeros((n * most, rows.shape[1]), rows.dtype)
    back = exchange_rows(
      rows, buffer, back_starts, back_sizes, places, sizes, groups=self.groups
    )
    peer, place = jnp.divmod(plan.slot, self.slots(n))
    dense = starts[jnp.minimum(peer, self.peers - 1)] + place
    slot = jnp.where(peer < self.peers, dense, n * most).astype(jnp.int32)
    return sum_rows(back, slot).astype(rows.dtype)

  def _outgoing(self, plan):
    """Starts and sizes of what this device sends, and the tokens in it."""
    sizes = plan.counts[self.rank()]
    starts = jnp.cumsum(sizes) - sizes
    n, most = plan.slot.shape
    place = jnp.arange(n * most, dtype=jnp.int32)
    peer = jnp.searchsorted(
      jnp.cumsum(sizes), place, side="right", method="compare_all"
    )
    held = peer < self.peers
    peer = jnp.minimum(peer, self.peers - 1)
    within = jnp.minimum(place - starts[peer], plan.token.shape[1] - 1)
    index = jnp.where(held, plan.token[peer, within], n)
    return (starts, sizes), index

  def _incoming(self, plan):
    """Where each peer shall put this device's rows, and what comes in."""
    before = jnp.cumsum(plan.counts, axis=0) - plan.counts
    return before[self.rank()], plan.counts[:, self.rank()]

  def _held(self, plan):
    """Starts and sizes, by the peer they came from, of the rows held here."""
    sizes = plan.counts[:, self.rank()]
    return jnp.cumsum(sizes) - sizes, sizes

  def _starts_elsewhere(self, plan):
    """Where this device's rows began in each peer's buffer to send."""
    starts = jnp.cumsum(plan.counts, axis=1) - plan.counts
    return starts[:, self.rank()]


def exchange_rows(
  rows: jax.Array,
  buffer: jax.Array,
  starts: jax.Array,
  sizes: jax.Array,
  places: jax.Array,
  incoming: jax.Array,
  *,
  groups: Groups | None,
) -> jax.Array:
  """`jax.lax.ragged_all_to_all` over the axis `expert`.

  Args:
    rows: [S, W] to send.
    buffer: [M, W], what is not written stays.
    starts: int32 [R], first row for each peer.
    sizes: int32 [R], rows for each peer.
    places: int32 [R], where each peer puts them.
    incoming: int32 [R], rows from each peer.
    groups: of devices, or None.
  """
  return jax.lax.ragged_all_to_all(
    rows,
    buffer,
    starts,
    sizes,
    places,
    incoming,
    axis_name="expert",
    axis_index_groups=groups,
  )


def take_rows(rows: jax.Array, index: jax.Array) -> jax.Array:
  """Rows of [N, W] by index; zeros for an index past the end."""
  return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def sum_rows(
  rows: jax.Array, slot: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """The sum of each token's rows, in the order of its slots.

  Args:
    rows: [S, W].
    slot: int32 [n, J]; S or more for none.
    weights: float32 [n, J], or None for 1.

  Returns:
    float32 [n, W].
  """
  total = jnp.zeros((slot.shape[0], rows.shape[1]), jnp.float32)
  for j in range(slot.shape[1]):
    part = take_rows(rows, slot[:, j]).astype(jnp.float32)
    total += part if weights is None else weights[:, j, None] * part
  return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send(level, rows, plan):
  return level.send(rows, plan)


_send.defvjp(
  lambda level, rows, plan: (level.send(rows, plan), plan),
  lambda level, plan, grad: (level.give_back(grad, plan), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _give_back(level, rows, plan):
  return level.give_back(rows, plan)


_give_back.defvjp(
  lambda level, rows, plan: (level.give_back(rows, plan), plan),
  lambda level, plan, grad: (level.send(grad, plan), None),
)


@dataclasses.dataclass(frozen=True)
class Exchange:
  """How rows reach their experts: the levels of the way, outermost first.

  Attributes:
    levels: none on one device.
    chunk: tokens of a device sent at once; 0 is all.
  """

  levels: tuple[Level, ...]
  chunk: int

  @property
  def shards(self) -> int:
    """Devices among which the experts are divided."""
    total = 1
    for level in self.levels:
      total *= level.peers
    return total

  def worst_rows(self, tokens: int) -> int:
    """Rows that a device has room for, of `tokens` on each device."""
    rows = min(tokens, self.chunk) if self.chunk else tokens
    for level in self.levels:
      rows = level.received(rows)
    return rows


NO_EXCHANGE = Exchange((), 0)

# (weights, rows [M, D], gates float32 [M, K], expert ids int32 [M, K] among the
# experts of this device, or their number for none) -> [M, D].
RunExperts = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def exchanged(
  exchange: Exchange,
  run: RunExperts,
  weights: Any,
  x: jax.Array,
  gates: jax.Array,
  expert_ids: jax.Array,
  n_experts: int,
) -> tuple[jax.Array, jax.Array]:
  """Runs experts that are divided among devices.

  Args:
    exchange: the way there.
    run: the experts of this device.
    weights: arrays for `run`.
    x: [n, D].
    gates: float32 [n, K].
    expert_ids: int32 [n, K], in 0..n_experts.
    n_experts: E, over all devices.

  Returns:
    [n, D], and float32 [], choices (of a token, an expert) that were dropped.

  Raises:
    ValueError: `chunk` does not divide the tokens.
  """
  n, chunk = x.shape[0], exchange.chunk

  def whole(weights, part):
    x, gates, expert_ids = part
    here = functools.partial(run, weights)
    return _along(exchange.levels, here, x, gates, expert_ids, n_experts)

  parts = (x, gates, expert_ids)
  if not chunk or chunk >= n:
    return whole(weights, parts)
  if n % chunk:
    raise ValueError(
      f"mesh.expert_chunk={chunk} does not divide the {n} tokens of a device's"
      " microbatch. Make it a divisor, or 0 for all at once."
    )

  def split(a):
    return a.reshape(n // chunk, chunk, *a.shape[1:])

  out, dropped = map_recomputed(whole, weights, jax.tree.map(split, parts))
  return out.reshape(x.shape), dropped.sum()


def _along(levels, run, x, gates, expert_ids, n_experts):
  """The rest of the way; dropped choices are counted where they are lost."""
  if not levels:
    return run(x, gates, expert_ids), jnp.float32(0)
  level, *rest = levels
  share = n_experts // level.peers
  here = (expert_ids < n_experts)[..., None] & (
    (expert_ids // share)[..., None]
    == jnp.arange(level.peers, dtype=jnp.int32)[None, None]
  )
  plan = level.plan(here.sum(axis=1, dtype=jnp.int32))
  rows = _send(level, x, plan)
  row_gates = _send(level, gates, plan)
  # One more than the id, so that an empty slot's zero is no expert.
  ids = level.send(expert_ids + 1, plan) - 1
  mine = ids // share == level.rank()
  ids = jnp.where(mine & (ids >= 0), ids - level.rank() * share, share)
  out, dropped = _along(rest, run, rows, row_gates, ids, share)
  return _give_back(level, out, plan), dropped + plan.dropped


def make_exchange(
  cfg: MeshConfig, *, n_group: int, topk_group: int, n_experts: int, k: int
) -> Exchange:
  """The exchange of a mesh and a model.

  Args:
    cfg: the mesh.
    n_group: groups of experts; 1 where routing is not limited.
    topk_group: groups that a token may use.
    n_experts: E.
    k: experts per token.

  Raises:
    ValueError: the axis `expert` does not divide the experts.
  """
  shards = cfg.expert
  if n_experts % shards:
    fitting = [n for n in range(1, n_experts + 1) if n_experts % n == 0]
    raise ValueError(
      f"mesh.expert={shards} does not divide n_routed_experts={n_experts}. Make"
      f" it one of {', '.join(map(str, fitting))}."
    )
  if shards == 1:
    return Exchange((), 0)
  kind: Any = {"ragged": Ragged, "padded": Padded, "gather": Gather}[
    cfg.transport or default_transport()
  ]
  make = functools.partial(kind, capacity=cfg.expert_capacity)
  if cfg.node_limited and n_group > 1 and shards % n_group == 0:
    inner = shards // n_group
    if inner > 1:
      outer_groups = tuple(tuple(range(i, shards, inner)) for i in range(inner))
      inner_groups = tuple(
        tuple(range(g * inner, (g + 1) * inner)) for g in range(n_group)
      )
      levels = (
        make(
          peers=n_group,
          groups=outer_groups,
          stride=inner,
          most=min(topk_group, n_group, k),
        ),
        make(peers=inner, groups=inner_groups, stride=1, most=min(k, inner)),
      )
      return Exchange(levels, cfg.expert_chunk)
  # Devices that hold whole groups of experts, or parts of one.
  per_group = max(shards // n_group, 1) if shards % n_group == 0 else shards
  most = min(k, shards, topk_group * per_group)
  level = make(peers=shards, groups=None, stride=1, most=most)
  return Exchange((level,), cfg.expert_chunk)


def default_transport() -> str:
  """The transport that the default backend runs fastest."""
  return "padded" if backend() == "cpu" else "ragged"
