import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.models.transformer import head_kernel
from rlm.rl.diagnostics import make_diagnostics, route_flips
from rlm.rl.objectives import OBJECTIVES
from rlm.train import split_microbatches
from tests.rl.loss_test import make_batch
from tests.tiny_model import tiny_model


def test_flips_by_hand():
  # One layer, one row, four tokens: equal, same set in another order, one
  # expert differs, differs in padding.
  free = jnp.array([[[[0, 1], [2, 3], [0, 2], [0, 3]]]])
  replayed = jnp.array([[[[0, 1], [3, 2], [0, 1], [1, 2]]]])
  mask = jnp.array([[True, True, True, False]])
  assert float(route_flips(free, replayed, mask)) == 1.0


def rows_of(batch):
  return [batch[k] for k in ("tokens", "positions", "segment_ids")]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_against_a_whole_forward_pass(temperature):
  model, variables = tiny_model()
  batch = make_batch(OBJECTIVES["dapo"])
  rows = rows_of(batch)
  hidden, routing = jax.jit(model.apply)(variables, *rows)
  seen = batch["segment_ids"] > 0
  # The model's own routes, but for one layer of one token.
  expert_ids = np.array(routing.expert_ids.swapaxes(0, 1))
  batch["expert_ids"] = expert_ids.copy()
  batch["expert_ids"][1, -1, 4] = 3 - batch["expert_ids"][1, -1, 4]
  moved = set(batch["expert_ids"][1, -1, 4]) != set(expert_ids[1, -1, 4])
  split = split_microbatches(batch, microbatch_rows=2, num_microbatches=3)
  diagnostics = jax.jit(make_diagnostics(model, temperature=temperature))
  metrics = diagnostics(variables, split)
  np.testing.assert_allclose(
    metrics["route_flip_rate"],
    moved / (model.cfg.num_moe_layers * seen.sum()),
    rtol=1e-6,
  )

  states, _ = jax.jit(lambda *args: model.apply(*args, method="mtp"))(
    variables, hidden, *rows
  )
  head = head_kernel(variables, model.cfg)[:, :21]
  p, q = (
    np.asarray(jax.nn.softmax(x @ head / temperature), np.float64)
    for x in (hidden, states[0])
  )
  accepted = [
    # Token t follows state t - 1; its draft was made at t - 2.
    np.minimum(p[b, t - 1], q[b, t - 2]).sum()
    for b, t in zip(*np.nonzero(batch["loss_mask"]), strict=True)
    if t >= 2
  ]
  np.testing.assert_allclose(
    metrics["mtp_acceptance"], np.mean(accepted), rtol=1e-5
  )
  assert 0 < float(metrics["mtp_acceptance"]) < 1


def test_a_dense_model_without_mtp_has_neither():
  model, variables = tiny_model(
    first_k_dense_replace=2, num_nextn_predict_layers=0
  )
  batch = make_batch(OBJECTIVES["dapo"])
  batch["expert_ids"] = batch["expert_ids"][:, :0]
  split = split_microbatches(batch, microbatch_rows=3, num_microbatches=2)
  diagnostics = jax.jit(make_diagnostics(model, temperature=1.0))
  assert diagnostics(variables, split) == {}
