"""The routed experts: V3 eq. 12, without dropped tokens.

Every choice of an expert by a token is a row. Rows are sorted by expert and
multiplied group by group; for the few tokens of a decode step every expert
multiplies them all.
"""

import functools

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from rlm.kernels.grouped_matmul import (
  default_implementation,
  grouped_matmul,
  row_alignment,
)
from rlm.kernels.product import einsum
from rlm.kernels.recomputed import zeros_within
from rlm.models.layers import dot
from rlm.models.quantized import operand
from rlm.parallel.expert import sum_rows, take_rows


@flax.struct.dataclass
class _Slots:
  """Rows of tokens laid out by expert, each group whole blocks long.

  Attributes:
    token: int32 [M], the token in each slot; N (one past) where it is empty.
    choice: int32 [N, K], the slot of each token's k-th choice; M or more where
      it has none here.
    gate_of: int32 [M], index into the flat [N * K] choices; N * K where empty.
    group_sizes: int32 [E], slots of each expert, empty ones included.
  """

  token: jax.Array
  choice: jax.Array
  gate_of: jax.Array
  group_sizes: jax.Array

  def part(self, start: jax.Array, size: int) -> "_Slots":
    """The slots from `start` to `start + size`, counted from 0."""
    ends = jnp.clip(jnp.cumsum(self.group_sizes) - start, 0, size)
    inside = (self.choice >= start) & (self.choice < start + size)
    return _Slots(
      token=jax.lax.dynamic_slice_in_dim(self.token, start, size),
      choice=jnp.where(inside, self.choice - start, size),
      gate_of=jax.lax.dynamic_slice_in_dim(self.gate_of, start, size),
      group_sizes=jnp.diff(ends, prepend=0),
    )


def _assign_slots(
  expert_ids: jax.Array, n_experts: int, size: int, multiple: int
) -> _Slots:
  """Sorts the [N, K] choices by expert, stably, into groups of whole blocks.

  Args:
    expert_ids: int32 [N, K]; n_experts for a choice that is not here.
    n_experts: E.
    size: rows of a block.
    multiple: of which M is one, itself a multiple of `size`.
  """
  n, k = expert_ids.shape
  flat = expert_ids.reshape(-1)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  load = jnp.bincount(flat, length=n_experts + 1).astype(jnp.int32)[:-1]
  group_sizes = (load + size - 1) // size * size
  # Worst case of the padding, so that the shape is static and none is dropped.
  slots = n * min(k, n_experts) + n_experts * (size - 1)
  slots = slots // size * size
  slots = -(-slots // multiple) * multiple
  first = jnp.cumsum(load) - load
  first_slot = jnp.cumsum(group_sizes) - group_sizes
  expert = flat[order]
  here = jnp.minimum(expert, n_experts - 1)
  slot = first_slot[here] + jnp.arange(n * k, dtype=jnp.int32) - first[here]
  slot = jnp.where(expert < n_experts, slot, slots)
  choice = jnp.zeros((n * k,), jnp.int32).at[order].set(slot)
  gate_of = jnp.full((slots,), n * k, jnp.int32)
  gate_of = gate_of.at[slot].set(order, mode="drop")
  return _Slots(gate_of // k, choice.reshape(n, k), gate_of, group_sizes)


@jax.custom_vjp
def _dispatch(x, slots):
  """[N, D] -> [M, D]. Its transpose is a sum over K of gathers, no scatter."""
  return take_rows(x, slots.token)


_dispatch.defvjp(
  lambda x, slots: (_dispatch(x, slots), slots),
  lambda slots, dy: (sum_rows(dy, slots.choice).astype(dy.dtype), None),
)


@jax.custom_vjp
def _combine(y, gates, slots):
  """[M, D], gates [N, K] -> sum over K of gate * row, float32 [N, D]."""
  return sum_rows(y, slots.choice, gates)


def _combine_bwd(residuals, dout):
  y, gates, slots = residuals
  gate = take_rows(gates.reshape(-1, 1), slots.gate_of)
  dout_rows = take_rows(dout, slots.token)
  dgate = (dout_rows * y.astype(jnp.float32)).sum(axis=1, keepdims=True)
  dgates = take_rows(dgate, slots.choice.reshape(-1)).reshape(gates.shape)
  return (gate * dout_rows).astype(y.dtype), dgates, None


_combine.defvjp(
  lambda y, gates, slots: (_combine(y, gates, slots), (y, gates, slots)),
  _combine_bwd,
)


def _run_experts(size, implementation, x, gates, weights, slots):
  """float32 [N, D] of the choices in these slots, in blocks of `size`."""
  gate_proj, up_proj, down_proj = weights

  def matmul(rows, w):
    return grouped_matmul(
      rows,
      w,
      slots.group_sizes,
      row_alignment=size,
      implementation=implementation,
    )

  rows = _dispatch(x, slots)
  gate, up = matmul(rows, gate_proj), matmul(rows, up_proj)
  y = matmul(nn.silu(gate) * up, down_proj)
  return _combine(y, gates, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_in_passes(run, bound, x, gates, weights, slots):
  """`run` over `bound` slots after the other, as long as any is used.

  Written with its derivative because a loop whose length depends on the data
  has none, and one of the worst length would keep every pass's operands.
  """

  def one(i, total):
    return total + run(x, gates, weights, slots.part(i * bound, bound))

  zeros = zeros_within(x, jax.ShapeDtypeStruct(x.shape, jnp.float32))
  return jax.lax.fori_loop(0, _passes(bound, slots), one, zeros)


def _run_in_passes_bwd(run, bound, residuals, dout):
  x, gates, weights, slots = residuals

  def one(i, totals):
    part = slots.part(i * bound, bound)
    _, vjp = jax.vjp(lambda *args: run(*args, part), x, gates, weights)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), totals, vjp(dout))

  zeros = zeros_within(dout, (x.astype(jnp.float32), gates, weights))
  dx, dgates, dweights = jax.lax.fori_loop(0, _passes(bound, slots), one, zeros)
  return dx.astype(x.dtype), dgates, dweights, None


def _passes(bound, slots):
  """int32 []: passes until no slot is left that is used."""
  return (slots.group_sizes.sum() + bound - 1) // bound


_run_in_passes.defvjp(
  lambda run, bound, *args: (_run_in_passes(run, bound, *args), args),
  _run_in_passes_bwd,
)


def routed_experts_grouped(
  x, gates, expert_ids, weights, implementation, rows=None
):
  """The experts by grouped matmul: work in proportion to the routes.

  Args:
    x: [N, D].
    gates: float32 [N, K].
    expert_ids: int32 [N, K]; E for a choice of an expert that is not here.
    weights: as of `routed_experts`.
    implementation: a form of `grouped_matmul`, or None.
    rows: choices expected to be here; None expects all of them. Buffers hold a
      quarter more, and what is beyond takes another pass.

  Returns:
    [N, D] in the dtype of `x`.
  """
  weights = tuple(operand(w, x) for w in weights)
  n_experts = weights[0].shape[0]
  expected = expert_ids.size if rows is None else min(rows, expert_ids.size)
  size = row_alignment(expected, n_experts, implementation=implementation)
  run = functools.partial(_run_experts, size, implementation)
  if rows is None:
    slots = _assign_slots(expert_ids, n_experts, size, size)
    return run(x, gates, weights, slots).astype(x.dtype)
  room = expected + expected // 4 + n_experts * (size - 1)
  bound = -(-room // size) * size
  slots = _assign_slots(expert_ids, n_experts, size, bound)
  total = _run_in_passes(run, bound, x, gates, weights, slots)
  return total.astype(x.dtype)


def routed_experts_dense(x, gates, expert_ids, weights):
  """Every expert on every token, weighed by a gate that is mostly zero.

  The cheapest form for the few tokens of a decode step, and one in which a
  row's bits do not depend on its neighbours.
  """
  gate_proj, up_proj, down_proj = (operand(w, x) for w in weights)
  n_experts = gate_proj.shape[0]
  one_hot = jax.nn.one_hot(expert_ids, n_experts, dtype=jnp.float32)
  gate_NE = einsum("NK,NKE->NE", gates, one_hot)
  # A copy of the rows for each expert: joined over the experts, the product
  # would want the matrices transposed, which are larger.
  rows = jnp.broadcast_to(x, (n_experts, *x.shape))
  gate = dot("END,EDF->ENF", rows, gate_proj)
  up = dot("END,EDF->ENF", rows, up_proj)
  h = (nn.silu(gate) * up).astype(jnp.float32) * gate_NE.T[:, :, None]
  return dot("ENF,EFD->ND", h.astype(x.dtype), down_proj)


def routed_experts(
  x: jax.Array,
  gates: jax.Array,
  expert_ids: jax.Array,
  weights: tuple[jax.Array, jax.Array, jax.Array],
  *,
  implementation: str | None = None,
  rows: int | None = None,
) -> jax.Array:
  """sum_i g_i E_i(x) over the chosen experts; V3 eq. 12. None is dropped.

  Args:
    x: [N, D].
    gates: float32 [N, K].
    expert_ids: int32 [N, K]; E for a choice of an expert that is elsewhere.
    weights: gate_proj [E, D, F], up_proj [E, D, F], down_proj [E, F, D].
    implementation: "dense", a form of `grouped_matmul`, or None: dense on the
      CPU where there are so few tokens that sorting and padding would cost as
      much, else grouped.
    rows: choices expected to be here, where many are elsewhere; see
      `routed_experts_grouped`.

  Returns:
    [N, D] in the dtype of `x`.
  """
  if implementation is None:
    few = x.shape[0] <= DENSE_TOKENS
    if default_implementation() == "blocks" and few:
      implementation = "dense"
  if implementation == "dense":
    return routed_experts_dense(x, gates, expert_ids, weights)
  return routed_experts_grouped(
    x, gates, expert_ids, weights, implementation, rows
  )


# Where the two forms cost the same forward on 2 CPU cores, at 8 to 64 experts
# of widths 16 to 128 alike: dense wastes, and blocks pad, in proportion to the
# experts.
DENSE_TOKENS = 64
