"""How often each instruction of an HLO program runs.

TPU programs carry no trip counts: each loop's condition is read, with what its
start value and its body make of the variables it looks at. A loop that depends
on data is `dynamic`, and the caller says how often it turns.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from tools import hlo_cost
from tools.hlo_program import Computation, HloError, Instruction, Module

# Loops that turn more often are not followed; no scan of ours comes near.
_LONGEST = 200_000
_SAME = frozenset(
  "copy bitcast copy-done convert reshape opt-barrier optimization-barrier"
  " add-dependency broadcast".split()
)
_CALLS = frozenset("fusion fusion-start call call-start async-start".split())
_ARITHMETIC: Mapping[str, Callable[..., int]] = {
  "add": lambda a, b: a + b,
  "subtract": lambda a, b: a - b,
  "multiply": lambda a, b: a * b,
  "divide": lambda a, b: int(a / b) if b else None,
  "remainder": lambda a, b: a - b * int(a / b) if b else None,
  "minimum": min,
  "maximum": max,
  "negate": lambda a: -a,
  "not": lambda a: int(not a),
  "select": lambda p, a, b: a if p else b,
  "clamp": lambda low, a, high: max(low, min(a, high)),
}
_COMPARE: Mapping[str, Callable[[int, int], bool]] = {
  "LT": lambda a, b: a < b,
  "LE": lambda a, b: a <= b,
  "GT": lambda a, b: a > b,
  "GE": lambda a, b: a >= b,
  "EQ": lambda a, b: a == b,
  "NE": lambda a, b: a != b,
}


@dataclasses.dataclass(frozen=True)
class Execution:
  """An instruction with how often it runs.

  Attributes:
    instruction: the instruction.
    count: executions in one run of the program.
    fused: it stands inside a fusion.
    caller: the outermost fusion around it, or else the innermost asynchronous
      wrapper (`async-start`); None outside of both.
    loops: names of the loops around it, outermost first.
  """

  instruction: Instruction
  count: float
  fused: bool
  caller: Instruction | None
  loops: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Loop:
  """A while loop.

  Attributes:
    name: of the instruction.
    op_name: the JAX path that it comes from.
    source: "file:line" or "".
    trips: turns each time it is entered.
    entered: how often it is entered.
    dynamic: the program does not say how often it turns: the caller did.
  """

  name: str
  op_name: str
  source: str
  trips: float
  entered: float
  dynamic: bool


@dataclasses.dataclass(frozen=True)
class Branching:
  """A conditional, and which branch was counted.

  Attributes:
    name: of the instruction.
    op_name: the JAX path that it comes from.
    branches: names of the branches' computations.
    taken: the index of the one that is counted at every execution.
  """

  name: str
  op_name: str
  branches: tuple[str, ...]
  taken: int


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a program.

  Attributes:
    module: the program.
    executions: each instruction, in the order of the walk.
    loops: its while loops, with what was assumed of them.
    branchings: its conditionals, likewise.
  """

  module: Module
  executions: Sequence[Execution]
  loops: Sequence[Loop]
  branchings: Sequence[Branching]


def follow(
  module: Module,
  *,
  dynamic_trips: Mapping[str, float] | None = None,
  default_trips: float | None = None,
  branches: Mapping[str, int] | None = None,
) -> Run:
  """Follows the program from its entry through calls, loops and branches.

  Of a conditional the most expensive branch counts, the one with the most
  matrix operations, or at a tie the most bytes, unless `branches` names it.

  Args:
    module: the program.
    dynamic_trips: for loops whose turns depend on data: a part of the loop's
      name or `op_name` -> turns each time it is entered.
    default_trips: turns of the dynamic loops that `dynamic_trips` leaves out.
    branches: a part of a conditional's name or `op_name` -> index.

  Raises:
    HloError: a dynamic loop without a number; a call that is not understood.
  """
  walk = _Walk(module, dynamic_trips or {}, default_trips, branches or {})
  executions = list(
    walk.computation(module.entry, _Values(lambda n, p: None), 1.0, (), None)
  )
  if walk.unanswered:
    raise HloError(
      "turns of these loops depend on data: "
      + "; ".join(f"{n} ({o or 'no op_name'})" for n, o in walk.unanswered)
      + ". Give them in dynamic_trips by a part of the name, or default_trips."
    )
  return Run(module, executions, walk.loops, walk.branchings)


def trip_count(
  module: Module, loop: Instruction, values: "_Values | None" = None
) -> int | None:
  """Turns of a while loop, or None where they depend on data.

  Args:
    module: the program.
    loop: the `while`.
    values: of the parameters of the computation that it stands in.

  Raises:
    HloError: the program states another number than its condition gives.
  """
  read = _Reader(module)
  turns = read.turns(loop, values or _Values(lambda n, p: None))
  known = loop.attributes.get("backend_config", "")
  if "known_trip_count" in known:
    stated = int(loop.backend_config["known_trip_count"]["n"])
    if turns is not None and turns != stated:
      raise HloError(f"{loop.name}: turns {turns} times, but states {stated}")
    return stated
  return turns


class _Values:
  """Integers that a computation's parameters hold, None where unknown."""

  def __init__(self, get: Callable[[int, tuple[int, ...]], int | None]):
    self.get = get
    self.memo: dict[tuple[str, tuple[int, ...]], int | None] = {}
    # Of a loop's state, what its body makes of it: names there are others.
    self.body_memo: dict[tuple[str, tuple[int, ...]], int | None] = {}


class _Reader:
  """Evaluates the scalar integers of a program, as far as they are constant."""

  def __init__(self, module: Module):
    self._module = module

  def value(
    self, c: Computation, name: str, path: tuple[int, ...], values: _Values
  ) -> int | None:
    """The integer that the part `path` of an instruction's result holds."""
    key = (name, path)
    if key not in values.memo:
      values.memo[key] = None  # a cycle, which there is not, would be unknown
      values.memo[key] = self._value(c, c[name], path, values)
    return values.memo[key]

  def _value(self, c, i, path, values):
    def operand(k, path=()):
      return self.value(c, i.operands[k], path, values)

    if i.opcode == "constant":
      return _integer(i)
    if i.opcode == "parameter":
      return values.get(int(i.argument), path)
    if i.opcode == "tuple":
      return operand(path[0], path[1:]) if path else None
    if i.opcode == "get-tuple-element":
      return operand(0, (*i.integers("index"), *path))
    if i.opcode == "copy-start":
      return operand(0)
    if i.opcode in _SAME:
      return operand(0, path)
    if i.opcode in ("fusion", "call"):
      called = self._module[i.called[0]]
      inner = _Values(operand)
      return self.value(called, called.root.name, path, inner)
    if i.opcode == "while":
      body = self._module[i.computation_of("body")]
      return operand(0, path) if self.invariant(body, path) else None
    if i.opcode in ("and", "or"):
      a, b = operand(0), operand(1)
      if a is None or b is None:
        return None
      return a & b if i.opcode == "and" else a | b
    if i.opcode == "compare":
      a, b = operand(0), operand(1)
      if a is None or b is None:
        return None
      return int(_COMPARE[i.attributes["direction"]](a, b))
    if i.opcode in _ARITHMETIC and i.shape.dtype[0] in "sup":
      parts = [operand(k) for k in range(len(i.operands))]
      if None in parts:
        return None
      return _ARITHMETIC[i.opcode](*parts)
    return None

  def invariant(self, body: Computation, path: tuple[int, ...]) -> bool:
    """Whether a loop's body hands this part of its state on as it came."""
    name, at = body.root.name, path
    while True:
      i = body[name]
      if i.opcode == "parameter":
        return at == path
      if i.opcode == "tuple" and at:
        name, at = i.operands[at[0]], at[1:]
      elif i.opcode == "get-tuple-element":
        name, at = i.operands[0], (*i.integers("index"), *at)
      elif i.opcode in ("copy", "bitcast", "opt-barrier", "copy-done"):
        name = i.operands[0]
      elif i.opcode == "copy-start":
        name, at = i.operands[0], ()
      elif i.opcode == "while" and self.invariant(
        self._module[i.computation_of("body")], at
      ):
        name = i.operands[0]
      else:
        return False

  def inside(self, c: Computation, loop: Instruction, values: _Values):
    """What a loop's body knows: the parts of its state that never change."""
    body = self._module[loop.computation_of("body")]

    def get(_, path):
      if not self.invariant(body, path):
        return None
      return self.value(c, loop.operands[0], path, values)

    return _Values(get)

  def turns(self, loop: Instruction, values: _Values) -> int | None:
    """Runs the variables that the condition looks at until it fails."""
    c = self._module[loop.computation]
    condition = self._module[loop.computation_of("condition")]
    body = self._module[loop.computation_of("body")]

    def start(_, path):
      return self.value(c, loop.operands[0], path, values)

    def after(before: _Values) -> _Values:
      def get(_, path):
        if self.invariant(body, path):
          return start(0, path)
        inner = _Values(before.get)
        inner.memo = before.body_memo
        return self.value(body, body.root.name, path, inner)

      return _Values(get)

    state = _Values(start)
    for turn in range(_LONGEST):
      goes_on = self.value(condition, condition.root.name, (), state)
      if goes_on is None:
        return None
      if not goes_on:
        return turn
      state = after(state)
    return None


class _Walk:
  """Multiplies counts on the way down; see `follow`."""

  def __init__(self, module, dynamic_trips, default_trips, branches):
    self._module = module
    self._dynamic, self._default = dynamic_trips, default_trips
    self._branches = branches
    self._read = _Reader(module)
    self.loops: list[Loop] = []
    self.branchings: list[Branching] = []
    self.unanswered: dict[tuple[str, str], None] = {}

  def computation(
    self,
    name: str,
    values: _Values,
    count: float,
    loops: tuple[str, ...],
    caller: Instruction | None,
  ) -> Iterator[Execution]:
    c = self._module[name]
    fused = caller is not None and caller.opcode == "fusion"
    for i in c:
      yield Execution(i, count, fused, caller, loops)
      if i.opcode == "while":
        yield from self._while(c, i, values, count, loops)
      elif i.opcode == "conditional":
        yield from self._conditional(i, count, loops)
      elif i.opcode in _CALLS:
        if len(i.called) != 1:
          raise HloError(f"{i.name} calls {i.called}; one is understood")
        inner = _Values(self._operands(c, i, values))
        outer = caller if fused or i.opcode == "call" else i
        yield from self.computation(i.called[0], inner, count, loops, outer)
      elif i.called and not i.opcode.endswith(("-done", "-update")):
        self._check_called(i)

  def _check_called(self, i: Instruction) -> None:
    """Reducers and comparisons are called for each element: no work of note."""
    for inner in (x for name in i.called for x in self._module[name]):
      if inner.called or hlo_cost.is_work(inner):
        raise HloError(
          f"{i.name}, a {i.opcode}, calls {inner.name}, a {inner.opcode}: how"
          " often is not understood"
        )

  def _operands(self, c, i, values):
    return lambda n, path: self._read.value(c, i.operands[n], path, values)

  def _while(self, c, i, values, count, loops):
    trips = trip_count(self._module, i, values)
    dynamic = trips is None
    if dynamic:
      trips = _lookup(self._dynamic, i, self._default)
      if trips is None:
        self.unanswered[i.name, i.op_name] = None
        return
    source = self._module.source(i)
    self.loops.append(Loop(i.name, i.op_name, source, trips, count, dynamic))
    inside = self._read.inside(c, i, values)
    around = (*loops, i.name)
    body, condition = (i.computation_of(k) for k in ("body", "condition"))
    if trips:
      yield from self.computation(body, inside, count * trips, around, None)
    inside = self._read.inside(c, i, values)  # names differ: a fresh memory
    turns = count * (trips + 1)
    yield from self.computation(condition, inside, turns, around, None)

  def _conditional(self, i, count, loops):
    named = [
      i.attributes[k]
      for k in ("true_computation", "false_computation")
      if k in i.attributes
    ] or [i.attributes.get("branch_computations", "")]
    branches = tuple(
      n.strip().removeprefix("%")
      for n in itertools.chain(*(t.strip("{}").split(",") for t in named))
    )
    unknown = _Values(lambda n, p: None)
    loops_before = len(self.loops), len(self.branchings)
    walked, noted = [], []
    for name in branches:
      walked.append(list(self.computation(name, unknown, count, loops, None)))
      noted.append(
        (self.loops[loops_before[0] :], self.branchings[loops_before[1] :])
      )
      del self.loops[loops_before[0] :], self.branchings[loops_before[1] :]
    taken = _lookup(self._branches, i, None)
    if taken is None:
      costs = [_cost(self._module, w) for w in walked]
      taken = max(range(len(costs)), key=costs.__getitem__)
    self.loops += noted[taken][0]
    self.branchings.append(Branching(i.name, i.op_name, branches, taken))
    self.branchings += noted[taken][1]
    yield from walked[taken]


def _lookup(table: Mapping[str, float], i: Instruction, default):
  """The entry whose key is part of the instruction's name or op_name."""
  found = {k: v for k, v in table.items() if k in i.name or k in i.op_name}
  if len(set(found.values())) > 1:
    raise HloError(f"{i.name} ({i.op_name}) matches several of {sorted(found)}")
  return next(iter(found.values()), default)


def _cost(module: Module, executions: list[Execution]) -> tuple[float, float]:
  flops = moved = 0.0
  for e in executions:
    c = module[e.instruction.computation]
    if work := hlo_cost.instruction_flops(c, e.instruction):
      flops += e.count * work.executed
    if not e.fused:
      moved += e.count * hlo_cost.hbm_bytes(module, c, e.instruction)
  return flops, moved


def _integer(i: Instruction) -> int | None:
  text = i.argument.strip()
  if i.shape.dims or i.shape.dtype[0] not in "sup":
    return None
  if text in ("true", "false"):
    return int(text == "true")
  return int(text) if text.lstrip("-").isdigit() else None
