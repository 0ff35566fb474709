"""One matrix product per expert over rows grouped by expert.

`grouped_matmul` is the front door; the forms are equal in value and gradient:

| form | where | how |
|---|---|---|
| `ragged` | TPU, GPU | `jax.lax.ragged_dot`, rows of a group adjacent |
| `blocks` | CPU | rows of a group padded to whole blocks, one batched product |

`jax.lax.ragged_dot` lowers on the CPU to a dense masked product over all the
experts, whose cost grows with their number, so the CPU gets its own form. Its
price is padding: at most `row_alignment - 1` rows of zeros per expert. No row
is ever dropped.
"""

import functools

import jax
import jax.numpy as jnp

from rlm.kernels.backend import backend
from rlm.kernels.product import einsum, exact_rounded

IMPLEMENTATIONS = ("ragged", "blocks")


def default_implementation() -> str:
  """The form that the default backend runs fastest."""
  return "blocks" if backend() == "cpu" else "ragged"


def row_alignment(
  rows: int, groups: int, *, implementation: str | None = None
) -> int:
  """Rows to which the caller pads each group before `grouped_matmul`.

  Args:
    rows: rows over all groups, without padding.
    groups: E, number of groups.
    implementation: one of `IMPLEMENTATIONS`, or None for the backend's own.

  Returns:
    1 where groups need no padding; otherwise a power of two near a quarter of
    the mean group, between 8 and 128: even groups of 32 rows or more grow by
    less than a quarter, by an eighth on average.
  """
  if (implementation or default_implementation()) == "ragged":
    return 1
  quarter = max(rows // max(groups, 1) // 4, 1)
  return min(max(1 << (quarter.bit_length() - 1), 8), 128)


def grouped_matmul(
  x: jax.Array,
  w: jax.Array,
  group_sizes: jax.Array,
  *,
  row_alignment: int,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies the rows of group e by the matrix of group e.

  Args:
    x: [M, D]; the rows of group 0 first, then those of group 1, and so on.
      Rows past `sum(group_sizes)` give unspecified rows.
    w: [E, D, F], one matrix per group, in the dtype of `x`.
    group_sizes: int32 [E], multiples of `row_alignment`.
    row_alignment: what `row_alignment()` gave for this implementation; M is a
      multiple of it.
    implementation: one of `IMPLEMENTATIONS`, or None for the backend's own.

  Returns:
    [M, F] in the dtype of `x`, summed in float32.

  Raises:
    ValueError: an unknown implementation, or rows that are not aligned.
  """
  name = implementation or default_implementation()
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"{implementation=} is unknown; grouped_matmul has {IMPLEMENTATIONS}."
    )
  if x.shape[0] % row_alignment:
    raise ValueError(
      f"{x.shape[0]} rows are not a multiple of {row_alignment=}. Pad x."
    )
  if name == "ragged":
    return jax.lax.ragged_dot(x, w, group_sizes, **exact_rounded(x.dtype))
  return _block_matmul(x, w, group_sizes, row_alignment)


def _block_groups(group_sizes: jax.Array, blocks: int, size: int) -> jax.Array:
  """int32 [blocks]: the group that owns each block of `size` rows."""
  ends = jnp.cumsum(group_sizes)
  starts = jnp.arange(blocks, dtype=jnp.int32) * size
  owner = jnp.searchsorted(ends, starts, side="right", method="compare_all")
  return jnp.minimum(owner, group_sizes.shape[0] - 1).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _block_matmul(x, w, group_sizes, size):
  return _block_matmul_fwd(x, w, group_sizes, size)[0]


def _block_matmul_fwd(x, w, group_sizes, size):
  blocks = x.shape[0] // size
  owner = _block_groups(group_sizes, blocks, size)
  x_blocks = x.reshape(blocks, size, -1)
  y = einsum("nrd,ndf->nrf", x_blocks, w[owner])
  return y.reshape(x.shape[0], -1).astype(x.dtype), (x, w, owner)


def _block_matmul_bwd(size, residuals, dy):
  # Written out because the transpose of the gather `w[owner]` is a scatter of
  # whole matrices, which the CPU runs serially; a one-hot product is not.
  x, w, owner = residuals
  blocks = x.shape[0] // size
  dy_blocks = dy.astype(x.dtype).reshape(blocks, size, -1)
  dx = einsum("nrf,ndf->nrd", dy_blocks, w[owner])
  dw_blocks = einsum("nrd,nrf->ndf", x.reshape(blocks, size, -1), dy_blocks)
  one_hot = jax.nn.one_hot(owner, w.shape[0], dtype=jnp.float32)
  dw = einsum("ne,ndf->edf", one_hot, dw_blocks)
  return dx.reshape(x.shape).astype(x.dtype), dw.astype(w.dtype), None


_block_matmul.defvjp(_block_matmul_fwd, _block_matmul_bwd)
