"""The grouped product on a TPU: two Pallas kernels, after MegaBlocks.

Rows are cut into tiles without regard to groups (arXiv:2211.15841); a *visit*
is a pair of a tile of rows and a group that has rows in it, and a grid step is
a visit for one tile of columns. A tile in which groups meet is visited once for
each of them, and each keeps its own rows. Tiles without rows of any group are
not visited.

Columns are the outermost dimension, so that rows are read once for each tile of
columns and a matrix stays in VMEM over all tiles of its group.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.xla_metadata import set_xla_metadata

from rlm.hardware import chip_of_device_kind
from rlm.kernels.backend import chip, interpretation
from rlm.kernels.product import exact_sums

_LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
  """What a grid step holds.

  Attributes:
    rows: of x, whose groups begin and end anywhere in a tile.
    depth: of x and of w.
    columns: of w.
  """

  rows: int
  depth: int
  columns: int

  def __str__(self) -> str:
    return f"{self.rows},{self.depth},{self.columns}"


@dataclasses.dataclass(frozen=True)
class _Core:
  """What tiles are chosen by.

  Attributes:
    vmem_bytes: that a kernel may take; tiles take three quarters.
    rows: of a tile: the side of the matrix units. Fewer would leave them idle,
      and each group computes up to a tile of rows in vain.
    cores: that share the tiles of columns of one device.
  """

  vmem_bytes: int
  rows: int
  cores: int


_MIB = 2**20
# Three quarters of the VMEM that a core has; on v4 what XLA grants unasked.
_CORES = {
  "v4": _Core(12 * _MIB, 128, 2),
  "v5e": _Core(96 * _MIB, 128, 1),
  "v5p": _Core(48 * _MIB, 128, 2),
  "v6e": _Core(96 * _MIB, 256, 1),
  "tpu7x": _Core(48 * _MIB, 256, 1),
}
_UNKNOWN = _Core(12 * _MIB, 128, 1)


def _core() -> _Core:
  known = chip_of_device_kind(chip())
  return _CORES.get(known.name, _UNKNOWN) if known else _UNKNOWN


def product_tiles(rows: int, depth: int, columns: int, itemsize: int) -> Tiles:
  """Of [M, D] x [E, D, F].

  Rows are read once for each tile of columns; matrices once, unless their depth
  is cut: then once for each tile of rows. The whole depth wins where it fits.
  """
  core = _core()
  tile_rows = min(core.rows, math.ceil(rows / 16) * 16)

  def held(d, w):
    size = 2 * itemsize * (tile_rows * (d + w) + d * w) + 4 * tile_rows * w
    # An exact product of float32 is several of its operands' bfloat16 parts.
    return size + (6 * d * (tile_rows + _strip(w)) if itemsize == 4 else 0)

  def cost(tile):
    d, w = tile
    read = math.ceil(columns / w) + (columns / tile_rows if d < depth else 0)
    return _padded(columns, w, core.cores), read

  # A last tile of depth with nothing behind it would add what is not there.
  depths = [d for d in _widths(depth) if depth % d == 0]
  return Tiles(tile_rows, *_best(depths, _widths(columns), held, cost))


def gradient_tiles(rows: int, depth: int, columns: int, itemsize: int) -> Tiles:
  """Of the gradient [E, D, F], whose tiles sum over the rows of a group.

  x is read once for each tile of columns, dy for each tile of depth.
  """
  core = _core()
  tile_rows = min(core.rows, math.ceil(rows / 16) * 16)

  def held(d, w):  # of the operands' tiles there are float32 copies, masked
    return (4 + 2 * itemsize) * (d * w + tile_rows * (d + w))

  def cost(tile):
    d, w = tile
    read = depth * math.ceil(columns / w) + columns * math.ceil(depth / d)
    return _padded(columns, w, core.cores) * _padded(depth, d, 1), read

  return Tiles(tile_rows, *_best(_widths(depth), _widths(columns), held, cost))


def _widths(size: int) -> list[int]:
  """Of tiles that cut `size` into 1, 2, 3, ..., in whole lanes or whole."""
  lanes = math.ceil(size / _LANES)
  widths = {math.ceil(lanes / n) * _LANES for n in range(1, lanes + 1)}
  return [min(w, size) for w in sorted(widths, reverse=True)]


def _padded(size: int, width: int, cores: int) -> int:
  """What is computed: past the end, and by a core without a tile, included."""
  tiles = math.ceil(size / width)
  return math.ceil(tiles / cores) * cores * width


def _best(depths, columns, held, cost):
  room = _core().vmem_bytes * 3 / 4
  tiles = [(d, w) for d in depths for w in columns if held(d, w) <= room]
  if not tiles:
    raise NotImplementedError(
      f"no tile of a depth of {depths[0]}, in whole lanes of {_LANES} that"
      f" divide it, fits the {room / _MIB:.0f} MiB of VMEM. Take 'ragged'."
    )
  return min(tiles, key=cost)


@dataclasses.dataclass(frozen=True)
class _Visits:
  """Pairs of a group and a tile of rows, in order.

  Attributes:
    group: int32 [most], of each visit.
    tile: int32 [most], likewise.
    start: int32 [E], first row of each group.
    end: int32 [E], one past its last.
    count: int32 [], visits that there are; at least one.
  """

  group: jax.Array
  tile: jax.Array
  start: jax.Array
  end: jax.Array
  count: jax.Array

  @property
  def tables(self) -> tuple[jax.Array, ...]:
    return self.group, self.tile, self.start, self.end


def _visits(group_sizes, rows, tile_rows, *, empty):
  """Visits of all groups; with `empty`, of those without rows one each."""
  end = jnp.cumsum(group_sizes.astype(jnp.int32))
  start = end - group_sizes
  tiles = math.ceil(rows / tile_rows)
  first = jnp.minimum(start // tile_rows, tiles - 1)
  each = jnp.where(
    group_sizes > 0, (end + tile_rows - 1) // tile_rows - first, int(empty)
  )
  upto = jnp.cumsum(each)
  visit = jnp.arange(tiles + len(group_sizes) - 1, dtype=jnp.int32)
  group = jnp.searchsorted(upto, visit, side="right", method="compare_all")
  group = jnp.minimum(group, len(group_sizes) - 1).astype(jnp.int32)
  tile = first[group] + visit - (upto - each)[group]
  tile = jnp.clip(tile, 0, tiles - 1)
  return _Visits(group, tile, start, end, jnp.maximum(upto[-1], 1))


def _owned(group_of, tile_of, start, end, visit, shape):
  """Bool `shape`: rows of this visit's tile that are of its group."""
  group = group_of[visit]
  row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  row += tile_of[visit] * shape[0]
  return (row >= start[group]) & (row < end[group])


def _strip(columns: int) -> int:
  """Columns multiplied at once: a loop over them keeps the program short."""
  lanes = columns // _LANES
  if columns % _LANES:
    return columns
  return next(n for n in (4, 2, 1) if lanes % n == 0) * _LANES


def _product_kernel(
  group_of, tile_of, start, end,  # tables of the visits
  x_ref,  # [rows, depth]
  w_ref,  # [depth, columns], or [columns, depth] where transposed
  y_ref,  # [rows, columns]
  *sums,  # float32 [rows, columns] where the depth is cut
  transposed,
):  # fmt: skip
  visit, part, parts = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
  rows, columns = y_ref.shape
  width = _strip(columns)
  contracted = (((1,), (1 if transposed else 0,)), ((), ()))

  def store(at, total):
    own = _owned(group_of, tile_of, start, end, visit, (rows, width))
    # Rows of other groups are theirs, or unspecified.
    kept = jnp.where(own, total, y_ref[:, at].astype(total.dtype))
    y_ref[:, at] = kept.astype(y_ref.dtype)

  def multiply(strip, _):
    at = pl.ds(pl.multiple_of(strip * width, width), width)
    w = w_ref[at, :] if transposed else w_ref[:, at]
    product = jax.lax.dot_general(
      x_ref[...], w, contracted, **exact_sums(w.dtype)
    )
    if not sums:
      store(at, product)
      return
    (sum_ref,) = sums

    @pl.when(part == 0)
    def _set():
      sum_ref[:, at] = product

    @pl.when(part > 0)
    def _add():
      sum_ref[:, at] += product

    @pl.when(part == parts - 1)
    def _store():
      store(at, sum_ref[:, at])

  jax.lax.fori_loop(0, columns // width, multiply, None)


def _product(x, w, group_sizes, *, transposed):
  """[M, D] x [E, D, F], or [E, F, D] where `transposed`, -> [M, F]."""
  (rows, depth), columns = x.shape, w.shape[1 if transposed else 2]
  tiles = product_tiles(rows, depth, columns, x.dtype.itemsize)
  visits = _visits(group_sizes, rows, tiles.rows, empty=False)
  parts = depth // tiles.depth
  if transposed:
    w_spec = pl.BlockSpec(
      (None, tiles.columns, tiles.depth), lambda j, v, k, g, *_: (g[v], j, k)
    )
  else:
    w_spec = pl.BlockSpec(
      (None, tiles.depth, tiles.columns), lambda j, v, k, g, *_: (g[v], k, j)
    )
  sums = pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)
  across = math.ceil(columns / tiles.columns)
  call = pl.pallas_call(
    functools.partial(_product_kernel, transposed=transposed),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(across, visits.count, parts),
      in_specs=[
        pl.BlockSpec(
          (tiles.rows, tiles.depth), lambda j, v, k, g, t, *_: (t[v], k)
        ),
        w_spec,
      ],
      out_specs=pl.BlockSpec(
        (tiles.rows, tiles.columns), lambda j, v, k, g, t, *_: (t[v], j)
      ),
      scratch_shapes=[sums] if parts > 1 else [],
    ),
    out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=_core().vmem_bytes,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * rows * depth * columns,
      bytes_accessed=x.nbytes * across + w.nbytes + rows * columns * x.itemsize,
      transcendentals=0,
    ),
    interpret=interpretation(),
    name="grouped_product",
  )
  with set_xla_metadata(grouped_matmul_tiles=str(tiles)):
    return call(*visits.tables, x, w)


def _gradient_kernel(
  group_of, tile_of, start, end,  # tables of the visits
  x_ref,  # [rows, depth]
  dy_ref,  # [rows, columns]
  dw_ref,  # [depth, columns], of the visit's group
  sum_ref,  # float32 [depth, columns]
):  # fmt: skip
  visit, visits = pl.program_id(2), pl.num_programs(2)
  group = group_of[visit]
  first = (visit == 0) | (group_of[jnp.maximum(visit - 1, 0)] != group)
  last = visit == visits - 1
  last |= group_of[jnp.minimum(visit + 1, visits - 1)] != group
  depth = dw_ref.shape[0]
  width = _strip(depth)

  def own(ref, at):  # what is not the group's may be anything, even NaN
    block = ref[:, at].astype(jnp.float32)
    mine = _owned(group_of, tile_of, start, end, visit, block.shape)
    return jnp.where(mine, block, 0.0)

  @pl.when(end[group] > start[group])
  def _sum():
    dy = own(dy_ref, slice(None)).astype(dy_ref.dtype)

    def multiply(strip, _):
      at = pl.ds(pl.multiple_of(strip * width, width), width)
      x = own(x_ref, at).T.astype(dy.dtype)
      before = jnp.where(first, 0.0, sum_ref[at, :])
      sum_ref[at, :] = before + jax.lax.dot(x, dy, **exact_sums(dy.dtype))

    jax.lax.fori_loop(0, depth // width, multiply, None)

  @pl.when(end[group] == start[group])
  def _clear():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(last)
  def _write():
    dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)


def _gradient(x, dy, group_sizes):
  """[M, D], [M, F] -> [E, D, F]: x^T dy of each group's rows."""
  (rows, depth), columns, groups = x.shape, dy.shape[1], len(group_sizes)
  tiles = gradient_tiles(rows, depth, columns, x.dtype.itemsize)
  visits = _visits(group_sizes, rows, tiles.rows, empty=True)
  across, down = (
    math.ceil(columns / tiles.columns),
    math.ceil(depth / tiles.depth),
  )
  call = pl.pallas_call(
    _gradient_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(across, down, visits.count),
      in_specs=[
        pl.BlockSpec(
          (tiles.rows, tiles.depth), lambda j, k, v, g, t, *_: (t[v], k)
        ),
        pl.BlockSpec(
          (tiles.rows, tiles.columns), lambda j, k, v, g, t, *_: (t[v], j)
        ),
      ],
      out_specs=pl.BlockSpec(
        (None, tiles.depth, tiles.columns),
        lambda j, k, v, g, *_: (g[v], k, j),
      ),
      scratch_shapes=[pltpu.VMEM((tiles.depth, tiles.columns), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct((groups, depth, columns), x.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=_core().vmem_bytes,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * rows * depth * columns,
      bytes_accessed=x.nbytes * across
      + dy.nbytes * down
      + groups * depth * columns * x.itemsize,
      transcendentals=0,
    ),
    interpret=interpretation(),
    name="grouped_gradient",
  )
  with set_xla_metadata(grouped_matmul_tiles=str(tiles)):
    return call(*visits.tables, x, dy)


@jax.custom_vjp
def grouped_matmul_tpu(x, w, group_sizes):
  """As `grouped_matmul`: [M, D] x [E, D, F] -> [M, F], of float32 sums.

  Raises:
    NotImplementedError: no tile of this depth fits.
  """
  return _product(x, w, group_sizes, transposed=False)


def _grouped_matmul_fwd(x, w, group_sizes):
  return grouped_matmul_tpu(x, w, group_sizes), (x, w, group_sizes)


def _grouped_matmul_bwd(residuals, dy):
  x, w, group_sizes = residuals
  dy = dy.astype(x.dtype)
  dx = _product(dy, w, group_sizes, transposed=True)
  return dx, _gradient(x, dy, group_sizes), None


grouped_matmul_tpu.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)
