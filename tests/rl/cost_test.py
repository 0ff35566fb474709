import types

import numpy as np
import pytest

from rlm import flops
from rlm.rl.cost import step_flops
from tests.tiny_model import tiny_config

CFG = tiny_config()
ROLLOUT = types.SimpleNamespace(
  prompt_lengths=np.array([5, 5, 7, 7]), lengths=np.array([3, 4, 2, 6])
)


def cost(**changes):
  sizes = dict(
    group_size=2,
    row_length=16,
    trained_tokens=0,
    scorings=0,
    measured_rows=2,
    measurings=0,
  )
  return step_flops(CFG, ROLLOUT, **sizes | changes)


def test_a_groups_prompt_is_prefilled_once():
  lengths = np.array([[3, 4], [2, 6]])
  assert cost() == flops.sampling_flops(CFG, np.array([5, 7]), lengths)


def test_every_pass_over_a_token_counts():
  forward = flops.forward_flops_per_token(CFG, 16, mtp=False)
  update = cost(trained_tokens=10) - cost()
  assert update == pytest.approx(30 * forward)
  scored = cost(trained_tokens=10, scorings=2) - cost(trained_tokens=10)
  assert scored == pytest.approx(20 * forward)
  measured = cost(measurings=3) - cost()  # of 5 + 3 and 5 + 4 tokens
  assert measured == pytest.approx(3 * 17 * forward)
