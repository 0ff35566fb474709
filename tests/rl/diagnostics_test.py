import jax
import numpy as np
import pytest

from rlm.models.transformer import head_kernel
from rlm.rl.diagnostics import make_diagnostics
from rlm.rl.objectives import OBJECTIVES
from rlm.train import split_microbatches
from tests.fast_jit import fast_jit
from tests.rl.loss_test import make_batch
from tests.tiny_model import tiny_model


def rows_of(batch):
  return [batch[k] for k in ("tokens", "positions", "segment_ids")]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_against_a_whole_forward_pass(temperature):
  model, variables = tiny_model()
  batch = make_batch(OBJECTIVES["dapo"])
  rows = rows_of(batch)
  routes = batch["expert_ids"].swapaxes(0, 1)
  hidden, _ = fast_jit(model.apply)(variables, *rows, routes)
  split = split_microbatches(batch, microbatch_rows=2, num_microbatches=3)
  diagnostics = fast_jit(make_diagnostics(model, temperature=temperature))
  metrics = diagnostics(variables, split)

  states, _ = fast_jit(lambda *args: model.apply(*args, method="mtp"))(
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


def test_a_model_without_mtp_drafts_nothing():
  model, variables = tiny_model(num_nextn_predict_layers=0)
  batch = make_batch(OBJECTIVES["dapo"])
  split = split_microbatches(batch, microbatch_rows=3, num_microbatches=2)
  assert make_diagnostics(model, temperature=1.0)(variables, split) == {}
