import collections
import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.config import build
from rlm.rl.curriculum import (
  CurriculumConfig,
  initial_state,
  levels_for_step,
  update,
)

SECTION = dict(
  levels=[2, 3, 4, 6],
  start_level=3,
  threshold=0.7,
  smoothing=0.5,
  min_steps=2,
  top_share=0.5,
)


def make(**changes):
  return build(CurriculumConfig, {**SECTION, **changes}, "config.curriculum")


def test_a_hand_computed_course():
  cfg = make()
  state = initial_state(cfg)
  assert state == {
    "top_level": 3,
    "steps_at_top": 0,
    "success": [None, None, None, None],
  }
  state = update(cfg, state, {2: 0.5, 3: 1.0})  # passes, but one step only
  assert state["top_level"] == 3
  assert state["success"] == [0.5, 1.0, None, None]
  state = update(cfg, state, {2: 1.0, 3: 0.5})  # (1 + .5) / 2 = .75 passes
  assert state == {
    "top_level": 4,
    "steps_at_top": 0,
    "success": [0.75, 0.75, None, None],
  }
  state = update(cfg, state, {4: 0.25})
  state = update(cfg, state, {4: 0.75})
  assert state["success"][2] == 0.5
  assert state["top_level"] == 4 and state["steps_at_top"] == 2
  state = update(cfg, state, {4: 1.0})
  assert state["top_level"] == 6  # 5 is not one of the levels


def test_success_below_the_top_raises_nothing():
  cfg = make(min_steps=1)
  state = initial_state(cfg)
  for _ in range(5):
    state = update(cfg, state, {2: 1.0})
  assert state["top_level"] == 3


def test_the_last_level_stays():
  cfg = make(min_steps=1, start_level=6)
  state = initial_state(cfg)
  for _ in range(3):
    state = update(cfg, state, {6: 1.0})
  assert state["top_level"] == 6


def test_one_level_at_a_time_and_never_back():
  cfg = make(min_steps=1, smoothing=0.0)
  state = update(cfg, initial_state(cfg), {2: 1.0, 3: 1.0})
  assert state["top_level"] == 4
  assert update(cfg, state, {3: 0.0, 4: 0.0})["top_level"] == 4


def test_a_threshold_of_one_is_reached_by_all_right():
  cfg = make(min_steps=9, threshold=1.0, smoothing=0.7)
  state = initial_state(cfg)
  for _ in range(9):  # repeated smoothing must not round 1 down
    state = update(cfg, state, {3: 1.0})
  assert state["top_level"] == 4


def test_update_leaves_its_argument_and_json_keeps_the_state():
  cfg = make()
  state = update(
    cfg, initial_state(cfg), {2: np.float32(0.5), 3: np.mean([1, 0])}
  )
  before = copy.deepcopy(state)
  after = update(cfg, state, {2: 1.0})
  assert state == before != after
  restored = json.loads(json.dumps(after))
  assert restored == after
  assert levels_for_step(cfg, restored, 0, 5, 16) == levels_for_step(
    cfg, after, 0, 5, 16
  )


def test_the_batch_has_the_share_at_the_top():
  cfg = make()
  state = {**initial_state(cfg), "top_level": 6}
  counts = collections.Counter(levels_for_step(cfg, state, 0, 0, 16))
  # 8 at the top; 8 over three easier levels: 3, 3 and 2.
  assert counts[6] == 8
  assert sorted(counts[level] for level in (2, 3, 4)) == [2, 3, 3]


def test_levels_left_over_fall_on_every_easier_level():
  cfg = make(top_share=0.9)
  state = {**initial_state(cfg), "top_level": 6}
  seen = collections.Counter(
    level
    for step in range(300)
    for level in levels_for_step(cfg, state, 0, step, 8)
  )
  assert set(seen) == {2, 3, 4, 6}
  assert max(seen[level] for level in (2, 3, 4)) < 140


def test_the_order_is_random():
  cfg = make()
  firsts = {
    levels_for_step(cfg, initial_state(cfg), 0, s, 8)[0] for s in range(20)
  }
  assert firsts == {2, 3}


def test_without_easier_levels_all_are_at_the_top():
  cfg = make(start_level=2)
  assert levels_for_step(cfg, initial_state(cfg), 0, 0, 5) == [2] * 5


@given(
  st.integers(0, 99), st.integers(0, 99), st.integers(1, 40), st.floats(0.01, 1)
)
def test_draws_are_deterministic_and_complete(seed, step, n, share):
  cfg = make(top_share=share)
  state = initial_state(cfg)
  levels = levels_for_step(cfg, state, seed, step, n)
  assert levels == levels_for_step(cfg, state, seed, step, n)
  assert len(levels) == n
  assert set(levels) <= {2, 3}
  assert levels.count(3) == max(1, round(share * n))


def test_draws_differ_between_steps_and_seeds():
  cfg = make()
  state = initial_state(cfg)
  batches = {
    tuple(levels_for_step(cfg, state, seed, step, 16))
    for seed in range(5)
    for step in range(5)
  }
  assert len(batches) > 20


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"levels": []}, r"levels is \(\), but must be one or more"),
    ({"levels": [3, 2]}, r"in ascending order"),
    ({"levels": [2, 2, 3]}, r"in ascending order"),
    ({"start_level": 5}, r"start_level is 5, but must be one of levels=\(2, 3"),
    ({"threshold": 0.0}, r"threshold is 0.0, but must lie in \(0, 1\]"),
    ({"threshold": 1.1}, r"threshold is 1.1, but must lie in \(0, 1\]"),
    ({"smoothing": 1.0}, r"smoothing is 1.0, but must lie in \[0, 1\)"),
    ({"min_steps": 0}, r"min_steps is 0, but must be at least 1"),
    ({"top_share": 0.0}, r"top_share is 0.0, but must lie in \(0, 1\]"),
    ({"tresholds": 0.5}, r"unknown key 'tresholds'"),
  ],
)
def test_config_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


def test_update_errors():
  cfg = make()
  with pytest.raises(ValueError, match=r"success at level 5 was reported, but"):
    update(cfg, initial_state(cfg), {5: 1.0})
  for success in (1.5, float("nan")):
    with pytest.raises(
      ValueError, match=r"success at level 2 is .* must lie in"
    ):
      update(cfg, initial_state(cfg), {2: success})
