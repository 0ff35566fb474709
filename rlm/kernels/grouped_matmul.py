"""One matrix product per expert over rows grouped by expert.

`grouped_matmul` is the front door; the forms are equal in value and gradient:

| form | default on | how |
|---|---|---|
| `pallas` | TPU | `grouped_matmul_tpu`: visits of a group to a tile of rows |
| `ragged` | GPU | `jax.lax.ragged_dot`, rows of a group adjacent |
| `blocks` | CPU | groups padded to whole blocks, one batched product |
| `tokamax` | none | its kernels for TPU and GPU, where it is installed |

No name is ever replaced by another: a form that is named runs or raises.

**TPU.** Nobody here has one. Compiled ahead of time by libtpu 0.0.42.1 at a
chip's share of DeepSeek-V3 (32768 rows in a buffer of 40960, 32 experts, 7168 x
2048, bfloat16, as it stands in `shard_map`), each grid step costs the larger of
its bundles in the compiler's schedule, its operations at the chip's peak, and
the bytes that the next step waits for. In milliseconds, for the product, its
gradient by rows and its gradient by matrices:

| form | v5p | v5e | v6e | GB on v5p |
|---|---|---|---|---|
| bound: peak, bytes once | 2.1 each | 4.9 each | 1.0 each | 1.5 each |
| `pallas` | 2.5 2.5 2.7 | 6.0 6.0 6.2 | 1.8 1.9 2.1 | 2.0 1.7 2.2 |
| `ragged` | 3.1 3.3 3.9 | 10.5 8.7 8.9 | 1.8 2.9 2.2 | 8.6 4.9 3.0 |
| jax's megablox, tiles chosen | 2.4 2.4 2.6 | | | 4.8 2.5 2.8 |
| tokamax 0.0.12, tiles chosen | 4.7 4.7 5.1 | | | 4.8 2.5 2.8 |

- `ragged` reads the rows 16 times on v5p and v5e, in tiles of 128 columns. For
  the gradient by rows it first writes the matrices transposed (1.9 GB; above
  at HBM's speed, and four times slower by the compiler's own estimate). The one
  by matrices is a masked convolution in float32.
- megablox is as fast, but each call makes its tables by 120 small programs, 13
  here, and would leave exactness in float32 to the context.
- tokamax runs on one of the two cores of a v4 or v5p; with one core it is
  megablox. The tiles that it chooses by itself are of 128 x 128 x 128 for sizes
  outside of its list, in which these are not: 16 GB in place of 4.8. It looks
  for a TPU in this machine, so that it cannot be compiled ahead of time: its
  milliseconds were taken with that check patched out.

**GPU.** Unmeasured. `tokamax` chooses among its Mosaic and Triton kernels.

**CPU.** `jax.lax.ragged_dot` lowers to a dense masked product over all the
experts, whose cost grows with their number. Best of 15 on 2 shared cores in
float32, forward and both gradients, in milliseconds:

| rows, experts, widths | `ragged` | `blocks` |
|---|---|---|
| 512, 8, 64 x 128 | 1.2, 2.6 | 0.4, 0.9 |
| 2048, 16, 128 x 256 | 38, 241 | 3.5, 13 |
| 2048, 64, 128 x 64 | 92, 243 | 1.9, 18 |
| 4096, 8, 256 x 512 | 141, 466 | 33, 106 |

The price of `blocks` is padding: at most `row_alignment - 1` rows of zeros per
expert. No row is ever dropped.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from rlm.kernels.backend import backend
from rlm.kernels.grouped_matmul_tpu import grouped_matmul_tpu
from rlm.kernels.product import einsum, exact_rounded

IMPLEMENTATIONS = ("ragged", "blocks", "pallas", "tokamax")
_DEFAULTS = {"cpu": "blocks", "tpu": "pallas"}


def default_implementation() -> str:
  """The form that the backend runs fastest; see the table above."""
  return _DEFAULTS.get(backend(), "ragged")


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
  if (implementation or default_implementation()) != "blocks":
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
    NotImplementedError: a named implementation that does not run here.
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
  if name == "blocks":
    return _block_matmul(x, w, group_sizes, row_alignment)
  if name == "tokamax":
    return _tokamax(x, w, group_sizes)
  if backend() != "tpu":
    raise NotImplementedError(
      f"{implementation=} runs on TPU, not on {backend()}. Give None."
    )
  return grouped_matmul_tpu(x, w, group_sizes)


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


def _tokamax(x, w, group_sizes):
  """What tokamax chooses among its own kernels; XLA's is not one of them."""
  try:
    tokamax = importlib.import_module("tokamax")
  except ModuleNotFoundError as error:
    raise NotImplementedError(
      "implementation='tokamax' needs the package tokamax: pip install"
      " 'rlm[tokamax]'."
    ) from error
  kernels = {"tpu": ("mosaic",), "gpu": ("mosaic", "triton")}
  if backend() not in kernels:
    raise NotImplementedError(
      f"implementation='tokamax' runs on TPU and GPU, not on {backend()}."
    )
  return tokamax.ragged_dot(
    x,
    w,
    group_sizes,
    **exact_rounded(x.dtype),
    implementation=kernels[backend()],
  )
