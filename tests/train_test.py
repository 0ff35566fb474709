import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlm import losses, train
from tests.fast_jit import fast_jit
from tests.losses_test import packed_batch
from tests.tiny_model import lay, tiny_model

SGD = optax.sgd(1.0)  # the update is minus the gradient
SCALE = np.array([1.0, -2.0, 0.5], np.float32)


def linear_loss(variables, batch, key):
  """Weighted mean of (x scale)^2; loads from x.

  The parameter has a name of the sharding table, so that it runs on a mesh.
  """
  y = batch["x"] @ variables["params"]["scale"]
  loss = (batch["weights"] * jnp.square(y)).sum()
  metrics = {
    "sum": batch["weights"].sum(),
    "y/max": y.max(),
    "y/min": y.min(),
    "count": jnp.int32(y.size),
  }
  load = jnp.abs(batch["x"]).sum(axis=0)[None]
  return loss, losses.Aux(metrics, load, None, jnp.zeros(2))


def linear_batch(rows, seed=0):
  rng = np.random.default_rng(seed)
  weights = rng.uniform(0.1, 1.0, rows).astype(np.float32)
  return {
    "tokens": np.zeros((rows, 1), np.int32),
    "x": rng.standard_normal((rows, 3)).astype(np.float32),
    "weights": weights / weights.sum(),
  }


def linear_state(ema_decay=None, tx=SGD):
  variables = {
    "params": {"scale": jnp.array(SCALE)},
    "router": {"moe_layers": {"ffn": {"expert_bias": jnp.zeros((1, 3))}}},
  }
  return train.init_state(variables, tx, ema_decay=ema_decay)


def linear_step(num_microbatches, *, loss_fn=linear_loss, tx=SGD, **changes):
  settings = dict(
    num_microbatches=num_microbatches,
    ema_decay=None,
    skip_nonfinite=True,
  )
  return train.make_train_step(loss_fn, tx, **{**settings, **changes})


def split(batch, rows, num_microbatches, *, rate=0.1, bias_rate=0.0):
  microbatches = train.split_microbatches(
    batch, microbatch_rows=rows, num_microbatches=num_microbatches
  )
  return microbatches | {
    "learning_rate": np.float32(rate),
    "bias_update_rate": np.float32(bias_rate),
  }


KEY = jax.random.key(0)


def test_one_step_by_hand():
  batch = linear_batch(4)
  state, metrics = fast_jit(linear_step(1))(
    linear_state(), split(batch, 4, 1), KEY
  )
  y = batch["x"] @ SCALE
  grad = (2 * batch["weights"] * y) @ batch["x"]
  np.testing.assert_allclose(
    state.variables["params"]["scale"], SCALE - 0.1 * grad, rtol=1e-5
  )
  np.testing.assert_allclose(metrics["loss"], batch["weights"] @ y**2, 1e-5)
  np.testing.assert_allclose(
    metrics["grad_norm"], np.linalg.norm(grad), rtol=1e-5
  )
  np.testing.assert_allclose(metrics["learning_rate"], 0.1)
  assert metrics["nonfinite"] == 0
  assert state.step == 1


@pytest.mark.parametrize(
  ("rows", "num_microbatches"), [(1, 12), (3, 4), (6, 3)]
)
def test_microbatches_add_up(rows, num_microbatches):
  batch = linear_batch(12)
  whole = fast_jit(linear_step(1))(linear_state(), split(batch, 12, 1), KEY)
  pieces = fast_jit(linear_step(num_microbatches))(
    linear_state(), split(batch, rows, num_microbatches), KEY
  )
  chex.assert_trees_all_close(whole, pieces, rtol=1e-5, atol=1e-6)
  y = batch["x"] @ SCALE
  np.testing.assert_allclose(pieces[1]["y/max"], y.max(), rtol=1e-5)
  np.testing.assert_allclose(pieces[1]["y/min"], y.min(), rtol=1e-5)
  assert pieces[1]["count"] == 12


@pytest.mark.parametrize("devices", [1, 3])
def test_devices_add_up(devices):
  batch = linear_batch(12)
  whole = fast_jit(linear_step(1))(linear_state(), split(batch, 12, 1), KEY)
  layout = lay(tiny_model()[0], data=devices)
  divided = fast_jit(linear_step(2, layout=layout))(
    linear_state(), split(batch, 6, 2), KEY
  )
  chex.assert_trees_all_close(whole, divided, rtol=1e-5, atol=1e-6)
  for leaf in jax.tree.leaves(divided):
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.sharding.device_set) == devices


def test_a_growing_batch_is_one_program():
  step = fast_jit(linear_step(4), donate_argnums=0)
  state = linear_state()
  for rows in (2, 4, 6, 8, 8):
    state, metrics = step(state, split(linear_batch(rows), 2, 4), KEY)
    assert metrics["count"] == rows
    np.testing.assert_allclose(metrics["sum"], 1.0, rtol=1e-6)
  assert step._cache_size() == 1


@pytest.mark.parametrize("rows", [3, 10, 0])
def test_rows_that_do_not_split_are_refused(rows):
  with pytest.raises(
    ValueError, match=f"a batch of {rows} rows does not split"
  ):
    split(linear_batch(rows), 2, 4)


def packed_rows():
  """Four rows whose numbers of targets differ widely; one holds none."""
  batch = {k: np.concatenate([v, v[::-1]]) for k, v in packed_batch().items()}
  batch["tokens"] = np.random.default_rng(0).integers(0, 21, (4, 8), np.int32)
  batch["loss_mask"][2] = False
  return batch


# Momentum from the start: the state after one step holds the gradient.
MOMENTUM = optax.sgd(1.0, momentum=0.9)


@functools.cache  # one compilation for all tests that train the tiny model
def pretrain_step(num_microbatches):
  model, _ = tiny_model()
  return fast_jit(
    linear_step(
      num_microbatches,
      loss_fn=losses.make_pretrain_loss(
        model, train_mtp=True, balance_weight=0.1
      ),
      tx=MOMENTUM,
    )
  )


def pretrain_batch(batch, rows, microbatches):
  batch = split(batch, rows, microbatches, bias_rate=0.01)
  return batch | {"mtp_weight": np.float32(0.3)}


def pretrain_state():
  return train.init_state(tiny_model()[1], MOMENTUM, ema_decay=None)


def test_the_pretraining_loss_splits_over_unequal_rows():
  """Value, gradient and loads, whatever the split of the rows."""
  batch = losses.global_weights(packed_rows(), mtp_depth=1)
  whole = pretrain_step(1)(pretrain_state(), pretrain_batch(batch, 4, 1), KEY)
  pieces = pretrain_step(4)(pretrain_state(), pretrain_batch(batch, 1, 4), KEY)
  chex.assert_trees_all_close(whole, pieces, rtol=2e-4, atol=2e-6)

  # The comparison can fail: a mean in each microbatch is another loss.
  rows = pretrain_batch(packed_rows(), 1, 4)
  scalars = {k: rows.pop(k) for k, x in list(rows.items()) if not np.ndim(x)}
  means = jax.vmap(lambda row: losses.global_weights(row, mtp_depth=1))(rows)
  _, metrics = pretrain_step(4)(pretrain_state(), {**means, **scalars}, KEY)
  assert abs(metrics["loss"] / 4 - whole[1]["loss"]) > 1e-3


def test_expert_bias_follows_the_global_load():
  """V3 2.1.2, from loads summed over microbatches, padding left out."""
  batch = losses.global_weights(packed_rows(), mtp_depth=1)
  batch = pretrain_batch(batch, 1, 4)
  before = pretrain_state()
  state, metrics = pretrain_step(4)(before, batch, KEY)

  def biases(state):
    router = state.variables["router"]
    yield "", router["moe_layers"]["ffn"]["expert_bias"]
    yield "mtp_", router["mtp_modules"]["block"]["ffn"]["expert_bias"]

  for (part, old), (_, new) in zip(biases(before), biases(state), strict=True):
    share = np.asarray(metrics[f"{part}expert_load"])
    assert share.shape == (1, 4)
    np.testing.assert_allclose(share.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(
      metrics[f"{part}expert_load/max_over_mean"], share.max(axis=1) * 4, 1e-6
    )
    moved = np.asarray(new - old)
    np.testing.assert_allclose(moved, 0.01 * np.sign(0.25 - share), atol=1e-7)
    assert (moved != 0).any()

  # At a rate of 0 it stays, in the same program.
  batch["bias_update_rate"] = np.float32(0)
  later, _ = pretrain_step(4)(state, batch, KEY)
  chex.assert_trees_all_equal(
    later.variables["router"], state.variables["router"]
  )


@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_a_nonfinite_update_changes_nothing(skip_nonfinite):
  tx = optax.adam(1.0)
  step = fast_jit(
    linear_step(
      2,
      tx=tx,
      ema_decay=0.5,
      skip_nonfinite=skip_nonfinite,
    )
  )
  good = split(linear_batch(4), 2, 2, bias_rate=0.1)
  state, _ = step(linear_state(0.5, tx), good, KEY)
  bad = linear_batch(4)
  bad["x"][3, 1] = np.inf
  after, metrics = step(state, split(bad, 2, 2, bias_rate=0.1), KEY)
  assert metrics["nonfinite"] == 1
  assert after.step == state.step + skip_nonfinite
  chex.assert_trees_all_equal(after.replace(step=state.step), state)
  later, metrics = step(after, good, KEY)
  assert metrics["nonfinite"] == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(later))
  before, now = (s.variables["params"]["scale"] for s in (state, later))
  assert (now != before).any()


def test_a_finite_loss_with_a_nonfinite_gradient_is_skipped():
  def loss_fn(variables, batch, key):
    loss, aux = linear_loss(variables, batch, key)
    # sqrt is finite at 0, its gradient is not.
    return loss + jnp.sqrt(variables["params"]["scale"][0] - 1.0), aux

  state = linear_state()
  after, metrics = fast_jit(linear_step(1, loss_fn=loss_fn))(
    state, split(linear_batch(2), 2, 1), KEY
  )
  assert np.isfinite(metrics["loss"])
  assert metrics["nonfinite"] == 1
  chex.assert_trees_all_equal(after.variables, state.variables)


def test_other_rates_are_the_same_program():
  step = fast_jit(linear_step(1))
  moved = []
  for rate in (0.0, 0.1, 0.2):
    batch = split(linear_batch(2), 2, 1, rate=rate)
    state, metrics = step(linear_state(), batch, KEY)
    assert metrics["learning_rate"] == np.float32(rate)
    moved.append(state.variables["params"]["scale"] - SCALE)
  assert step._cache_size() == 1
  assert (moved[0] == 0).all()
  np.testing.assert_allclose(moved[2], 2 * moved[1], rtol=1e-5, atol=1e-6)


def test_ema_averages_the_parameters_in_float32():
  variables = {"params": {"scale": jnp.ones(3, jnp.bfloat16)}}
  state = train.init_state(variables, SGD, ema_decay=0.75)
  assert state.ema["scale"].dtype == jnp.float32
  step = fast_jit(linear_step(1, ema_decay=0.75), donate_argnums=0)
  first = np.asarray(state.ema["scale"])
  state, _ = step(state, split(linear_batch(2), 2, 1), KEY)
  now = np.asarray(state.variables["params"]["scale"], np.float32)
  assert state.variables["params"]["scale"].dtype == jnp.bfloat16
  np.testing.assert_allclose(
    state.ema["scale"], 0.75 * first + 0.25 * now, rtol=1e-6
  )


def test_microbatches_draw_their_own_noise():
  def loss_fn(variables, batch, key):
    loss, aux = linear_loss(variables, batch, key)
    noise = jax.random.normal(key)
    aux.metrics.update({"noise/min": noise, "noise/max": noise})
    return loss, aux

  step = fast_jit(linear_step(3, loss_fn=loss_fn))
  batch = split(linear_batch(6), 2, 3)
  _, metrics = step(linear_state(), batch, KEY)
  assert metrics["noise/min"] < metrics["noise/max"]
  _, again = step(linear_state(), batch, KEY)
  chex.assert_trees_all_equal(metrics, again)


def test_the_state_is_donated():
  state = linear_state(0.5)
  step = fast_jit(linear_step(1, ema_decay=0.5), donate_argnums=0)
  step(state, split(linear_batch(2), 2, 1), KEY)
  assert state.variables["params"]["scale"].is_deleted()
  assert state.ema["scale"].is_deleted()
