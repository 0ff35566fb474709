"""Both forms of the grouped product against a loop over groups."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.kernels import grouped_matmul as kernel
from tests.fast_jit import fast_jit

GROUPS, ALIGNMENT, ROWS, D, F = 4, 4, 24, 5, 3
SIZES = {
  "even": (8, 4, 8, 4),
  "empty groups": (0, 12, 0, 12),
  "first and last empty": (0, 16, 8, 0),
  "one hot group": (0, 0, 24, 0),
  "rows left over": (4, 0, 8, 4),
  "no rows": (0, 0, 0, 0),
}


def inputs(dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((ROWS, D)).astype(dtype)
  w = rng.standard_normal((GROUPS, D, F)).astype(dtype)
  dy = rng.standard_normal((ROWS, F)).astype(np.float32)
  return x, w, dy


def loop(x, w, dy, sizes):
  """y, dx, dw in float64; rows past the groups are zeros."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  y, dx, dw = np.zeros((ROWS, F)), np.zeros_like(x), np.zeros_like(w)
  start = 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    y[rows], dx[rows] = x[rows] @ w[e], dy[rows] @ w[e].T
    dw[e] = x[rows].T @ dy[rows]
    start += size
  return y, dx, dw


@functools.cache
def compiled(implementation):
  """(x, w, dy, sizes) -> y, dx, dw."""

  def run(x, w, dy, sizes):
    product = functools.partial(
      kernel.grouped_matmul,
      group_sizes=sizes,
      row_alignment=ALIGNMENT,
      implementation=implementation,
    )
    y, pull = jax.vjp(product, x, w)
    return y, *pull(dy)

  return fast_jit(run)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("implementation", kernel.IMPLEMENTATIONS)
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
  results = [compiled(i)(x, w, dy, sizes) for i in kernel.IMPLEMENTATIONS]
  for a, b in zip(*results, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", kernel.IMPLEMENTATIONS)
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
  assert kernel.row_alignment(rows, groups, implementation="ragged") == 1


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
