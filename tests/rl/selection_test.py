import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.rl.config import SelectionConfig
from rlm.rl.objectives import OBJECTIVES
from rlm.rl.selection import make_minibatch, split_rows
from tests.rl.reciter import right, wrong
from tests.rl.rollout_test import recite


@given(
  st.lists(st.booleans(), min_size=4, max_size=4),
  st.sampled_from(["all", "untied"]),
  st.sampled_from([(12, 1), (12, 3), (6, 2), (4, 4)]),
  st.integers(0, 5),
)
def test_split(tied, which, sizes, seed):
  rows, minibatches = sizes
  cfg = SelectionConfig(which, rows, minibatches, 1)
  key = jax.random.key(seed)
  split = split_rows(cfg, np.array(tied), 3, key)
  chosen = np.concatenate([np.zeros(0, int), *split])
  usable = [i for i in range(12) if which == "all" or not tied[i // 3]]
  # None twice, none without signal, and as many as there are up to the limit.
  assert len(set(chosen)) == len(chosen) == min(rows, len(usable))
  assert set(chosen) <= set(usable)
  assert all(0 < len(part) <= cfg.rows_per_minibatch for part in split)
  if split:
    assert max(map(len, split)) - min(map(len, split)) <= 1
  again = split_rows(cfg, np.array(tied), 3, key)
  assert all((a == b).all() for a, b in zip(split, again, strict=True))


def test_the_split_is_random_in_its_key():
  cfg = SelectionConfig("all", 12, 2, 3)
  splits = {
    tuple(split_rows(cfg, np.zeros(4, bool), 3, jax.random.key(i))[0])
    for i in range(5)
  }
  assert len(splits) == 5


def test_no_signal_no_update():
  cfg = SelectionConfig("untied", 6, 2, 3)
  assert split_rows(cfg, np.ones(4, bool), 3, jax.random.key(0)) == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_minibatch_holds_the_chosen_rows_then_rows_without_weight(name):
  _, _, rollout = recite(right, wrong, problems=2)
  advantages = np.array([1.0, -1.0, 0.5, -0.5], np.float32)
  rows = np.array([3, 0])
  batch = make_minibatch(
    rollout,
    advantages,
    rows,
    OBJECTIVES[name],
    num_rows=3,
    max_new_tokens=40,
  )
  assert batch["advantages"].tolist() == [-0.5, 1.0, 0.0]
  np.testing.assert_array_equal(batch["tokens"][:2], rollout.tokens[rows])
  np.testing.assert_array_equal(
    batch["expert_ids"][0], rollout.expert_ids[:, 3]
  )
  ends = (rollout.prompt_lengths + rollout.lengths)[rows]
  np.testing.assert_array_equal(batch["segment_ids"].sum(axis=1), [*ends, 0])
  assert (batch["positions"] == np.arange(60)).all()
  # The padding row has no segment, no target and no weight.
  for array in ("segment_ids", "loss_mask", "weights", "metric_weights"):
    assert not batch[array][2].any()
  mask = batch["loss_mask"]
  np.testing.assert_array_equal(mask[:2], rollout.completion_mask[rows])
  assert (
    not batch["weights"][~mask].any() and (batch["weights"][mask] > 0).all()
  )
  np.testing.assert_allclose(batch["metric_weights"].sum(), 1.0, rtol=1e-6)
  if OBJECTIVES[name].aggregation == "sequence_mean":
    np.testing.assert_allclose(
      batch["weights"].sum(axis=1), [0.5, 0.5, 0.0], rtol=1e-6
    )


def test_padding_rows_change_no_weight():
  _, _, rollout = recite(right, wrong, problems=2)
  make = dict(
    rollout=rollout,
    advantages=np.zeros(4),
    rows=np.array([0, 1]),
    max_new_tokens=40,
  )
  for objective in OBJECTIVES.values():
    few = make_minibatch(**make, objective=objective, num_rows=2)
    many = make_minibatch(**make, objective=objective, num_rows=4)
    np.testing.assert_array_equal(few["weights"], many["weights"][:2])
