"""Optimized HLO text, `compiled.as_text()`, as data.

Reads what XLA prints for CPU, GPU and TPU programs: shapes with layouts, tiles
and memory spaces, instructions with their attributes (also those of Mosaic
kernels, which run over many lines), the tables of source locations. It gives
no meaning to them: `hlo_loops` follows the calls, `hlo_cost` counts operations
and bytes, `hlo_traffic` collectives.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tools.hlo_shape import ARRAY, COMMENT, HloError, Shape, parse_shape

_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.$<>-]+) \(.*\{\s*$")
_START = re.compile(r"\s*(?P<root>ROOT )?%?(?P<name>[\w.$<>-]+) = ")
_OPCODE = re.compile(r"\s*(?P<opcode>[a-z][\w-]*)\(")
_STOP = re.compile(r'["(){}\[\],\n]')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without `%`.
    shape: of the result.
    opcode: `fusion`, `all-gather-start`, ...
    operands: names in the same computation.
    argument: the raw text in the parentheses (a literal, a parameter's number).
    attributes: raw text by name; `metadata` and `backend_config` included.
    is_root: it is the computation's result.
    computation: the name of its computation.
  """

  name: str
  shape: Shape
  opcode: str
  operands: tuple[str, ...]
  argument: str
  attributes: Mapping[str, str]
  is_root: bool
  computation: str

  @property
  def op_name(self) -> str:
    """The path of the JAX operation it comes from, "" where none is given."""
    found = _OP_NAME.search(self.attributes.get("metadata", ""))
    return found[1] if found else ""

  @property
  def backend_config(self) -> Mapping[str, Any]:
    """The backend's own notes; empty where there are none.

    Raises:
      HloError: they are no JSON object.
    """
    return _backend_config(self.attributes.get("backend_config", "{}"))

  @property
  def result(self) -> Shape:
    """The shape of what is computed, also of an instruction that starts it.

    A start yields its operands, its result and what it needs to wait; only
    `copy-start` has the result first, and `all-reduce-start` nothing else.
    """
    if not self.opcode.endswith("-start") or self.opcode == "all-reduce-start":
      return self.shape
    if len(self.shape.elements) < 2:
      raise HloError(f"{self.name}: a {self.opcode} that yields {self.shape}")
    return self.shape.elements[0 if self.opcode == "copy-start" else 1]

  @property
  def called(self) -> tuple[str, ...]:
    """Names of computations that it names, in the order of its attributes."""
    keys = (
      "calls", "to_apply", "condition", "body", "branch_computations",
      "true_computation", "false_computation", "called_computations",
      "async_computation", "select", "scatter",
    )  # fmt: skip
    text = " ".join(self.attributes.get(k, "") for k in keys)
    return tuple(re.findall(r"%([\w.$<>-]+)", text))

  def integers(self, attribute: str) -> tuple[int, ...]:
    """An attribute such as `dimensions={1,2}`; () where it is absent."""
    return tuple(
      int(n) for n in re.findall(r"-?\d+", self.attributes.get(attribute, ""))
    )

  def computation_of(self, attribute: str) -> str:
    """The computation that an attribute names.

    Raises:
      HloError: it names none, or several.
    """
    names = re.findall(r"%?([\w.$<>-]+)", self.attributes.get(attribute, ""))
    if len(names) != 1:
      raise HloError(f"{self.name}: {attribute}={names}; needs one computation")
    return names[0]


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of instructions, in the order in which they are scheduled."""

  name: str
  instructions: Mapping[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    for i in self:
      if i.is_root:
        return i
    raise HloError(f"computation {self.name} has no ROOT")

  @functools.cached_property
  def parameters(self) -> tuple[Instruction, ...]:
    """Its parameters by number."""
    found = [i for i in self if i.opcode == "parameter"]
    return tuple(sorted(found, key=lambda i: int(i.argument)))

  @functools.cached_property
  def users(self) -> Mapping[str, tuple[Instruction, ...]]:
    """Instructions that read a name, by name."""
    users: dict[str, list[Instruction]] = {
      name: [] for name in self.instructions
    }
    for i in self:
      for name in dict.fromkeys(i.operands):
        users[name].append(i)
    return {name: tuple(u) for name, u in users.items()}

  def operands_of(self, i: Instruction) -> tuple[Instruction, ...]:
    return tuple(self.instructions[name] for name in i.operands)

  def __getitem__(self, name: str) -> Instruction:
    return self.instructions[name]

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class Module:
  """A whole program.

  Attributes:
    name: of the module, after the jitted function.
    computations: by name.
    entry: the name of the one that runs.
    partitions: devices that run it together.
    frames: source positions by `stack_frame_id`, "file:line".
  """

  name: str
  computations: Mapping[str, Computation]
  entry: str
  partitions: int
  frames: Mapping[int, str]

  def __getitem__(self, name: str) -> Computation:
    if name not in self.computations:
      raise HloError(f"no computation {name} in module {self.name}")
    return self.computations[name]

  def origin(self, i: Instruction) -> Instruction:
    """The nearest instruction with an `op_name` among those that lead to it.

    The compiler's own instructions carry none: what they bring together does.
    """
    level = [i]
    for _ in range(4):
      for at in level:
        if at.op_name:
          return at
      level = [before for at in level for before in self._before(at)]
    return i

  def _before(self, i: Instruction) -> list[Instruction]:
    """Operands, and of a fusion first what it computes."""
    operands = self[i.computation].operands_of(i)
    inside = self[i.computation_of("calls")] if i.opcode == "fusion" else ()
    return [*inside, *operands]

  def source(self, i: Instruction) -> str:
    """Where in the Python source it comes from, "file:line", or ""."""
    metadata = i.attributes.get("metadata", "")
    if found := re.search(r"stack_frame_id=(\d+)", metadata):
      return self.frames.get(int(found[1]), "")
    file = re.search(r'source_file="([^"]*)"', metadata)
    line = re.search(r"source_line=(\d+)", metadata)
    return f"{file[1]}:{line[1] if line else '?'}" if file else ""


def parse(text: str) -> Module:
  """Reads a program.

  Args:
    text: what `jax.stages.Compiled.as_text()` or an HLO dump gives.

  Raises:
    HloError: it is no HLO text, or a line of it is not understood.
  """
  if not text.startswith("HloModule "):
    raise HloError(
      f"not optimized HLO text: it starts with {text[:40]!r}, not 'HloModule'."
      " Give compiled.as_text(), or a dump's *after_optimizations.txt."
    )
  head, _, _ = text.partition("\n")
  computations: dict[str, Computation] = {}
  entry, opened, header = "", None, None
  position = len(head)
  while position < len(text):
    end = text.find("\n", position)
    end = len(text) if end < 0 else end
    if header is None:
      line = text[position:end]
      if header := _HEADER.match(line):
        opened = {}
        entry = header["name"] if header["entry"] else entry
      position = end + 1
    elif text.startswith("}", position):
      computations[header["name"]] = Computation(header["name"], opened)
      header, position = None, end + 1
    elif text[position:end].strip():
      i, position = _instruction(text, position, header["name"])
      opened[i.name] = i
    else:
      position = end + 1
  if header is not None or not entry:
    raise HloError(
      f"{head[:60]!r}: computation {header['name']} is cut off"
      if header
      else f"{head[:60]!r}: no ENTRY computation"
    )
  partitions = re.search(r"num_partitions=(\d+)", head)
  replicas = re.search(r"replica_count=(\d+)", head)
  if replicas and int(replicas[1]) > 1:
    raise HloError(f"replica_count={replicas[1]}: only partitions are known")
  module = Module(
    name=re.split(r"[ ,]", head, maxsplit=2)[1],
    computations=computations,
    entry=entry,
    partitions=int(partitions[1]) if partitions else 1,
    frames=_frames(text),
  )
  _check_names(module)
  return module


def split_top(text: str) -> list[str]:
  """Cuts at the commas outside of brackets and strings."""
  parts, depth, start, position = [], 0, 0, 0
  while found := _STOP.search(text, position):
    position, mark = found.end(), found[0]
    if mark == '"':
      string = _STRING.match(text, found.start())
      if not string:
        raise HloError(f"a string does not end: {text[:60]!r}")
      position = string.end()
    elif mark in "({[":
      depth += 1
    elif mark in ")}]":
      depth -= 1
    elif mark == "," and depth == 0:
      parts.append(text[start : found.start()].strip())
      start = position
  return [p for p in [*parts, text[start:].strip()] if p]


def _instruction(text: str, at: int, computation: str):
  """The instruction that starts at `at`, and where the next line starts."""
  start = _START.match(text, at)
  if not start:
    raise HloError(f"{computation}: not understood: {text[at : at + 80]!r}")
  at = start.end()
  if text.startswith("(", at):
    end = _closing(text, at)
  else:
    array = ARRAY.match(text, at)
    if not array:
      raise HloError(f"{start['name']}: no shape in {text[at : at + 80]!r}")
    end = array.end()
  shape = parse_shape(text[at:end])
  opcode = _OPCODE.match(text, end)
  if not opcode:
    raise HloError(f"{start['name']}: no opcode in {text[end : end + 80]!r}")
  close = _closing(text, opcode.end() - 1)
  argument = text[opcode.end() : close - 1]
  stop = _end_of_line(text, close)
  operands: tuple[str, ...] = ()
  if opcode["opcode"] not in ("constant", "parameter", "iota"):
    parts = split_top(COMMENT.sub("", argument))
    operands = tuple(p.rsplit(None, 1)[-1].removeprefix("%") for p in parts)
  instruction = Instruction(
    name=start["name"],
    shape=shape,
    opcode=opcode["opcode"],
    operands=operands,
    argument=argument,
    attributes=_attributes(text[close:stop], start["name"]),
    is_root=bool(start["root"]),
    computation=computation,
  )
  return instruction, stop + 1


def _attributes(text: str, name: str) -> dict[str, str]:
  attributes: dict[str, str] = {}
  for part in split_top(text):
    key, equals, value = part.partition("=")
    if not equals:
      raise HloError(f"{name}: attribute {part[:60]!r} has no value")
    if key == "device_ids" and attributes.get("replica_groups", "").startswith(
      "mesh"
    ):  # one value with a comma: mesh['a'=8], device_ids=([2,4]T(1,0)) {'a'}
      attributes["replica_groups"] += f", {part}"
    else:
      attributes[key.strip()] = value.strip()
  return attributes


def _closing(text: str, at: int) -> int:
  """One past the bracket that closes the one at `at`."""
  depth, position = 0, at
  while found := _STOP.search(text, position):
    position = found.end()
    if found[0] == '"':
      string = _STRING.match(text, found.start())
      if not string:
        break
      position = string.end()
    elif found[0] in "({[":
      depth += 1
    elif found[0] in ")}]":
      depth -= 1
      if depth == 0:
        return position
  raise HloError(f"a bracket does not close: {text[at : at + 80]!r}")


def _end_of_line(text: str, at: int) -> int:
  """The first line's end outside of brackets and strings."""
  while found := _STOP.search(text, at):
    if found[0] == "\n":
      return found.start()
    if found[0] in "({[":
      at = _closing(text, found.start())
    elif found[0] == '"':
      string = _STRING.match(text, found.start())
      if not string:
        raise HloError(f"a string does not end: {text[at : at + 80]!r}")
      at = string.end()
    else:
      at = found.end()
  return len(text)


@functools.lru_cache(maxsize=4096)
def _backend_config(text: str) -> Mapping[str, Any]:
  try:
    config = json.loads(text)
    if isinstance(config, str):  # older printers quote the object
      config = json.loads(config) if config else {}
  except json.JSONDecodeError as error:
    raise HloError(f"backend_config is no JSON: {text[:60]!r}") from error
  if not isinstance(config, dict):
    raise HloError(f"backend_config is no object: {text[:60]!r}")
  return config


def _frames(text: str) -> dict[int, str]:
  """Positions by `stack_frame_id`, from the tables at the module's head."""
  head = text[: text.find("{\n") if "{\n" in text else None]
  tables: dict[str, dict[int, str]] = {}
  current: dict[int, str] = {}
  for line in head.split("\n"):
    if re.fullmatch(r"[A-Z]\w+", line):
      current = tables.setdefault(line, {})
    elif row := re.match(r"(\d+) (.*)", line):
      current[int(row[1])] = row[2]

  def number(row: str, key: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", row)
    return int(found[1]) if found else 0

  files = tables.get("FileNames", {})
  places = {}
  for k, row in tables.get("FileLocations", {}).items():
    file = files.get(number(row, "file_name_id"), "").strip('"')
    places[k] = f"{file}:{number(row, 'line')}"
  return {
    k: places.get(number(row, "file_location_id"), "")
    for k, row in tables.get("StackFrames", {}).items()
  }


def _check_names(module: Module) -> None:
  for computation in module.computations.values():
    for i in computation:
      for name in i.operands:
        if name not in computation.instructions:
          raise HloError(
            f"{i.name} reads {name}, unknown in {computation.name}"
          )
      for name in i.called:
        if name not in module.computations:
          raise HloError(f"{i.name} calls {name}, which is not in the module")
