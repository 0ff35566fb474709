"""Every form of the grouped product against a loop over groups."""

import contextlib
import functools
import importlib.util
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rlm.kernels import grouped_matmul as kernel
from rlm.kernels import grouped_matmul_tpu
from rlm.kernels.backend import compiling_for, interpreting
from rlm.models.experts import routed_experts
from tests.fast_jit import fast_jit
from tests.tools import hlo_programs
from tests.tools.hlo_programs import array, manual, tpu_mesh
from tools import hlo_work

GROUPS, ALIGNMENT, ROWS, D, F = 4, 4, 24, 5, 3
SIZES = {
  "even": (8, 4, 8, 4),
  "empty groups": (0, 12, 0, 12),
  "first and last empty": (0, 16, 8, 0),
  "one hot group": (0, 0, 24, 0),
  "rows left over": (4, 0, 8, 4),
  "no rows": (0, 0, 0, 0),
}
# tokamax has no kernel that runs here: neither compiled nor interpreted.
RUN_HERE = ("ragged", "blocks", "pallas")


def inputs(dtype=np.float32, rows=ROWS, d=D, f=F, groups=GROUPS):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((rows, d)).astype(dtype)
  w = rng.standard_normal((groups, d, f)).astype(dtype)
  dy = rng.standard_normal((rows, f)).astype(np.float32)
  return x, w, dy


def loop(x, w, dy, sizes):
  """y, dx, dw in float64; rows past the groups are zeros."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
  start = 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    y[rows], dx[rows] = x[rows] @ w[e], dy[rows] @ w[e].T
    dw[e] = x[rows].T @ dy[rows]
    start += size
  return y, dx, dw


def here(implementation, interpret=True):
  """Where a form of another platform is traced to be interpreted."""
  if implementation != "pallas":
    return contextlib.nullcontext()
  return interpreting("tpu", "TPU v5", interpret)


@functools.cache
def compiled(implementation, interpret=True):
  """(x, w, dy, sizes) -> y, dx, dw."""

  def run(x, w, dy, sizes):
    product = functools.partial(
      kernel.grouped_matmul,
      group_sizes=sizes,
      row_alignment=ALIGNMENT,
      implementation=implementation,
    )
    with here(implementation, interpret):
      y, pull = jax.vjp(product, x, w)
      return y, *pull(dy)

  return fast_jit(run)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("implementation", RUN_HERE)
def test_values_and_gradients(implementation, sizes):
  x, w, dy = inputs()
  used = np.arange(ROWS) < sum(sizes)
  dy *= used[:, None]  # what rows past the groups give is unspecified
  y, dx, dw = compiled(implementation)(x, w, dy, np.array(sizes, np.int32))
  want_y, want_dx, want_dw = loop(x, w, dy, sizes)
  assert y.dtype == jnp.float32
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(np.asarray(y)[used], want_y[used])
  close(np.asarray(dx)[used], want_dx[used])
  close(dw, want_dw)


@hypothesis.given(st.permutations(range(GROUPS)), st.data())
def test_forms_agree_on_any_sizes(order, data):
  left, sizes = ROWS // ALIGNMENT, np.zeros(GROUPS, np.int32)
  for e in order:
    blocks = data.draw(st.integers(0, left))
    sizes[e], left = blocks * ALIGNMENT, left - blocks
  sizes[order[0]] += left * ALIGNMENT
  x, w, dy = inputs()
  results = [compiled(i)(x, w, dy, sizes) for i in RUN_HERE]
  for of_all in zip(*results, strict=True):
    for other in of_all[1:]:
      np.testing.assert_allclose(of_all[0], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", RUN_HERE)
def test_bfloat16_sums_in_float32(implementation):
  x, w, dy = inputs(jnp.bfloat16)
  sizes = SIZES["empty groups"]
  dy = dy.astype(x.dtype)
  y, dx, dw = compiled(implementation)(x, w, dy, np.array(sizes, np.int32))
  assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
  want_y, want_dx, want_dw = loop(x, w, dy, sizes)
  # Rounded once, by half a unit of 8 bits; a bfloat16 sum would lose several.
  np.testing.assert_allclose(
    np.asarray(y, np.float32), want_y, rtol=2**-8, atol=1e-5
  )
  # Gradients are rounded to bfloat16, and so may dy be on the way.
  for got, want in ((dx, want_dx), (dw, want_dw)):
    error = np.abs(np.asarray(got, np.float64) - want).max()
    assert error < 2**-6 * np.abs(want).max()


@hypothesis.given(st.integers(1, 10**6), st.integers(1, 300))
def test_alignment_pads_even_groups_by_less_than_a_quarter(rows, groups):
  size = kernel.row_alignment(rows, groups, implementation="blocks")
  assert size in (8, 16, 32, 64, 128)
  if rows >= 32 * groups:
    assert size - 1 < rows / groups / 4
  for other in ("ragged", "pallas", "tokamax"):
    assert kernel.row_alignment(rows, groups, implementation=other) == 1


def test_the_cpu_never_takes_the_dense_lowering_of_ragged_dot():
  assert kernel.default_implementation() == "blocks"
  x, w, _ = inputs()
  text = jax.jit(
    lambda x, w: kernel.grouped_matmul(
      x, w, np.array(SIZES["even"], np.int32), row_alignment=ALIGNMENT
    )
  ).lower(x, w)
  assert "ragged_dot" not in text.as_text()


def test_errors():
  x, w, _ = inputs()
  sizes = np.array(SIZES["even"], np.int32)
  with pytest.raises(ValueError, match="implementation='fast' is unknown"):
    kernel.grouped_matmul(x, w, sizes, row_alignment=1, implementation="fast")
  with pytest.raises(ValueError, match="24 rows are not a multiple of row_al"):
    kernel.grouped_matmul(x, w, sizes, row_alignment=16)
  with pytest.raises(NotImplementedError, match="'pallas' runs on TPU, not on"):
    kernel.grouped_matmul(x, w, sizes, row_alignment=1, implementation="pallas")


def test_defaults():
  assert kernel.default_implementation() == "blocks"
  with compiling_for("gpu", "NVIDIA H200"):
    assert kernel.default_implementation() == "ragged"
  with compiling_for("tpu", "TPU v5"):
    assert kernel.default_implementation() == "pallas"


def test_tokamax_is_never_replaced_by_another_form(monkeypatch):
  x, w, _ = inputs()
  run = functools.partial(
    kernel.grouped_matmul,
    x,
    w,
    np.array(SIZES["even"], np.int32),
    row_alignment=1,
    implementation="tokamax",
  )
  if importlib.util.find_spec("tokamax"):
    with pytest.raises(NotImplementedError, match="on TPU and GPU, not on cpu"):
      run()
  monkeypatch.setitem(sys.modules, "tokamax", None)  # as if it were missing
  with pytest.raises(NotImplementedError, match=r"pip install 'rlm\[tokamax"):
    run()


# Three tiles of rows, of which the last is cut by the end of x: groups that
# begin and end inside of a tile, meet in one, span several or are empty.
TILED = {
  "several tiles": (130, 0, 126, 44),
  "rows left over": (1, 254, 2, 0),
  "a tile of all groups": (30, 40, 50, 8),
}
STRICT = pltpu.InterpretParams(
  out_of_bounds_reads="uninitialized", uninitialized_memory="nan"
)


@pytest.mark.parametrize("sizes", TILED.values(), ids=TILED.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_where_groups_meet(dtype, sizes):
  # 257 columns: a tile of them ends past the end, and so does one of depth of
  # the gradient. What is in no group is NaN and stays where it is.
  x, w, dy = inputs(jnp.dtype(dtype), rows=300, d=257, f=130)
  dy = dy.astype(x.dtype)
  used = np.arange(len(x)) < sum(sizes)
  x[~used], dy[~used] = np.nan, np.nan
  # The strict interpreter also looks for reads out of bounds, and is slow.
  strict = dtype == "float32" and sizes == TILED["several tiles"]
  run = compiled("pallas", STRICT if strict else True)
  y, dx, dw = run(x, w, dy, np.array(sizes, np.int32))
  want_y, want_dx, want_dw = loop(x, w, dy, sizes)
  for got, want in ((y[used], want_y[used]), (dx[used], want_dx[used])):
    error = np.abs(np.asarray(got, np.float64) - want).max()
    assert error < {"float32": 1e-4, "bfloat16": 2**-8 * 80}[dtype]
  scale = max(np.abs(want_dw).max(), 1.0)
  error = np.abs(np.asarray(dw, np.float64) - want_dw).max() / scale
  assert error < {"float32": 1e-5, "bfloat16": 2**-8}[dtype]


@pytest.mark.parametrize("depth", [384, 640])
def test_a_depth_that_is_cut(depth, monkeypatch):
  small = grouped_matmul_tpu._Core(2**20, 128, 2)
  monkeypatch.setattr(grouped_matmul_tpu, "_core", lambda: small)
  with interpreting("tpu", "TPU v5"):
    assert grouped_matmul_tpu.product_tiles(300, depth, 384, 4).depth == 128
  x, w, dy = inputs(rows=300, d=depth, f=384)
  sizes = TILED["several tiles"]
  compiled.cache_clear()
  got = compiled("pallas")(x, w, dy, np.array(sizes, np.int32))
  compiled.cache_clear()
  for a, b in zip(got, loop(x, w, dy, sizes), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_a_depth_that_no_tile_divides(monkeypatch):
  small = grouped_matmul_tpu._Core(2**19, 128, 2)
  monkeypatch.setattr(grouped_matmul_tpu, "_core", lambda: small)
  with pytest.raises(NotImplementedError, match="a depth of 7167"):
    grouped_matmul_tpu.product_tiles(300, 7167, 384, 4)


@pytest.mark.parametrize("chip", ["TPU v5 lite", "TPU v5", "TPU v6e", "TPU7x"])
def test_tiles_at_the_sizes_of_deepseek_v3(chip):
  with compiling_for("tpu", chip):
    for depth, columns in ((7168, 2048), (2048, 7168)):
      tiles = grouped_matmul_tpu.product_tiles(40960, depth, columns, 2)
      assert tiles.depth == depth  # matrices are read once
      assert tiles.columns >= columns / 4  # rows four times at most
      for cut in (
        tiles,
        grouped_matmul_tpu.gradient_tiles(40960, depth, columns, 2),
      ):
        assert columns % cut.columns == 0
        assert chip != "TPU v5" or columns // cut.columns % 2 == 0  # two cores


def test_experts_never_see_rows_of_no_group():
  rng = np.random.default_rng(0)
  n, k, experts = 24, 2, 4
  x = rng.standard_normal((n, 8)).astype(np.float32)
  gates = rng.random((n, k)).astype(np.float32)
  ids = rng.integers(0, 8, (n, k)).astype(np.int32)
  ids = jnp.where(ids < experts, ids, experts)  # half are elsewhere
  shapes = (experts, 8, 6), (experts, 8, 6), (experts, 6, 8)
  weights = tuple(rng.standard_normal(s).astype(np.float32) for s in shapes)

  @functools.partial(jax.jit, static_argnums=3)
  def run(x, gates, weights, implementation):
    def loss(x, gates, weights):
      y = routed_experts(
        x, gates, ids, weights, implementation=implementation, rows=n
      )
      return jnp.square(y).sum()

    with here(implementation):
      return jax.value_and_grad(loss, argnums=(0, 1, 2))(x, gates, weights)

  got, want = (run(x, gates, weights, i) for i in ("pallas", "dense"))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.tpu
@pytest.mark.parametrize(
  ("rows", "depth", "columns", "dtype"),
  [
    (4096, 7168, 2048, "float32"),  # cut to fit
    (300, 257, 130, "bfloat16"),
    (24, 100, 70, "float32"),
  ],
)
def test_tpu_programs_of_other_sizes(rows, depth, columns, dtype):
  mesh = tpu_mesh("v5p:2x2x1", a=4)

  def step(x, w, dy, sizes):
    with compiling_for("tpu", "TPU v5"):
      y, pull = jax.vjp(
        lambda x, w: kernel.grouped_matmul(x, w, sizes, row_alignment=1), x, w
      )
      return y, *pull(dy)

  arguments = [
    array(mesh, shape, jnp.dtype(dtype))
    for shape in ((rows, depth), (4, depth, columns), (rows, columns))
  ]
  p = jax.P()
  run = hlo_programs.follow(
    manual(step, mesh, (p,) * 4, (p,) * 3),
    *arguments,
    array(mesh, (4,), "int32"),
  )
  product = 2 * rows * depth * columns
  assert hlo_work.count_work(run).flops_by_kind == {"ragged": 3 * product}


@pytest.mark.tpu
def test_tpu_programs_and_what_they_are_counted_as():
  rows, depth, columns, groups = 4096, 1024, 512, 8
  mesh = tpu_mesh("v5p:2x2x1", a=4)

  def step(x, w, sizes):
    with compiling_for("tpu", "TPU v5"):
      y, pull = jax.vjp(
        lambda x, w: kernel.grouped_matmul(x, w, sizes, row_alignment=1), x, w
      )
      return pull(jnp.sin(y))

  arguments = (
    array(mesh, (rows, depth), jnp.bfloat16),
    array(mesh, (groups, depth, columns), jnp.bfloat16),
    array(mesh, (groups,), jnp.int32),
  )
  p = jax.P()
  run = hlo_programs.follow(manual(step, mesh, (p, p, p), (p, p)), *arguments)
  product = 2 * rows * depth * columns
  work = hlo_work.count_work(run)
  assert work.flops_by_kind == {"ragged": 3 * product}
  half = hlo_work.count_work(run, ragged_rows=rows / 2)
  assert half.flops == 1.5 * product
  # 16 tiles of 128 rows, and one more for each of 7 groups that begin in one.
  assert half.flops_at_most == 3 * product * (16 + 7) / 32
  # Rows in use are read once for each of two tiles of columns; matrices once.
  x, w, y = rows * depth, groups * depth * columns, rows * columns
  kernels = 2 * (2 * x + w + y) + 2 * (2 * y + w + x) + 2 * (2 * x + y + w)
  assert 0.8 * kernels < work.hbm_bytes < 1.3 * kernels  # y may stay in VMEM
