"""What a run of an HLO program computes and moves in HBM, loops multiplied.

The compiler's own `cost_analysis()` counts the body of a loop once, and on TPU
it counts products that a kernel skips. Here each instruction counts as often
as `hlo_loops.follow` says that it runs.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from tools import hlo_cost
from tools.hlo_loops import Execution, Run


@dataclasses.dataclass(frozen=True)
class Product:
  """A matrix product, or a kernel that may hold some.

  Attributes:
    name: of the instruction.
    op_name: the JAX path that it comes from.
    source: "file:line" or "".
    shape: of the result, as text.
    executions: in one run.
    flops: of one execution.
  """

  name: str
  op_name: str
  source: str
  shape: str
  executions: float
  flops: hlo_cost.Flops


@dataclasses.dataclass(frozen=True)
class Work:
  """Totals of one device in one run.

  Attributes:
    flops: matrix operations expected to be executed.
    flops_at_most: where every group of a ragged product starts in a tile.
    flops_nominal: by the shapes, rows in no group included.
    flops_by_kind: of `flops`, by `hlo_cost.Flops.kind`.
    flops_by_dtype: of `flops`, by the operands' type.
    hbm_bytes: read and written in HBM, a lower bound.
    hbm_bytes_by_opcode: of `hbm_bytes`.
    products: all of them, the most operations first.
    unknown: kernels that state no estimate: their operations are in no total.
  """

  flops: float
  flops_at_most: float
  flops_nominal: float
  flops_by_kind: Mapping[str, float]
  flops_by_dtype: Mapping[str, float]
  hbm_bytes: float
  hbm_bytes_by_opcode: Mapping[str, float]
  products: Sequence[Product]
  unknown: Sequence[Product]


def count_work(run: Run, *, ragged_rows: float | None = None) -> Work:
  """Adds up operations and HBM bytes.

  Args:
    run: of the program, from `hlo_loops.follow`.
    ragged_rows: of a ragged product's rows, those that belong to a group, as
      expected; the kernels skip tiles without any. None: all do.
  """
  products, moved = [], collections.Counter()
  for e in run.executions:
    computation = run.module[e.instruction.computation]
    work = hlo_cost.instruction_flops(
      computation, e.instruction, ragged_rows=ragged_rows
    )
    if work is not None:
      products.append(_product(run, e, work, ragged_rows))
    if not e.fused:
      moved[e.instruction.opcode] += e.count * hlo_cost.hbm_bytes(
        run.module, computation, e.instruction, ragged_rows=ragged_rows
      )
  products.sort(key=lambda p: -p.executions * p.flops.executed)
  kinds, dtypes = collections.Counter(), collections.Counter()
  for p in products:
    kinds[p.flops.kind] += p.executions * p.flops.executed
    dtypes[p.flops.dtype] += p.executions * p.flops.executed
  return Work(
    flops=sum(kinds.values()),
    flops_at_most=sum(p.executions * p.flops.at_most for p in products),
    flops_nominal=sum(p.executions * p.flops.nominal for p in products),
    flops_by_kind={k: v for k, v in kinds.items() if k != "unknown"},
    flops_by_dtype={k: v for k, v in dtypes.items() if v},
    hbm_bytes=sum(moved.values()),
    hbm_bytes_by_opcode={k: v for k, v in moved.most_common() if v},
    products=products,
    unknown=[p for p in products if p.flops.kind == "unknown"],
  )


def _product(
  run: Run, e: Execution, flops: hlo_cost.Flops, ragged_rows: float | None
) -> Product:
  i = e.instruction
  named = e.caller if e.fused and e.caller is not None else i
  if e.fused and e.caller is not None and hlo_cost.skips_masked(e.caller):
    fused = run.module[e.caller.computation_of("calls")]
    flops = hlo_cost.masked_flops(fused, e.caller, flops, ragged_rows)
  origin = run.module.origin(i if i.op_name else named)
  return Product(
    name=named.name,
    op_name=origin.op_name,
    source=run.module.source(origin),
    shape=str(i.shape),
    executions=e.count,
    flops=flops,
  )
