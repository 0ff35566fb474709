import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.models.transformer import head_kernel
from rlm.optim.config import MuonConfig, OptimizerConfig
from rlm.optim.optimizer import make_optimizer
from rlm.rl.loss import (
  completion_logprobs,
  flip_share,
  freeze,
  make_logprobs,
  make_rl_loss,
)
from rlm.rl.objectives import OBJECTIVES, token_weights
from rlm.train import init_state, make_train_step, split_microbatches
from tests.fast_jit import fast_jit
from tests.tiny_model import tiny_model

LENGTH = 12
# (prompt, completion) lengths of the rows; the last row is padding.
ROWS = ((3, 5), (2, 9), (4, 1), (5, 6), (3, 3), (0, 0))


def make_batch(objective, length=LENGTH, extra_rows=0, seed=0):
  """Random tokens and routes, in the layout of make_minibatch."""
  cfg = tiny_model()[0].cfg
  rng = np.random.default_rng(seed)
  rows = (*ROWS, *[(0, 0)] * extra_rows)
  place = np.arange(length)[None]
  starts, sizes = (np.array(x)[:, None] for x in zip(*rows, strict=True))
  ends = starts + sizes
  mask = (place >= starts) & (place < ends)
  shape = (len(ROWS), LENGTH)

  def widen(x):
    pad = [(0, extra_rows), (0, length - LENGTH)] + [(0, 0)] * (x.ndim - 2)
    return np.pad(x, pad)

  # Two different experts of the four, for each layer and token.
  experts = np.argsort(rng.random((*shape, cfg.num_moe_layers, 4)), axis=-1)
  experts = widen(experts[..., :2].astype(np.int32)).swapaxes(1, 2)
  logprobs = -rng.exponential(2.0, shape)
  old = (logprobs + 0.3 * rng.normal(size=shape)).astype(np.float32)
  return {
    "tokens": widen(rng.integers(0, 21, shape)).astype(np.int32),
    "positions": np.broadcast_to(place, mask.shape).astype(np.int32),
    "segment_ids": (place < ends).astype(np.int32),
    "loss_mask": mask,
    "advantages": np.pad(rng.normal(size=len(ROWS)), (0, extra_rows)).astype(
      np.float32
    ),
    "sampler_logprobs": np.where(mask, widen(logprobs), 0).astype(np.float32),
    "old_logprobs": widen(old),
    "old_flips": widen(rng.integers(0, 2, shape)).astype(np.float32),
    "ref_logprobs": widen(old[::-1]),
    "weights": np.asarray(
      token_weights(objective.aggregation, mask, constant_length=9)
    ),
    "metric_weights": np.asarray(
      token_weights("token_mean", mask, constant_length=9)
    ),
    "expert_ids": experts,
  }


def loss_of(name, replay_routes=True):
  """(variables, batch) -> loss, Aux."""
  model, _ = tiny_model()
  loss = make_rl_loss(
    model, OBJECTIVES[name], temperature=1.0, replay_routes=replay_routes
  )
  return lambda v, b: loss(v, b, jax.random.key(0))


@functools.cache
def jitted_loss(name, replay_routes=True):
  """`loss_of`, without its gradient, quick to compile."""
  return fast_jit(loss_of(name, replay_routes))


def test_logprobs_belong_to_the_token_they_stand_at():
  model, variables = tiny_model()
  batch = make_batch(OBJECTIVES["dapo"])
  logprobs, entropy, _ = fast_jit(
    functools.partial(
      completion_logprobs, model, temperature=0.7, replay_routes=True
    )
  )(variables, batch)
  hidden, _ = fast_jit(model.apply)(
    variables,
    *(batch[k] for k in ("tokens", "positions", "segment_ids")),
    batch["expert_ids"].swapaxes(0, 1),
  )
  logits = hidden @ head_kernel(variables, model.cfg)[:, :21]
  logits = np.asarray(logits, np.float64) / 0.7
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  for b, t in zip(*np.nonzero(batch["loss_mask"]), strict=True):
    before = p[b, t - 1]  # the state that had seen the tokens before t
    np.testing.assert_allclose(
      logprobs[b, t], np.log(before[batch["tokens"][b, t]]), atol=2e-5
    )
    np.testing.assert_allclose(
      entropy[b, t], -(before * np.log(before)).sum(), atol=2e-5
    )


def test_microbatches_add_up_and_padding_counts_nowhere():
  # Through the model; every objective, without it, in objectives_test.
  _, variables = tiny_model()
  objective = OBJECTIVES["grpo_r1"]
  grad_fn = fast_jit(jax.value_and_grad(loss_of("grpo_r1"), has_aux=True))
  (loss, aux), grads = grad_fn(variables, make_batch(objective))
  # Microbatches of wider rows, and two more rows that are padding alone.
  wide = make_batch(objective, length=LENGTH + 4, extra_rows=2)
  split = split_microbatches(wide, microbatch_rows=2, num_microbatches=4)
  split.pop("num_live")
  parts = [
    grad_fn(variables, jax.tree.map(lambda x, i=i: x[i], split))
    for i in range(4)
  ]
  np.testing.assert_allclose(
    sum(part[0][0] for part in parts), loss, rtol=2e-5, atol=1e-7
  )
  total = jax.tree.map(lambda *g: sum(g), *(part[1] for part in parts))
  largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest),
    total,
    grads,
  )
  assert largest > 0 and np.isfinite(largest)
  load = sum(np.asarray(part[0][1].expert_load) for part in parts)
  np.testing.assert_allclose(load, aux.expert_load)


def test_without_old_logprobs_the_ratio_is_one():
  model, variables = tiny_model()
  batch = make_batch(OBJECTIVES["dapo"])
  split = split_microbatches(batch, microbatch_rows=3, num_microbatches=2)
  old, flips = (
    x.reshape(batch["tokens"].shape)
    for x in fast_jit(
      make_logprobs(model, temperature=1.0, replay_routes=True)
    )(variables, split)
  )
  assert not np.asarray(old)[~batch["loss_mask"]].any()
  given = batch | {"old_logprobs": old, "old_flips": flips}
  left_out = {k: v for k, v in batch.items() if not k.startswith("old_")}
  loss, aux = jitted_loss("dapo")(variables, given)
  same_loss, same_aux = jitted_loss("dapo")(variables, left_out)
  assert float(same_aux.metrics["ratio/max"]) == 1.0
  assert float(same_aux.metrics["ratio/min"]) == 1.0
  np.testing.assert_allclose(loss, same_loss, atol=1e-6)
  assert aux.metrics["route_flip_rate"] > 0.1  # the routes are random
  for name in (
    *("sampler_diff/mean", "sampler_diff/max", "route_flip_rate", "entropy"),
  ):
    np.testing.assert_allclose(
      aux.metrics[name], same_aux.metrics[name], rtol=1e-5
    )


@pytest.mark.parametrize("replay_routes", [True, False])
def test_flips_are_against_the_sampler(replay_routes):
  model, variables = tiny_model()
  batch = make_batch(OBJECTIVES["dapo"])
  rows = [batch[k] for k in ("tokens", "positions", "segment_ids")]
  _, free = fast_jit(model.apply)(variables, *rows)
  # The routes that the model chooses itself, but for one token.
  batch["expert_ids"] = np.array(free.expert_ids.swapaxes(0, 1))
  b, t = np.argwhere(batch["loss_mask"])[0]
  chosen = batch["expert_ids"][b, 0, t]
  unused = sorted(set(range(4)) - set(chosen.tolist()))
  batch["expert_ids"][b, 0, t] = unused

  @fast_jit
  def share(batch):
    _, _, routing = completion_logprobs(
      model, variables, batch, temperature=1.0, replay_routes=replay_routes
    )
    return flip_share(routing, batch, replay_routes=replay_routes)

  flips = np.where(batch["segment_ids"] > 0, share(batch), 0.0)
  assert np.argwhere(flips).tolist() == [[b, t]]
  assert flips[b, t] == 1 / model.cfg.num_moe_layers
  left_out = {k: v for k, v in batch.items() if not k.startswith("old_")}
  _, aux = jitted_loss("dapo", replay_routes)(variables, left_out)
  np.testing.assert_allclose(
    aux.metrics["route_flip_rate"],
    1 / (model.cfg.num_moe_layers * batch["loss_mask"].sum()),
    rtol=1e-6,
  )


def test_sampler_metrics_by_hand():
  _, variables = tiny_model()
  batch = make_batch(OBJECTIVES["dapo"])
  _, aux = jitted_loss("dapo")(variables, batch)
  diff = np.abs(batch["old_logprobs"] - batch["sampler_logprobs"])
  diff = diff[batch["loss_mask"]]
  np.testing.assert_allclose(
    aux.metrics["sampler_diff/mean"], diff.mean(), rtol=1e-5
  )
  np.testing.assert_allclose(
    aux.metrics["sampler_diff/max"], diff.max(), rtol=1e-6
  )
  np.testing.assert_allclose(
    aux.metrics["route_flip_rate"],
    batch["old_flips"][batch["loss_mask"]].mean(),
    rtol=1e-5,
  )


def test_routes_are_replayed_only_if_asked():
  _, variables = tiny_model()
  batch = make_batch(OBJECTIVES["dapo"])
  other = batch | {"expert_ids": (batch["expert_ids"] + 1) % 4}
  loss = lambda replay, b: float(  # noqa: E731
    jitted_loss("dapo", replay)(variables, b)[0]
  )
  assert loss(True, batch) != loss(True, other)
  assert loss(False, batch) == loss(False, other)


def test_an_update_leaves_the_mtp_modules_alone():
  model, variables = tiny_model()
  objective = dataclasses.replace(OBJECTIVES["grpo_r1"], kl_weight=0.1)
  tx = freeze(
    make_optimizer(
      OptimizerConfig(
        clip_norm=1.0,
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        weight_decay=0.5,
        moment_dtype="float32",
        muon=MuonConfig(0.9, 2, None, 0.3),
      )
    )
  )
  step = make_train_step(
    make_rl_loss(model, objective, temperature=1.0, replay_routes=True),
    tx,
    num_microbatches=1,
    ema_decay=None,
    skip_nonfinite=False,
  )
  state = init_state(variables, tx, ema_decay=None)
  batch = split_microbatches(
    make_batch(objective), microbatch_rows=6, num_microbatches=1
  )
  batch["learning_rate"] = np.float32(1e-2)
  batch["bias_update_rate"] = np.float32(0)
  after, metrics = fast_jit(step)(state, batch, jax.random.key(0))
  assert float(metrics["nonfinite"]) == 0
  assert float(metrics["ratio/max"]) >= float(metrics["ratio/min"]) > 0
  for name, subtree in after.variables["params"].items():
    same = jax.tree.map(
      lambda a, b: bool((a == b).all()), subtree, variables["params"][name]
    )
    if name == "mtp_modules":
      assert all(jax.tree.leaves(same))
    else:
      assert not any(jax.tree.leaves(same)), (name, same)
  # The expert bias is frozen too, and no moments were made for the frozen.
  jax.tree.map(
    np.testing.assert_array_equal,
    after.variables["router"],
    variables["router"],
  )
  moments = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(after.opt_state)
  ]
  assert moments and not any("mtp_modules" in path for path in moments)
