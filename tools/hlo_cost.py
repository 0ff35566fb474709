"""Floating-point operations and HBM bytes of single HLO instructions, counted.

Operations are those of matrix products: dots, convolutions (on TPU a dot is
one) and kernels that state theirs. What the compiler writes as a multiplication
and a sum, such as the attention of a single query, is no product.

Bytes are those of arrays in HBM that an instruction reads and writes once each;
what a fusion only slices counts as the slice, what it updates in place as the
update.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from tools.hlo_program import (
  Computation,
  HloError,
  Instruction,
  Module,
  Shape,
)

# Instructions that move nothing: names for parts, or work counted elsewhere.
_FREE = frozenset(
  "parameter constant tuple get-tuple-element bitcast while conditional call"
  " after-all add-dependency opt-barrier optimization-barrier partition-id"
  " replica-id iota async domain get-dimension-size set-dimension-size".split()
)
_HBM = 0
# An asynchronous collective of TPU is split over several fusions: the first
# holds it and the start mark, the last it and the done mark, and those between
# compute while it goes on. It communicates once.
SPLIT_MARKS = ("AsyncCollectiveStart", "AsyncCollectiveDone")


@dataclasses.dataclass(frozen=True)
class Flops:
  """Matrix operations of one execution of an instruction.

  Attributes:
    kind: "dot", "convolution", "ragged" (a grouped product whose kernel visits
      only tiles with rows in use), "masked" (a convolution over all groups that
      skips tiles that its mask empties), "kernel" (its own estimate), or
      "unknown" (a kernel without one).
    nominal: by the shapes, every row in use; 0 for "unknown".
    executed: expected with the given number of rows in use.
    at_most: `executed` when every group starts and ends inside of a tile.
    dtype: of the operands.
  """

  kind: str
  nominal: float
  executed: float
  at_most: float
  dtype: str


def instruction_flops(
  computation: Computation, i: Instruction, *, ragged_rows: float | None = None
) -> Flops | None:
  """Operations of one execution, a multiplication and an addition being two.

  Args:
    computation: where it stands.
    i: the instruction.
    ragged_rows: rows of a ragged product that belong to a group; None: all.

  Returns:
    None where the instruction is no matrix product.

  Raises:
    HloError: a product whose attributes are not understood.
  """
  if i.opcode == "dot":
    flops = _dot(computation, i)
  elif i.opcode == "convolution":
    flops = _convolution(computation, i)
  elif i.opcode == "ragged-dot":
    raise HloError(f"{i.name}: a ragged-dot that was not lowered")
  elif i.opcode == "custom-call":
    return _custom_call(computation, i, ragged_rows)
  else:
    return None
  return Flops(i.opcode, flops, flops, flops, _dtype(computation, i))


def is_work(i: Instruction) -> bool:
  """Whether an instruction may be a product or communicates."""
  return i.opcode.removesuffix("-start") in (
    "dot", "convolution", "ragged-dot", "custom-call", "all-gather",
    "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast", "send", "recv",
  )  # fmt: skip


def skips_masked(i: Instruction) -> bool:
  """Whether a fusion skips iterations that its mask empties (TPU).

  The gradient of a ragged product by its matrices becomes a convolution over
  all pairs of group and row tile, of which most are masked and skipped.
  """
  if i.opcode != "fusion":
    return False
  mode = i.backend_config.get("mask_aggregator_config", {}).get(
    "iteration_skipper_mode", ""
  )
  return mode.startswith("ITERATION_SKIPPER_MODE_ITERATION")


def masked_flops(
  fused: Computation, i: Instruction, flops: Flops, ragged_rows: float | None
) -> Flops:
  """A convolution inside a fusion that skips masked iterations.

  Args:
    fused: what the fusion computes; a parameter of it is the mask, of one row
      for each group, in which a row of the product is set in one of them.
    i: the fusion.
    flops: of the convolution, by its shapes.
    ragged_rows: rows that belong to a group; None: all.

  Raises:
    HloError: the fusion has no mask among its parameters.
  """
  masks = [p.shape.dims for p in fused.parameters if p.shape.dtype == "pred"]
  if not masks or len(masks[0]) < 2:
    raise HloError(f"{i.name} skips masked iterations, but has no mask")
  groups, rows = masks[0][:2]
  share = 1.0 if ragged_rows is None else min(1.0, ragged_rows / rows)
  config = i.backend_config
  bounds = [int(b) for b in config["window_config"]["iteration_bounds"]]
  order = config["mask_aggregator_config"]["mask_dim_to_iteration_index"]
  tiles = bounds[int(order[-1])] if bounds else 1
  visited = min(math.ceil(tiles * share) + groups - 1, tiles * groups)
  return Flops(
    kind="masked",
    nominal=flops.nominal,
    executed=flops.nominal * share / groups,
    at_most=flops.nominal * visited / (tiles * groups),
    dtype=flops.dtype,
  )


def is_continued(i: Instruction) -> bool:
  """Whether a collective was started by an earlier fusion that holds it too."""
  split = i.attributes.get("backend_config", "")
  if "async_collective_fusion_config" not in split:
    return False
  config = i.backend_config["async_collective_fusion_config"]
  return int(config["flag_start"]) >= 0


def hbm_bytes(
  module: Module,
  computation: Computation,
  i: Instruction,
  *,
  ragged_rows: float | None = None,
) -> float:
  """Bytes that one execution reads from and writes to HBM.

  A lower bound: a kernel that reads an operand several times counts once, but
  for ragged products, of which the tiles are known; a ragged all-to-all
  moves the rows in use, as many in as out. Arrays in other
  memory spaces (VMEM, SMEM, flags) are free, and so is what an instruction that
  calls others (a loop, a branch) hands on.

  Args:
    module: the program.
    computation: where the instruction stands, not a fused one.
    i: the instruction.
    ragged_rows: rows of a ragged product or exchange in use; None: all.
  """
  opcode, result = i.opcode, i.shape
  if opcode.endswith(("-done", "-update")):
    return 0  # counted where it starts
  if opcode.endswith("-start"):
    opcode, result = opcode.removesuffix("-start"), i.result
  if opcode in _FREE:
    return 0
  operands = computation.operands_of(i)
  if opcode == "fusion":
    fused = module[i.computation_of("calls")]
    read = sum(
      _in_hbm(o.shape, _bytes_read(module, fused, p.name, o.shape))
      for o, p in zip(operands, fused.parameters, strict=True)
    )
    return read + _written_by_fusion(module, fused, result)
  if opcode == "custom-call" and (tiles := _ragged_tiles(i)):
    return _ragged_bytes(operands, result, tiles, ragged_rows)
  if opcode == "ragged-all-to-all":  # only rows in use, the rest stays
    rows = operands[0].shape
    share = 1.0 if ragged_rows is None else min(1.0, ragged_rows / rows.dims[0])
    whole = _in_hbm(rows, rows.bytes)
    return share * (whole + _in_hbm(result, rows.bytes))
  written = sum(_in_hbm(a, a.padded_bytes) for a in result.arrays)
  if opcode in ("dynamic-slice", "slice"):
    read = _in_hbm(operands[0].shape, result.padded_bytes)
  elif opcode == "gather":
    read = _in_hbm(operands[0].shape, result.padded_bytes)
    read += _in_hbm(operands[1].shape, operands[1].shape.padded_bytes)
  elif opcode == "dynamic-update-slice":
    update = operands[1].shape
    read = _in_hbm(update, update.padded_bytes)
    written = _in_hbm(result, update.padded_bytes)
  elif opcode == "scatter":
    parts = operands[len(result.arrays) :]
    read = sum(_in_hbm(o.shape, o.shape.padded_bytes) for o in parts)
    updates = parts[1:]
    written = sum(_in_hbm(result, u.shape.padded_bytes) for u in updates)
    read += written  # what is added to is read as well
  else:
    read = sum(
      _in_hbm(a, a.padded_bytes) for o in operands for a in o.shape.arrays
    )
  return read + written


def _ragged_tiles(i: Instruction) -> tuple[int, ...]:
  """Rows, depth and columns of the tiles of a kernel for ragged products.

  XLA's names them, and so do those of `rlm.kernels.grouped_matmul_tpu`.
  """
  found = re.search(
    r'(?:ragged_dot_tiling|grouped_matmul_tiles)="([\d,]+)"',
    i.attributes.get("frontend_attributes", ""),
  )
  return tuple(int(n) for n in found[1].split(",")) if found else ()


def _is_gradient(out: Shape) -> bool:
  """Whether a ragged product is one by matrices: [M, K], [M, N] -> [G, K, N].

  XLA writes that as a masked convolution, rlm's kernel does it.
  """
  return len(out.dims) == 3


def _ragged_bytes(
  operands: Iterable[Instruction],
  out: Shape,
  tiles: tuple[int, ...],
  ragged_rows: float | None,
) -> float:
  """HBM bytes of a kernel [M, K] x [G, K, N] -> [M, N] for ragged products.

  Its grid goes over tiles of columns, then of rows, then of depth: rows are
  read again for each tile of columns. Matrices stay from one tile of rows to
  the next, unless their depth is cut: then each tile of rows reads them again.
  A gradient reads both operands once for each tile of the other's width.
  """
  shapes = [o.shape for o in operands]
  if _is_gradient(out):
    left, right = (s for s in shapes if len(s.dims) == 2)
    rows, (_, depth, columns) = left.dims[0], out.dims
    share = 1.0 if ragged_rows is None else min(1.0, ragged_rows / rows)
    across, down = math.ceil(columns / tiles[2]), math.ceil(depth / tiles[1])
    read = _in_hbm(left, left.padded_bytes) * across
    read += _in_hbm(right, right.padded_bytes) * down
    return read * share + _in_hbm(out, out.padded_bytes)
  left = next(s for s in shapes if len(s.dims) == 2)
  right = next(s for s in shapes if len(s.dims) == 3)
  rows, depth = left.dims
  share = 1.0 if ragged_rows is None else min(1.0, ragged_rows / rows)
  columns = math.ceil(out.dims[1] / tiles[2])
  passes = 1.0
  if tiles[1] < depth:
    passes = max(1.0, share * rows / tiles[0] / right.dims[0])
  return (
    _in_hbm(left, left.padded_bytes) * share * columns
    + _in_hbm(right, right.padded_bytes) * passes
    + _in_hbm(out, out.padded_bytes) * share
  )


def _mark(i: Instruction) -> str:
  return i.attributes.get("custom_call_target", "").strip('"')


def _in_hbm(shape: Shape, size: int) -> int:
  return size if shape.memory_space == _HBM else 0


def _bytes_read(
  module: Module, fused: Computation, name: str, full: Shape
) -> int:
  """Of a fusion's operand, the bytes that its body reads."""
  total = 0
  for user in fused.users[name]:
    if user.opcode in ("bitcast", "reshape"):
      total += _bytes_read(module, fused, user.name, full)
    elif user.opcode in ("dynamic-slice", "slice", "gather") and (
      user.operands[0] == name and name not in user.operands[1:]
    ):
      total += user.shape.padded_bytes
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
      continue  # updated in place: only the slice is written
    elif user is fused.root and user.opcode == "tuple":
      continue  # handed on
    elif is_continued(user) or _mark(user) == SPLIT_MARKS[1]:
      continue  # counted where it starts
    elif user.opcode == "fusion":
      inner = module[user.computation_of("calls")]
      for operand, p in zip(user.operands, inner.parameters, strict=True):
        if operand == name:
          total += _bytes_read(module, inner, p.name, full)
    else:
      return full.padded_bytes
    if total >= full.padded_bytes:
      return full.padded_bytes
  return total


def _written_by_fusion(module: Module, fused: Computation, whole: Shape) -> int:
  roots = [fused.root]
  if fused.root.opcode == "tuple":
    roots = list(fused.operands_of(fused.root))
  elif _mark(fused.root) == SPLIT_MARKS[0]:  # operand, result, flags
    result = fused.root.shape.elements[1]
    return _in_hbm(result, result.padded_bytes)
  elif len(whole.arrays) > 1:
    return sum(_in_hbm(a, a.padded_bytes) for a in whole.arrays)
  written = 0
  for root, shape in zip(roots, whole.arrays, strict=True):
    within, at = fused, root
    while at.opcode in ("bitcast", "fusion") and at.operands:
      if at.opcode == "fusion":
        within = module[at.computation_of("calls")]
        at = within.root
      else:
        at = within[at.operands[0]]
    size = shape.padded_bytes
    if at.opcode == "parameter" or is_continued(at):
      size = 0
    elif _mark(at) == SPLIT_MARKS[1]:
      size = 0
    elif at.opcode == "dynamic-update-slice":
      size = within[at.operands[1]].shape.padded_bytes
    written += _in_hbm(shape, size)
  return written


def _dtype(computation: Computation, i: Instruction) -> str:
  """Of the largest operand: kernels also take small tables of integers."""
  arrays = [o.shape for o in computation.operands_of(i) if o.shape.dims]
  return max(arrays or [i.shape], key=lambda s: s.bytes).dtype


def _dot(computation: Computation, i: Instruction) -> float:
  left = computation[i.operands[0]].shape
  contracted = i.integers("lhs_contracting_dims")
  return 2.0 * i.shape.size * math.prod(left.dims[d] for d in contracted)


def _convolution(computation: Computation, i: Instruction) -> float:
  """As XLA counts: only positions of the window that meet an element."""
  lhs, rhs = (o.shape for o in computation.operands_of(i)[:2])
  labels = re.fullmatch(
    r"(\w+)_(\w+)->(\w+)", i.attributes.get("dim_labels", "")
  )
  if not labels:
    raise HloError(f"{i.name}: dim_labels {i.attributes.get('dim_labels')!r}")
  left, right, out = labels.groups()
  window = _window(i.attributes.get("window", "{}"))
  positions = 1
  for k in range(sum(c.isdigit() for c in left)):
    d = str(k)
    positions *= _valid_positions(
      lhs.dims[left.index(d)],
      rhs.dims[right.index(d)],
      i.shape.dims[out.index(d)],
      {key: values[k] for key, values in window.items() if k < len(values)},
    )
  features = lhs.dims[left.index("f")]
  features //= (i.integers("feature_group_count") or (1,))[0]
  batch = lhs.dims[left.index("b")]
  batch //= (i.integers("batch_group_count") or (1,))[0]
  return 2.0 * features * batch * i.shape.dims[out.index("f")] * positions


def _window(text: str) -> dict[str, list[tuple[int, ...]]]:
  fields = re.findall(r"(\w+)=([-\dx_]+)", text)
  return {
    key: [tuple(int(n) for n in v.split("_")) for v in value.split("x")]
    for key, value in fields
  }


def _valid_positions(
  size: int, window: int, outputs: int, w: dict[str, tuple[int, ...]]
) -> int:
  """Pairs of an output and a window element that meet an input element."""
  stride = w.get("stride", (1,))[0]
  low = w.get("pad", (0, 0))[0]
  base = w.get("lhs_dilate", (1,))[0]
  spread = w.get("rhs_dilate", (1,))[0]
  count = 0
  for o in range(outputs):
    first = o * stride - low
    for k in range(window):
      at = first + k * spread
      count += 0 <= at <= (size - 1) * base and at % base == 0
  return count


def _custom_call(
  computation: Computation, i: Instruction, ragged_rows: float | None
) -> Flops | None:
  target = i.attributes.get("custom_call_target", "").strip('"')
  dtype = _dtype(computation, i)
  if target == "tpu_custom_call":
    config = i.backend_config.get("custom_call_config", {})
    flops = float(config.get("cost_estimate", {}).get("flops", 0))
    if tiling := _ragged_tiles(i):
      arrays = [o.shape for o in computation.operands_of(i)]
      rows, depth = next(a.dims for a in arrays if len(a.dims) == 2)
      groups = next(a.dims for a in [*arrays, i.shape] if len(a.dims) == 3)[0]
      nominal = 2.0 * rows * depth * i.shape.dims[-1]
      share = 1.0 if ragged_rows is None else min(1.0, ragged_rows / rows)
      tiles = math.ceil(rows / tiling[0])
      visited = math.ceil(tiles * share) + groups - 1
      at_most = nominal * visited / tiles
      return Flops("ragged", nominal, nominal * share, at_most, dtype)
    if "ragged-dot-metadata" in i.name:  # tables of groups, no products
      return None
    kind = "kernel" if flops else "unknown"
    return Flops(kind, flops, flops, flops, dtype)
  if re.search(r"matmul|gemm|dot|conv", target):
    # A library's product, written as a call: [.., M, K] x [.., K, N].
    left = computation[i.operands[0]].shape
    out = i.shape.arrays[0]
    kind = "kernel"
    flops = 2.0 * out.size * left.dims[-1] if left.dims else 0.0
    if not flops or "transpose" in target:
      kind = "unknown"
    return Flops(kind, flops, flops, flops, dtype)
  return None
