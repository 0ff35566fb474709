"""AdamW, or Muon for the matrices and AdamW for the rest, at unit rate.

The learning rate is not in here: the training step multiplies the updates by
the rate that its batch brings (`rlm.train`).  Which optimizer a parameter gets,
and whether its weights decay, follows from its name by the table below; a name
that the table lacks is an error, so that no new parameter is optimised by
accident.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from rlm.optim.config import OptimizerConfig

# Matrices are stored [..., in, out]: leading axes stack layers and experts.
MATRICES = frozenset(
  {
    "q_proj",
    "k_proj",
    "v_proj",
    "q_a",
    "q_b",
    "kv_a",
    "kv_b",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "proj",
  }
)
# Not hidden-to-hidden maps: their rows or columns are ids and experts, which
# orthogonalisation would make equally strong.
ID_MATRICES = frozenset({"head", "router"})
EMBEDDINGS = frozenset({"embedding"})
VECTORS = frozenset({"scale", "q_bias", "k_bias", "v_bias"})

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic


def _leaf_name(path: tuple) -> str:
  return str(path[-1].key)


def _checked_name(path: tuple) -> str:
  name = _leaf_name(path)
  if name not in MATRICES | ID_MATRICES | EMBEDDINGS | VECTORS:
    raise ValueError(
      f"no optimizer is chosen for the parameter {jax.tree_util.keystr(path)}."
      f" Add {name!r} to a set in rlm/optim/optimizer.py."
    )
  return name


def optimizer_labels(params: Any) -> Any:
  """The label of every parameter where Muon is on: "muon" or "adam".

  Args:
    params: nested dicts of arrays, named as in rlm.models.

  Returns:
    The same tree of labels.

  Raises:
    ValueError: a parameter has a name that the table lacks.
  """
  return jax.tree.map_with_path(
    lambda path, _: "muon" if _checked_name(path) in MATRICES else "adam",
    params,
  )


def decay_mask(params: Any) -> Any:
  """True for every parameter whose weights decay; a tree like `params`."""
  return jax.tree.map_with_path(
    lambda path, _: _checked_name(path) in MATRICES | ID_MATRICES, params
  )


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
  """Clipping, then AdamW or Muon with AdamW, at unit learning rate.

  Args:
    cfg: all its numbers.

  Returns:
    A transformation whose updates are to be multiplied by the learning rate
    and added to the parameters.
  """
  adam_factor = 1.0 if cfg.muon is None else cfg.muon.adam_factor
  adam = optax.chain(
    optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
    optax.add_decayed_weights(cfg.weight_decay, decay_mask),
    optax.scale(-adam_factor),
  )
  if cfg.muon is None:
    update = adam
  else:
    by_name = {
      "muon": muon(
        1.0,
        # One row of coefficients per step makes optax loop: less to compile.
        ns_coeffs=(_NEWTON_SCHULZ,) * cfg.muon.ns_steps,
        ns_steps=cfg.muon.ns_steps,
        beta=cfg.muon.momentum,
        weight_decay=cfg.weight_decay,
        consistent_rms=cfg.muon.update_rms,
        # Unless told, optax sends matrices stacked over layers to Adam.
        muon_weight_dimension_numbers=_last_two_axes,
      ),
      "adam": adam,
    }
    update = optax.partition(by_name, optimizer_labels)
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip_norm),
    _stored_moments(update, jnp.dtype(cfg.moment_dtype)),
  )


def _last_two_axes(params: Any) -> Any:
  """Every parameter a stack of [in, out] matrices, each on its own."""
  return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), params)


def _stored_moments(
  tx: optax.GradientTransformation, dtype: jnp.dtype
) -> optax.GradientTransformation:
  """`tx` computed in float32 with its moments kept in `dtype`."""

  def cast(state, to):
    def cast_leaf(path, x):
      names = {getattr(entry, "name", None) for entry in path}
      return x.astype(to) if names & {"mu", "nu"} else x

    return jax.tree.map_with_path(cast_leaf, state)

  def init(params):
    return cast(tx.init(params), dtype)

  def update(updates, state, params=None):
    updates, state = tx.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(init, update)
