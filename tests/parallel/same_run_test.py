"""A run on any mesh is the run on one device.

Losses of three steps agree within 1e-5 relative, and gradients (of the first
step: the momentum after it) within 1e-4 of the largest of their array: float32
sums in another order. So do the parameters after the last step.
"""

import dataclasses
import functools
import runpy
from typing import Any

import jax
import numpy as np
import optax
import pytest

from experiments import pretrain
from rlm import losses, train
from rlm.checkpoint import initial
from rlm.config import build
from rlm.eval.heldout import worked_problems
from rlm.models.transformer import Transformer
from rlm.optim.optimizer import make_optimizer
from rlm.parallel import expert
from tests.fast_jit import fast_jit
from tests.parallel import ragged
from tests.parallel.mesh_models import mesh_model, mesh_variables, packed_batch
from tests.tiny_model import lay

full = pytest.mark.full
ROWS, LENGTH, STEPS = 8, 8, 3
TX = optax.sgd(1.0, momentum=0.9)
KEY = jax.random.key(0)


@functools.cache
def step_of(model, layout, microbatches):
  return fast_jit(
    train.make_train_step(
      losses.make_pretrain_loss(
        model,
        train_mtp=model.cfg.num_nextn_predict_layers > 0,
        balance_weight=0.1,
      ),
      TX,
      num_microbatches=microbatches,
      ema_decay=0.9,
      skip_nonfinite=True,
      layout=layout,
    )
  )


def batches(cfg, rows, microbatches, row_counts):
  depth = cfg.num_nextn_predict_layers
  for count in row_counts:
    batch = {k: x[:count] for k, x in rows.items()}
    batch = losses.global_weights(batch, mtp_depth=depth)
    yield train.split_microbatches(
      batch,
      microbatch_rows=len(rows["tokens"]) // microbatches,
      num_microbatches=microbatches,
    ) | {
      "learning_rate": np.float32(0.1),
      "bias_update_rate": np.float32(0.001),
      "mtp_weight": np.float32(0.3),
    }


def run(
  name,
  mesh=None,
  *,
  microbatches=1,
  batch_rows=ROWS,
  length=LENGTH,
  row_counts=(ROWS,) * STEPS,
  **model,
):
  """(state, metrics) of each step; mesh=None is the model without one."""
  model = mesh_model(name, **model)
  state = train.init_state(mesh_variables(name), TX, ema_decay=0.9)
  layout = None
  if mesh is not None:
    layout = lay(model, **mesh)
    model, state = layout.model, jax.device_put(state, layout.shardings(state))
  step = step_of(model, layout, microbatches)
  rows = packed_batch(batch_rows, length)
  found = []
  for batch in batches(model.cfg, rows, microbatches, row_counts):
    state, metrics = step(state, batch, KEY)
    found.append(jax.device_get((state, metrics)))
  if layout is not None:  # as it came, so that every step is one program
    places = zip(
      jax.tree.leaves(state),
      jax.tree.leaves(layout.shardings(state)),
      strict=True,
    )
    for leaf, place in places:
      assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
  return found


@functools.cache
def alone(name):
  return run(name)


def assert_close(got, expected, tolerance, what):
  """To within `tolerance` of the largest of each array."""
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(expected),
    jax.tree_util.tree_leaves_with_path(got),
    strict=True,
  )
  for (path, a), (_, b) in pairs:
    if np.size(a):
      np.testing.assert_allclose(
        b,
        a,
        rtol=0,
        atol=tolerance * max(np.abs(a).max(), 1e-6),
        err_msg=f"{what}{jax.tree_util.keystr(path)}",
      )


def assert_same_run(got, expected, *, loss=1e-5, gradient=1e-4):
  for (_, metrics), (_, wanted) in zip(got, expected, strict=True):
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=loss)
    assert metrics["nonfinite"] == metrics["dropped"] == 0
    assert metrics["tokens"] == wanted["tokens"]
    assert_close(metrics, wanted, gradient, "metrics")
  first, wanted = got[0][0], expected[0][0]
  assert_close(first.opt_state, wanted.opt_state, gradient, "gradient")
  last = got[-1][0]
  assert_close(last, expected[-1][0], gradient, "state")
  trained = last.variables["params"]["embed"]["embedding"]
  assert np.abs(trained - last.ema["embed"]["embedding"]).max() > 1e-3


@pytest.mark.parametrize(
  "mesh",
  [
    pytest.param(dict(fsdp=8), marks=full),
    pytest.param(dict(data=2, expert=4), marks=full),
    dict(data=2, expert=4, dense_over_expert=False),
    dict(fsdp=2, expert=2, tensor=2),
    dict(context=4),
  ],
  ids=str,
)
def test_experts_on_a_mesh_are_those_on_one_device(mesh):
  assert_same_run(run("v3_moe", mesh), alone("v3_moe"))


LONG = (
  {},
  dict(data=8),
  dict(fsdp=8),
  dict(data=2, expert=4),
  dict(expert=8),  # two levels
  dict(expert=8, transport="gather"),
  dict(expert=8, node_limited=False),
  dict(fsdp=2, expert=4, expert_chunk=4),
  dict(fsdp=2, expert=2, tensor=2),
  dict(tensor=4),
  dict(context=4),
  dict(context=2, expert=2, tensor=2),
  dict(context=2, fsdp=2, remat="dots"),
  dict(context=2, fsdp=2, remat="attention"),
)


@pytest.mark.parametrize(
  "mesh",
  [
    dict(context=2, fsdp=2, expert=2, remat="block"),
    *(pytest.param(mesh, marks=full) for mesh in LONG),
  ],
  ids=str,
)
def test_v3_on_a_mesh_is_v3_on_one_device(mesh):
  """Dense layers and MTP too; recomputing changes nothing but memory."""
  mesh = dict(mesh)
  remat = mesh.pop("remat", "none")
  assert_same_run(run("v3", mesh, remat=remat), alone("v3"))


@full
@pytest.mark.parametrize("transport", ["padded", "ragged", "gather"])
@pytest.mark.parametrize("expert_chunk", [0, 16])
def test_many_tokens_travel(monkeypatch, transport, expert_chunk):
  """So many that experts sort them, and skip the slots that stay empty."""
  monkeypatch.setattr(expert, "exchange_rows", ragged.exchange_rows)
  settings = dict(transport=transport, expert_chunk=expert_chunk)
  sizes = dict(batch_rows=16, length=64, row_counts=(16, 16))
  got = run("v3_moe", dict(fsdp=2, expert=4, **settings), **sizes)
  assert_same_run(got, run("v3_moe", **sizes))


@full
@pytest.mark.parametrize(
  "mesh", [dict(expert=8), dict(data=2, expert=4, expert_chunk=2)], ids=str
)
def test_the_ragged_transport_too(monkeypatch, mesh):
  monkeypatch.setattr(expert, "exchange_rows", ragged.exchange_rows)
  got = run("v3_moe", mesh | dict(transport="ragged"))
  assert_same_run(got, alone("v3_moe"))


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    pytest.param("v2", dict(fsdp=2, expert=2, context=2), marks=full),
    pytest.param("qwen2", dict(context=2, tensor=2, data=2), marks=full),
    pytest.param("qwen3", dict(context=2, tensor=2, fsdp=2), marks=full),
  ],
)
def test_other_families_on_a_mesh(name, mesh):
  assert_same_run(run(name, mesh), alone(name))


@full
def test_microbatches_add_up_on_a_mesh():
  mesh = dict(fsdp=2)
  assert_same_run(run("v2", mesh, microbatches=4), alone("v2"))
  # A growing batch: 1, 3 and 4 of its 4 microbatches are live.
  counts = (2, 6, 8)
  grown = run("v2", mesh, microbatches=4, row_counts=counts)
  assert_same_run(grown, run("v2", microbatches=4, row_counts=counts))


def test_a_capacity_drops_what_finds_no_room_and_says_how_much():
  """Counted from the routes; devices of a tensor group repeat each other."""
  mesh = dict(expert=2, tensor=2, expert_capacity=0.25)
  [(_, metrics)] = run("v2", mesh, row_counts=(ROWS,))
  model, batch = mesh_model("v2"), packed_batch(ROWS, LENGTH)
  rows = (batch[k] for k in ("tokens", "positions", "segment_ids"))
  _, routing = fast_jit(model.apply)(mesh_variables("v2"), *rows)
  (ids,) = np.asarray(routing.expert_ids)  # of one layer, [B, T, K]
  dropped = 0
  for own in ids.reshape(2, -1, 3):  # tokens of a device, padding too
    room = 0.25 * len(own) * 2 / 2
    for peer in range(2):
      choices = (own // 4 == peer).sum(axis=1)
      dropped += choices[choices > 0][int(room) :].sum()
  assert dropped > 40
  np.testing.assert_allclose(metrics["dropped"], dropped / ids.size, rtol=1e-6)
  assert metrics["nonfinite"] == 0


@full
@pytest.mark.parametrize(
  ("gradient_dtype", "tolerance"), [("float32", 8e-3), ("bfloat16", 1.6e-2)]
)
def test_bfloat16_differs_by_its_rounding(gradient_dtype, tolerance):
  """A device's gradients have 8 bits; with "bfloat16" so have their sums.

  Rows alone are divided, so that the forward pass is the same.
  """
  mesh = dict(fsdp=4, gradient_dtype=gradient_dtype)
  sizes = dict(dtype="bfloat16", row_counts=(ROWS,))
  assert_same_run(
    run("qwen3", mesh, **sizes),
    run("qwen3", **sizes),
    loss=1e-3,
    gradient=tolerance,
  )


@dataclasses.dataclass(frozen=True)
class Replaying:
  """A model along given routes, for a loss that lets it choose."""

  model: Transformer
  expert_ids: Any  # int32 [B, L, T, K]

  @property
  def cfg(self):
    return self.model.cfg

  @property
  def shard(self):
    return self.model.shard

  def apply(self, variables, *rows):
    ids = self.expert_ids.swapaxes(0, 1)
    return self.model.apply(variables, *rows, ids)


def laptop_step(model, tx, layout=None):
  def loss_fn(variables, batch, key):
    replaying = Replaying(model, batch["expert_ids"])
    settings = dict(train_mtp=False, balance_weight=1e-4)
    return losses.make_pretrain_loss(replaying, **settings)(
      variables, batch, key
    )

  return fast_jit(
    train.make_train_step(
      loss_fn,
      tx,
      num_microbatches=2,
      ema_decay=None,
      skip_nonfinite=False,
      layout=layout,
    ),
    donate_argnums=0,
  )


@full
@pytest.mark.parametrize(
  "mesh", [dict(fsdp=2, expert=2, tensor=2), dict(context=2, expert=4)], ids=str
)
def test_fifty_steps_of_the_laptop_model(mesh):
  """AdamW at 1e-3, along the routes of one device: losses within 1e-4.

  Free routes would flip where two experts are nearly tied; MTP's modules,
  whose routes no one replays, are left out.
  """
  config = runpy.run_path("configs/pretrain/laptop.py")["get_config"]()
  config.optimizer.muon = None
  cfg = build(pretrain.Config, config)
  chat, tasks = pretrain.prepare(cfg)
  problems = worked_problems(
    tasks["sums"],
    chat,
    levels=(2, 3, 4, 5),
    problems_per_level=100,
    seed=0,
    batch_size=8,
    row_length=128,
  )
  assert len(problems.batches) == 50
  model, tx = Transformer(cfg.model), make_optimizer(cfg.optimizer)
  layout = lay(model, **mesh)
  variables = initial.random_variables(model, jax.random.key(0))
  alone = train.init_state(variables, tx, ema_decay=None)
  divided = jax.device_put(jax.device_get(alone), layout.shardings(alone))
  step, divided_step = (
    laptop_step(model, tx),
    laptop_step(layout.model, tx, layout),
  )

  @fast_jit
  def routes(variables, *rows):
    return model.apply(variables, *rows)[1].expert_ids.swapaxes(0, 1)

  found = []
  for batch in problems.batches:
    rows = (batch[k] for k in ("tokens", "positions", "segment_ids"))
    ids = np.asarray(routes(alone.variables, *rows))
    batch = losses.global_weights(batch, mtp_depth=1) | {"expert_ids": ids}
    batch = train.split_microbatches(
      batch, microbatch_rows=4, num_microbatches=2
    )
    batch["learning_rate"] = np.float32(1e-3)
    batch["bias_update_rate"] = np.float32(0.01)
    alone, wanted = step(alone, batch, KEY)
    divided, metrics = divided_step(divided, batch, KEY)
    found.append((float(wanted["loss"]), float(metrics["loss"])))
  wanted, got = np.transpose(found)
  assert wanted[-5:].mean() < 0.6 * wanted[0]
  np.testing.assert_allclose(got, wanted, rtol=1e-4)
