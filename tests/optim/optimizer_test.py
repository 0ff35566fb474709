import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlm.config import build
from rlm.optim.config import MuonConfig, OptimizerConfig
from rlm.optim.optimizer import (
  decay_mask,
  make_optimizer,
  optimizer_labels,
)
from tests.tiny_model import tiny_model

NEVER = 1e9  # a clip norm that never clips


def config(muon=None, **changes):
  fields = dict(
    clip_norm=NEVER,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    moment_dtype="float32",
    muon=muon,
  )
  return OptimizerConfig(**{**fields, **changes})


MUON = MuonConfig(momentum=0.95, ns_steps=5, update_rms=None, adam_factor=0.3)


def by_name(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def test_every_parameter_has_the_optimizer_that_its_name_says():
  _, variables = tiny_model()
  labels = by_name(optimizer_labels(variables["params"]))
  attention = ["kv_a", "kv_b", "out_proj", "q_a", "q_b"]
  swiglu = ["down_proj", "gate_proj", "up_proj"]
  dense = [f"attn/{w}" for w in attention] + [f"ffn/{w}" for w in swiglu]
  routed = dense + [f"ffn/shared/{w}" for w in swiglu]
  norms = [
    "attn/kv_norm/scale",
    "attn/q_norm/scale",
    "attn_norm/scale",
    "ffn_norm/scale",
  ]
  muon = {f"dense_layers/{w}" for w in dense}
  muon |= {f"moe_layers/{w}" for w in routed}
  muon |= {f"mtp_modules/block/{w}" for w in routed}
  muon |= {"mtp_modules/proj"}
  adam = {
    f"{block}/{w}"
    for block in ("dense_layers", "moe_layers", "mtp_modules/block")
    for w in norms
  }
  adam |= {"moe_layers/ffn/router", "mtp_modules/block/ffn/router"}
  adam |= {"embed/embedding", "head", "final_norm/scale"}
  adam |= {
    f"mtp_modules/{norm}/scale"
    for norm in ("embedding_norm", "hidden_norm", "norm")
  }
  assert {n for n, label in labels.items() if label == "muon"} == muon
  assert {n for n, label in labels.items() if label == "adam"} == adam

  decays = by_name(decay_mask(variables["params"]))
  routers = {"moe_layers/ffn/router", "mtp_modules/block/ffn/router", "head"}
  assert {n for n, decay in decays.items() if decay} == muon | routers


def test_a_query_without_low_rank_is_a_matrix_too():
  labels = optimizer_labels({"attn": {"q_proj": jnp.zeros((2, 4, 4))}})
  assert labels == {"attn": {"q_proj": "muon"}}


def test_a_parameter_of_unknown_name_is_refused():
  with pytest.raises(ValueError, match=r"\['moe'\]\['novel'\].*Add 'novel'"):
    optimizer_labels({"moe": {"novel": jnp.zeros((2, 2))}})
  with pytest.raises(ValueError, match="Add 'novel'"):
    make_optimizer(config(weight_decay=0.1)).init({"novel": jnp.zeros(2)})


def numpy_newton_schulz(matrix, steps=5):
  """Jordan's quintic on one matrix, in float64."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = np.asarray(matrix, np.float64)
  wide = x.shape[0] <= x.shape[1]
  x = x if wide else x.T
  x = x / np.linalg.norm(x)
  for _ in range(steps):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x if wide else x.T


@pytest.mark.parametrize("update_rms", [None, 0.2])
def test_stacked_weights_are_orthogonalised_one_matrix_at_a_time(update_rms):
  key = jax.random.key(0)
  shapes = {"q_b": (3, 6, 10), "down_proj": (2, 4, 9, 5), "proj": (1, 8, 8)}
  params = {
    name: jax.random.normal(jax.random.fold_in(key, i), shape)
    for i, (name, shape) in enumerate(shapes.items())
  }
  # Layers of very different scale: together, the small ones would vanish.
  grads = {
    name: p * (10.0 ** jnp.arange(p.shape[0])).reshape(-1, *[1] * (p.ndim - 1))
    for name, p in params.items()
  }
  tx = make_optimizer(config(MuonConfig(0.95, 5, update_rms, 0.3)))
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  for name, grad in grads.items():
    n_in, n_out = grad.shape[-2:]
    if update_rms is None:
      scale = np.sqrt(max(1, n_out / n_in))
    else:
      scale = update_rms * np.sqrt(max(n_in, n_out))
    for index in np.ndindex(*grad.shape[:-2]):
      expected = -scale * numpy_newton_schulz(grad[index])
      np.testing.assert_allclose(updates[name][index], expected, atol=2e-4)
      singular = np.linalg.svd(expected / scale, compute_uv=False)
      assert singular.min() > 0.3, "the reference is near orthogonal"


def test_other_parameters_move_as_adamw_does():
  params = {
    "embedding": jnp.ones((3, 2)),
    "router": jnp.full((2, 4), 2.0),
    "scale": jnp.ones(2),
    "q_b": jnp.ones((1, 2, 2)),
  }
  grads = jax.tree.map(lambda p: 0.1 * p, params)
  tx = make_optimizer(config(MUON, weight_decay=0.5))
  updates, _ = tx.update(grads, tx.init(params), params)
  # Adam's first step is the sign of the gradient; 0.3 of Muon's rate.
  np.testing.assert_allclose(updates["embedding"], -0.3, rtol=1e-5)
  np.testing.assert_allclose(updates["scale"], -0.3, rtol=1e-5)
  np.testing.assert_allclose(updates["router"], -0.3 * (1 + 0.5 * 2), 1e-5)
  # A rank-1 gradient stays rank 1; the decay of Muon's weights joins.
  expected = -numpy_newton_schulz(np.ones((2, 2))) - 0.5
  np.testing.assert_allclose(updates["q_b"][0], expected, atol=1e-4)


def test_without_muon_all_is_adamw():
  params = {"q_b": jnp.ones((2, 3, 3)), "scale": jnp.full(2, 3.0)}
  grads = {"q_b": jnp.full((2, 3, 3), -0.2), "scale": jnp.full(2, 0.4)}
  tx = make_optimizer(config(weight_decay=0.1))
  optax_tx = optax.adamw(
    1.0, 0.9, 0.95, weight_decay=0.1, mask={"q_b": True, "scale": False}
  )
  state, optax_state = tx.init(params), optax_tx.init(params)
  for _ in range(3):
    updates, state = tx.update(grads, state, params)
    expected, optax_state = optax_tx.update(grads, optax_state, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_the_gradient_is_clipped_by_its_global_norm():
  params = {"scale": jnp.zeros(2), "head": jnp.zeros((1, 2))}
  grads = {"scale": jnp.array([3.0, 0.0]), "head": jnp.array([[0.0, 4.0]])}
  # eps far above the gradient makes Adam linear in it.
  tx = make_optimizer(config(clip_norm=1.0, eps=1e6))
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates["scale"], [-0.6e-6, 0.0], rtol=1e-4)
  np.testing.assert_allclose(updates["head"], [[0.0, -0.8e-6]], rtol=1e-4)


@pytest.mark.parametrize("muon", [None, MUON])
def test_moments_are_stored_as_the_config_says(muon):
  params = {"q_b": jnp.ones((2, 3, 3)), "scale": jnp.ones(2)}
  grads = jax.tree.map(lambda p: 0.3 * p, params)
  updates = {}
  for dtype in ("float32", "bfloat16"):
    tx = make_optimizer(config(muon, moment_dtype=dtype))
    state = tx.init(params)
    for _ in range(2):
      updates[dtype], state = jax.jit(tx.update)(grads, state, params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    moments = [
      leaf.dtype
      for path, leaf in leaves
      if {getattr(entry, "name", "") for entry in path} & {"mu", "nu"}
    ]
    assert len(moments) == (4 if muon is None else 3)
    assert set(moments) == {jnp.dtype(dtype)}
  chex.assert_trees_all_close(
    updates["float32"], updates["bfloat16"], rtol=0.02
  )
  assert jax.tree.leaves(updates["bfloat16"])[0].dtype == jnp.float32


def test_sections_are_built_and_checked():
  section = dict(
    clip_norm=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    moment_dtype="bfloat16",
    muon=dict(momentum=0.95, ns_steps=5, update_rms=None, adam_factor=1.0),
  )
  assert build(OptimizerConfig, section).muon.ns_steps == 5
  for changes, message in [
    (dict(clip_norm=0.0), "must be above 0"),
    (dict(b2=1.0), "must be in"),
    (dict(moment_dtype="float16"), "expected one of"),
    (dict(muon=dict(section["muon"], ns_steps=0)), "at least 1"),
  ]:
    with pytest.raises(ValueError, match=message):
      build(OptimizerConfig, {**section, **changes})
