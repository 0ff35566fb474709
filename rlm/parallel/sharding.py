"""Where everything lies: two tables, of parameters and of activations.

A parameter's row gives the axes of its own dimensions; the stack of layers in
front of them is never divided. Optimizer moments, EMA and gradients follow
their parameter. Matrices are divided by rows, which a TPU tiles by 8: over 64
devices 7168 rows are 112 each. (Over all 512 of a slice, a TPU compiler turns
every gather and every scatter into a sum of the whole over all chips: `Shard`
gathers one axis after the other.)
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlm.parallel.config import ALL_PIECES, PIECES, ROWS, MeshConfig

# Leaf name -> axes of its dimensions, without that of the stack.
PARAMETERS = {
  # [V, D] by columns: tokens are looked up where the columns are.
  "embedding": (None, PIECES),
  "head": (PIECES, None),
  # Attention. Columns of the up-projections are heads.
  "q_proj": (ALL_PIECES, "tensor"),
  "k_proj": (ALL_PIECES, "tensor"),
  "v_proj": (ALL_PIECES, "tensor"),
  "q_bias": ("tensor",),
  "k_bias": ("tensor",),
  "v_bias": ("tensor",),
  "q_a": (ALL_PIECES, None),
  "q_b": (ALL_PIECES, "tensor"),
  "kv_a": (ALL_PIECES, None),
  "kv_b": (ALL_PIECES, "tensor"),
  "out_proj": ("tensor", ALL_PIECES),
  # Dense feed-forward and the shared experts.
  "gate_proj": (ALL_PIECES, "tensor"),
  "up_proj": (ALL_PIECES, "tensor"),
  "down_proj": ("tensor", ALL_PIECES),
  "router": (ALL_PIECES, None),
  "proj": (ALL_PIECES, None),
  "scale": (None,),
  "expert_bias": (None,),
}
# The same names with one more dimension in front: one matrix per expert.
EXPERTS = {
  "gate_proj": ("expert", PIECES, "tensor"),
  "up_proj": ("expert", PIECES, "tensor"),
  "down_proj": ("expert", "tensor", PIECES),
}
# Arrays by name, without the axis of microbatches in front of a batch's; what
# is not here leads with rows, then tokens.
_ROWS, _TOKENS = P(ROWS), P(ROWS, "context")
ACTIVATIONS = {
  "mtp_weights": P(ROWS, None, "context"),  # [B, D, T]
  "expert_ids": P(ROWS, None, "context"),  # [B, L, T, K]
}
_INT8_FIELDS = ("values", "scale")  # of an Int8Matrix, below its name
STACKS = frozenset({"dense_layers", "moe_layers", "mtp_modules"})


def parameter_axes(path: tuple, rank: int, *, dense_over_expert: bool) -> tuple:
  """The axes of each dimension of one leaf.

  Args:
    path: of jax.tree_util; ends with the parameter's name, and holds that of
      its stack if it leads with an axis of layers.
    rank: number of its dimensions.
    dense_over_expert: of the `MeshConfig`.

  Returns:
    One entry per dimension: None, an axis or a tuple of axes.

  Raises:
    ValueError: the table lacks the name.
  """
  keys = [str(entry.key) for entry in path if hasattr(entry, "key")]
  name = keys[-1] if keys else ""
  stacked = int(any(key in STACKS for key in keys))
  axes: tuple | None = PARAMETERS.get(name)
  if axes is not None and rank - stacked > len(axes):
    axes = EXPERTS.get(name)
  if axes is not None and getattr(path[-1], "name", None) == "scale":
    # Of an Int8Matrix [..., 1, out]: one row for all rows of the matrix.
    axes = (*axes[:-2], None, axes[-1])
  if axes is None or rank - stacked != len(axes):
    raise ValueError(
      f"no sharding is chosen for the parameter {jax.tree_util.keystr(path)} of"
      f" {rank} dimensions. Add {name!r} to a table in"
      " rlm/parallel/sharding.py."
    )
  if not dense_over_expert:
    axes = tuple(PIECES if names == ALL_PIECES else names for names in axes)
  return (None,) * stacked + axes


def state_specs(tree: Any, *, dense_over_expert: bool = True) -> Any:
  """PartitionSpecs of variables, gradients or a whole training state.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s; leaves that are named as a
      parameter lie as it does, steps, counts and coefficients everywhere.
    dense_over_expert: of the `MeshConfig`.
  """

  def spec(path, leaf):
    field = getattr(path[-1], "name", None)
    if not leaf.ndim or (field and field not in _INT8_FIELDS):
      return P()  # the optimizer's own numbers
    axes = parameter_axes(path, leaf.ndim, dense_over_expert=dense_over_expert)
    return P(*axes)

  return jax.tree.map_with_path(spec, tree)


def batch_specs(batch: dict[str, Any], *, leading: int) -> dict[str, P]:
  """PartitionSpecs of the arrays of a batch; scalars lie everywhere.

  Args:
    batch: arrays by name.
    leading: axes in front of the rows, such as that of the microbatches.
  """

  def spec(name, x):
    rank = np.ndim(x) - leading
    if rank < 1:
      return P()
    inner = ACTIVATIONS.get(name, _TOKENS if rank > 1 else _ROWS)
    return P(*(None,) * leading, *inner)

  return {name: spec(name, x) for name, x in batch.items()}


def shardings(mesh: Mesh, specs: Any) -> Any:
  """NamedShardings of a tree of PartitionSpecs."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs,
    is_leaf=lambda x: isinstance(x, P),
  )


def check_fits(cfg: MeshConfig, tree: Any, key: str) -> None:
  """Raises ValueError where a parameter does not divide into its pieces.

  Args:
    cfg: sizes of the mesh.
    tree: variables, or their shapes.
    key: of the mesh in the config, for the message.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    axes = parameter_axes(
      path, leaf.ndim, dense_over_expert=cfg.dense_over_expert
    )
    for size, axis in zip(leaf.shape, axes, strict=True):
      names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
      parts = 1
      for name in names:
        parts *= cfg.sizes[name]
      if size % parts:
        fitting = [n for n in range(1, 2 * parts + 1) if size % n == 0]
        raise ValueError(
          f"{key}: {' x '.join(f'{n}={cfg.sizes[n]}' for n in names)} does not"
          f" divide the {size} of {jax.tree_util.keystr(path)}"
          f" {tuple(leaf.shape)}. Make"
          f" {'the product' if len(names) > 1 else names[0]} one of"
          f" {', '.join(map(str, fitting))}."
        )
