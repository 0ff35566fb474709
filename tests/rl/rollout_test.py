"""Masks, EOS, padding and truncation, by hand."""

import jax
import numpy as np
import pytest

from rlm.rewards.registry import Scorer
from rlm.rl.rollout import collect, pack_rows
from tests.rl.reciter import (
  CHAT,
  TASK,
  TOKENIZER,
  Completions,
  Reciter,
  right,
  wrong,
)

ROW = 60


def recite(*makers, problems=1, max_new=40):
  """A rollout whose completions are made by `makers` from the problems."""
  asked = [TASK.problem(0, i, 2, "train") for i in range(problems)]
  sampler = Reciter(
    [make(problem) for problem in asked for make in makers], max_new=max_new
  )
  rollout = collect(
    sampler,
    None,
    asked,
    CHAT,
    Scorer(TASK, {"accuracy": 1.0, "format": 0.1}),
    jax.random.key(3),
    group_size=len(makers),
    row_length=ROW,
    weight_version=7,
  )
  return asked, sampler, rollout


def test_the_mask_is_the_completion_with_its_eos_and_nothing_else():
  (problem,), _, rollout = recite(right, wrong)
  prompt = CHAT.encode_prompt(problem.prompt)
  for i, completion in enumerate((right(problem), wrong(problem))):
    start, end = len(prompt), len(prompt) + len(completion)
    np.testing.assert_array_equal(
      rollout.tokens[i],
      prompt + completion + [TOKENIZER.pad_id] * (ROW - end),
    )
    np.testing.assert_array_equal(
      rollout.completion_mask[i],
      [False] * start + [True] * len(completion) + [False] * (ROW - end),
    )
    assert rollout.tokens[i][rollout.completion_mask[i]][-1] == TOKENIZER.eos_id
    np.testing.assert_array_equal(
      rollout.sampler_logprobs[i],
      [0.0] * start
      + [-1.0 - t for t in range(len(completion))]
      + [0.0] * (ROW - end),
    )
    assert (rollout.weight_version[i][rollout.completion_mask[i]] == 7).all()
    assert (rollout.weight_version[i][~rollout.completion_mask[i]] == 0).all()
    # Routes of prompt and completion as they were, none in padding.
    assert (rollout.expert_ids[:, i, :end] > 0).all()
    assert (rollout.expert_ids[:, i, end:] == 0).all()
  assert rollout.lengths.tolist() == [len(right(problem)), len(wrong(problem))]
  assert (rollout.prompt_lengths == len(prompt)).all()


def test_rewards_and_texts():
  (problem,), _, rollout = recite(right, wrong)
  np.testing.assert_allclose(rollout.rewards, [1.1, 0.1])
  assert rollout.verdicts("correct").tolist() == [True, False]
  assert rollout.verdicts("steps_correct").tolist() == [True, True]
  assert rollout.reward_means() == {"accuracy": 0.5, "format": 1.0}
  solution = TASK.worked_solution(problem)
  assert rollout.texts[0] == (
    f"<think>{solution.thinking}</think><answer>{solution.answer}</answer>"
  )
  assert rollout.levels.tolist() == [2, 2]


def test_a_completion_cut_before_its_eos_earns_nothing():
  # The whole format stands there, but the model had not said that it was
  # done: its EOS would be the next token.
  length = len(right(TASK.problem(0, 0, 2, "train")))
  _, _, rollout = recite(right, right, max_new=length - 1)
  assert rollout.texts[0].endswith("</answer>")
  assert rollout.finished.tolist() == [False, False]
  assert rollout.rewards.tolist() == [0.0, 0.0]
  assert rollout.lengths.tolist() == [length - 1] * 2
  # Every token of it counts, the last too: there is no EOS to leave out.
  assert rollout.completion_mask.sum(axis=1).tolist() == [length - 1] * 2


def test_groups_are_adjacent_and_each_request_has_its_own_key():
  asked, sampler, rollout = recite(right, wrong, right, problems=3)
  assert [p.identity for p in rollout.problems] == [
    p.identity for p in asked for _ in range(3)
  ]
  np.testing.assert_allclose(rollout.rewards, [1.1, 0.1, 1.1] * 3)
  expected = [jax.random.fold_in(jax.random.key(3), i) for i in range(9)]
  np.testing.assert_array_equal(
    rollout.keys, [np.asarray(jax.random.key_data(k)) for k in expected]
  )
  np.testing.assert_array_equal(sampler.keys, rollout.keys)
  assert len({tuple(k) for k in rollout.keys}) == 9


def test_rows_that_are_too_short_are_refused():
  completions = Completions(
    tokens=np.ones((1, 4), np.int32),
    lengths=np.array([4]),
    finished=np.array([True]),
    logprobs=np.zeros((1, 4), np.float32),
    expert_ids=np.zeros((0, 1, 8, 2), np.int32),
  )
  with pytest.raises(ValueError, match=r"3 tokens .* 4 exceed row_length=6"):
    pack_rows([[1, 2, 3]], completions, 6, 0)
