"""Multi-token prediction: what each depth reads, and when."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlm.models.mtp import next_inputs, reads_own_segment
from tests.models.families import (
  DOCUMENTS,
  differentiate,
  model_of,
  no_cotangents,
  packed_rows,
  predicts,
  variables_of,
)

# Values and gradients of the modules are held to the reference, weight by
# weight, in transformer_test.


def test_next_inputs():
  tokens = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]], jnp.int32)
  inputs = next_inputs(tokens, 2)
  np.testing.assert_array_equal(inputs[0, :, :3], tokens[:, 1:])
  np.testing.assert_array_equal(inputs[1, :, :2], tokens[:, 2:])


def test_positions_that_read_their_own_segment():
  # One segment that fills the row, where the inputs of its end wrap into it.
  whole = jnp.ones((1, 4), jnp.int32)
  np.testing.assert_array_equal(
    reads_own_segment(whole, 2)[:, 0], [[1, 1, 1, 0], [1, 1, 0, 0]]
  )
  segment_ids = packed_rows()[2]
  np.testing.assert_array_equal(reads_own_segment(segment_ids, 2), predicts(2))


@pytest.mark.parametrize(
  "name", ["v3", pytest.param("dense", marks=pytest.mark.full)]
)
def test_depth_k_reads_up_to_the_token_before_its_target(name):
  # No token id occurs twice, so the embedding's gradient has a row per cell.
  cfg = model_of(name).cfg
  rows = tokens, _, _ = packed_rows()
  for depth in range(cfg.num_nextn_predict_layers):
    for row, start, length in DOCUMENTS:
      for t in range(start, start + length - 2 - depth):
        cotangents = no_cotangents(cfg)
        cotangents["mtp"][depth, row, t] = np.arange(1, cfg.hidden_size + 1)
        _, gradients = differentiate(name)(variables_of(name), rows, cotangents)
        used = gradients["params"]["embed"]["embedding"].any(axis=-1)
        target = t + 2 + depth
        assert set(np.flatnonzero(used)) == set(tokens[row, start:target])


def test_depths_have_weights_of_their_own_and_share_head_and_embedding():
  params = variables_of("v3")["params"]["mtp_modules"]
  assert set(params) == {
    "proj",
    "embedding_norm",
    "hidden_norm",
    "block",
    "norm",
  }
  assert params["proj"].shape == (2, 32, 16)  # depth, 2 D, D


def test_a_model_without_modules_says_so():
  model, rows = model_of("v2"), packed_rows()
  with pytest.raises(ValueError, match="no MTP modules. Set num_nextn_predict"):
    model.apply(variables_of("v2"), jnp.zeros((3, 7, 16)), *rows, method="mtp")
