"""The collectives of a run of an HLO program: how often, over what, how much.

Bytes are those that one chip must send at least, by kind, on a ring or a torus:
all-gather (n-1)/n of its output, reduce-scatter (n-1)/n of its input,
all-reduce twice that, all-to-all (n-1)/n of its buffer, a permute its buffer.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tools import hlo_cost
from tools.hlo_groups import MeshAxes, replica_groups, source_target_pairs
from tools.hlo_loops import Execution, Run
from tools.hlo_program import Computation, HloError, Instruction, Module, Shape

_KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
)
_UNKNOWN = ("send", "recv", "collective-broadcast")
# Passed through when an array's origin or use is looked up.
_SAME = ("copy", "bitcast", "copy-start", "copy-done", "reshape", "convert")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction, with how often it runs.

  Attributes:
    kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
      "ragged-all-to-all" or "collective-permute".
    form: "sync", "async" or "fused" (inside a fusion, as TPU's reduce-scatter).
    instead_of: an all-reduce that stands for a cheaper collective, because the
      compiler has no emitter for that one: "all-gather" where each device
      brings zeros but for its own shard, "reduce-scatter" where each uses its
      own shard of the sum only; else "".
    name: of the instruction.
    op_name: the JAX path that it comes from; of the compiler's own collectives,
      that of what they bring together.
    source: "file:line" or "".
    axes: mesh axes that it runs over; `("other",)` where none fit.
    groups: int [groups, members], or [pairs, 2] of a permute.
    group_size: devices that take part together; of a permute, those along the
      axes that it moves over.
    executions: in one run.
    buffer: bytes of the whole: what is gathered, reduced or exchanged.
    sent: bytes that a chip sends at each execution.
    dtype: of the elements.
    shard: rows and lanes (the two fastest dimensions) of one device's part.
    emitter: the compiler's algorithm, where it names one (TPU).
    rings: links that this algorithm keeps busy at once at each chip, as read
      from its name; None where it names none.
  """

  kind: str
  form: str
  instead_of: str
  name: str
  op_name: str
  source: str
  axes: tuple[str, ...]
  groups: np.ndarray = dataclasses.field(repr=False, compare=False)
  group_size: int
  executions: float
  buffer: int
  sent: float
  dtype: str
  shard: tuple[int, int]
  emitter: str
  rings: int | None

  @property
  def total(self) -> float:
    """Bytes that a chip sends in one run."""
    return self.executions * self.sent

  @property
  def in_tiles(self) -> bool:
    """Whether a shard is whole 8-row, 128-lane tiles.

    Says something of gathers, reductions and scatters only.
    """
    return self.shard[0] % 8 == 0 and self.shard[1] % 128 == 0

  @property
  def needed(self) -> float:
    """`total`, had the compiler kept the collective that was meant."""
    return self.total / 2 if self.instead_of else self.total


@dataclasses.dataclass(frozen=True)
class Traffic:
  """All collectives of a run.

  Attributes:
    collectives: the one with the most bytes in all first.
    unknown: names of instructions that communicate in ways not counted.
  """

  collectives: Sequence[Collective]
  unknown: Sequence[str]

  @property
  def sent(self) -> float:
    """Bytes that a chip sends in one run."""
    return sum(c.total for c in self.collectives)

  def by(
    self, key: Callable[[Collective], str]
  ) -> Mapping[str, Mapping[str, float]]:
    """Sums by a key, such as `lambda c: "+".join(c.axes)`.

    Returns:
      key -> {"executions", "sent" (bytes of a chip in a run), "instructions"}.
    """
    sums: dict[str, collections.Counter] = {}
    for c in self.collectives:
      s = sums.setdefault(key(c), collections.Counter())
      s.update(executions=c.executions, sent=c.total, instructions=1)
    return {
      k: dict(s) for k, s in sorted(sums.items(), key=lambda x: -x[1]["sent"])
    }


def read_traffic(
  run: Run, mesh: MeshAxes, *, ragged_rows: Mapping[int, float] | None = None
) -> Traffic:
  """Finds and counts the collectives of a run.

  Args:
    run: of the program, from `hlo_loops.follow`.
    mesh: that it was compiled for.
    ragged_rows: of a ragged all-to-all's operand, the rows that a chip hands
      out at each execution, as expected, those for itself included; by how far
      apart the partitions of a group are, as exchanges of several legs differ
      in it. Needed where the program has one.

  Raises:
    HloError: the mesh is not of the program's size; a ragged all-to-all without
      `ragged_rows`; a collective whose attributes are not understood.
  """
  if run.module.partitions != mesh.size:
    raise HloError(
      f"the program is for {run.module.partitions} devices, the mesh"
      f" {dict(zip(mesh.names, mesh.sizes, strict=True))} has {mesh.size}"
    )
  found, unknown = [], []
  for e in run.executions:
    i = e.instruction
    kind = i.opcode.removesuffix("-start")
    if kind in _KINDS and not hlo_cost.is_continued(i):
      c = _collective(run.module, e, kind, mesh, ragged_rows)
      if c.group_size > 1:
        found.append(c)
    elif kind in _UNKNOWN or (
      i.opcode == "custom-call"
      and re.search(r"[Cc]ollective|[Aa]ll(Gather|Reduce|ToAll)", _target(i))
      and _target(i) not in hlo_cost.SPLIT_MARKS
    ):
      unknown.append(i.name)
  found.sort(key=lambda c: -c.total)
  return Traffic(found, unknown)


def _collective(
  module: Module,
  e: Execution,
  opcode: str,
  mesh: MeshAxes,
  ragged_rows: Mapping[int, float] | None,
) -> Collective:
  i, c = e.instruction, module[e.instruction.computation]
  operands = [o.shape for o in c.operands_of(i)]
  kind, form, instead_of = opcode, "sync", ""
  if i.opcode.endswith("-start") or (e.caller and not e.fused):
    form = "async"
  elif e.fused:
    split = "async_collective_fusion_config" in i.backend_config
    form = "async" if split else "fused"
  if opcode == "collective-permute":
    groups = source_target_pairs(i)
    axes = mesh.axes_of_pairs(groups)
    sizes = dict(zip(mesh.names, mesh.sizes, strict=True))
    n = math.prod(sizes[a] for a in axes)
  else:
    groups = replica_groups(i, mesh.size)
    axes, n = mesh.axes_of(groups), groups.shape[1]
  if opcode == "ragged-all-to-all":
    operands = operands[:1]  # then the output's start, offsets and sizes
  buffer = sum(o.bytes for o in operands)
  shard, factor = max(operands, key=lambda o: o.bytes), (n - 1) / n
  if opcode == "all-gather":
    buffer *= n
  elif opcode == "reduce-scatter":
    shard = max(i.result.arrays, key=lambda o: o.bytes)
  elif opcode == "all-reduce":
    meant, part = _stands_for(module, c, i, n)
    shard = part or shard
    if e.fused and meant == "reduce-scatter":
      kind = meant  # one emitter for both: TPU's all-reduce-scatter fusion
    else:
      factor *= 2
      instead_of = meant
  elif opcode == "ragged-all-to-all":
    apart = int(groups[0, 1] - groups[0, 0])
    if ragged_rows is None or apart not in ragged_rows:
      raise HloError(
        f"{i.name}: how much a ragged all-to-all between partitions {apart}"
        " apart sends is not in the program; give ragged_rows"
      )
    factor *= min(1.0, ragged_rows[apart] / operands[0].dims[0])
  elif opcode == "collective-permute":
    factor = 1.0 if axes else 0.0
  algorithm = i.backend_config.get("collective_algorithm_config", {})
  if e.caller and not algorithm:
    algorithm = e.caller.backend_config.get("collective_algorithm_config", {})
  named = i if i.op_name or not e.caller else e.caller
  if not named.op_name:
    named = module.origin(named)
  return Collective(
    kind=kind,
    form=form,
    instead_of=instead_of,
    name=e.caller.name if e.fused else i.name,
    op_name=named.op_name,
    source=module.source(named),
    axes=axes,
    groups=groups,
    group_size=n,
    executions=e.count,
    buffer=buffer,
    sent=buffer * factor,
    dtype="+".join(sorted({o.dtype for o in operands})),
    shard=shard.rows_and_lanes,
    emitter=" ".join(
      algorithm[k] for k in ("emitter", "strategy") if k in algorithm
    ),
    rings=_rings(algorithm),
  )


def _rings(algorithm: Mapping[str, str]) -> int | None:
  """Links that TPU's algorithm for a collective uses at once at a chip.

  Inferred from its names, which are not documented: "1D", "2D" and "3D"
  all-gathers run along so many dimensions, both ways; a strategy's `colors` are
  the pieces of data under way in different directions: those called
  "UniDirection" one way each, all others both ways.
  """
  if form := re.match(r"(\d)DAllGather", algorithm.get("emitter", "")):
    return 2 * int(form[1])
  strategy = algorithm.get("strategy", "")
  colors = re.search(r"colors:(\d+)", algorithm.get("debug", ""))
  if not strategy or not colors:
    return None
  return int(colors[1]) * (1 if strategy.startswith("UniDirection") else 2)


def _stands_for(
  module: Module, c: Computation, i: Instruction, n: int
) -> tuple[str, Shape | None]:
  """What an all-reduce is there instead of, and the shape of a shard."""
  brought = [_own_part(module, c, name, n) for name in i.operands]
  if all(brought):
    return "all-gather", max(brought, key=lambda s: s.bytes)
  used = []
  for k, operand in enumerate(c.operands_of(i)):
    names = [i.name]
    if i.shape.dtype == "tuple":
      names = [
        u.name for u in c.users[i.name] if u.integers("index")[:1] == (k,)
      ]
    parts = [_used_part(module, c, name, operand.shape, n) for name in names]
    used += parts or [None]
  if all(used):
    return "reduce-scatter", max(used, key=lambda s: s.bytes)
  return "", None


def _own_part(
  module: Module, c: Computation, name: str, n: int
) -> Shape | None:
  """The n-th part that is written into an array, where that is its origin."""
  i = c[name]
  while True:
    if i.opcode in _SAME and i.operands:
      i = c[i.operands[0]]
    elif i.opcode == "fusion":
      c = module[i.computation_of("calls")]
      i = c.root
    else:
      break
  if i.opcode != "dynamic-update-slice":
    return None
  update = c[i.operands[1]].shape
  return update if update.size * n == i.shape.size else None


def _used_part(
  module: Module, c: Computation, name: str, full: Shape, n: int
) -> Shape | None:
  """The n-th part that is sliced out of an array, where nothing else is."""
  if c.root.name == name:
    return None
  parts = []
  for user in c.users[name]:
    if user.opcode in _SAME:
      parts.append(_used_part(module, c, user.name, full, n))
    elif user.opcode == "dynamic-slice" and user.operands[0] == name:
      parts.append(user.shape if user.shape.size * n == full.size else None)
    elif user.opcode == "fusion":
      inner = module[user.computation_of("calls")]
      for operand, p in zip(user.operands, inner.parameters, strict=True):
        if operand == name:
          parts.append(_used_part(module, inner, p.name, full, n))
    else:
      return None
  same = {p and p.size for p in parts}
  return parts[0] if len(same) == 1 else None


def _target(i: Instruction) -> str:
  return i.attributes.get("custom_call_target", "").strip('"')
