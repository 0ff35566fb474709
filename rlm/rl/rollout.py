"""Completions of a step's prompts, scored and packed for the update.

Rows are left-aligned: prompt, completion, padding, at one fixed length, so
that nothing recompiles whatever was sampled.  What belongs to the completion
is said once, in `completion_mask`: its tokens and its EOS, never the prompt,
never padding.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rlm.data.chat import Chat
from rlm.rewards.answering import Sampler, Scorer, answer_problems
from rlm.rewards.registry import Scored
from rlm.sampling.sampler import request_keys
from rlm.tasks.base import Problem


@dataclasses.dataclass(frozen=True)
class Rollout:
  """B = P * G completions, those of a prompt adjacent; numpy, on the host.

  Attributes:
    tokens: int32 [B, T], prompt, completion, padding.
    prompt_lengths: int32 [B], in tokens.
    lengths: int32 [B], tokens of the completion, EOS included.
    finished: bool [B], ended by EOS; False where it ran out of tokens.
    completion_mask: bool [B, T].
    sampler_logprobs: float32 [B, T], of tokens[b, t] under the distribution
      it was sampled from; 0 outside the completion.
    expert_ids: int32 [L, B, T, K], the routes taken; 0 in padding, whose
      routes have no effect.
    weight_version: int32 [B, T], updates made to the weights that sampled
      each token; 0 outside the completion.
    keys: uint32 [B, 2], request keys.
    problems: the P prompts' problems, each G times.
    texts: the responses' texts, without EOS; see `Chat.response_text`.
    scores: the verdicts.
  """

  tokens: np.ndarray
  prompt_lengths: np.ndarray
  lengths: np.ndarray
  finished: np.ndarray
  completion_mask: np.ndarray
  sampler_logprobs: np.ndarray
  expert_ids: np.ndarray
  weight_version: np.ndarray
  keys: np.ndarray
  problems: list[Problem]
  texts: list[str]
  scores: list[Scored]

  @property
  def rewards(self) -> np.ndarray:
    """float32 [B], the weighted sums that RL maximises."""
    return np.array([s.total for s in self.scores], np.float32)

  @property
  def levels(self) -> np.ndarray:
    """int32 [B]."""
    return np.array([p.level for p in self.problems], np.int32)

  def verdicts(self, name: str) -> np.ndarray:
    """The field `name` of each score, such as "correct"; bool [B]."""
    return np.array([getattr(s, name) for s in self.scores], bool)

  def reward_means(self) -> dict[str, float]:
    """Mean of each named reward, before its weight."""
    return {
      name: float(np.mean([s.rewards[name] for s in self.scores]))
      for name in self.scores[0].rewards
    }


def collect(
  sampler: Sampler,
  variables: Any,
  problems: Sequence[Problem],
  chat: Chat,
  scorer: Scorer,
  key: jax.Array,
  *,
  group_size: int,
  row_length: int,
  weight_version: int,
) -> Rollout:
  """Samples and scores G completions of each problem, as rows to train on.

  Args:
    sampler: draws; see `answer_problems`.
    variables: of the policy.
    problems: P problems.
    chat: encodes prompts, decodes completions.
    scorer: judges texts.
    key: of this step; see `request_keys`.
    group_size: G.
    row_length: T, at least the longest prompt plus the longest completion.
    weight_version: updates made to `variables` so far.

  Returns:
    A Rollout of P * G rows.

  Raises:
    ValueError: a prompt is too long for the sampler or the model, or the
      rows are shorter than prompt and completion.
  """
  keys = request_keys(key, len(problems) * group_size)
  answers = answer_problems(
    sampler,
    variables,
    problems,
    chat,
    scorer,
    keys,
    samples_per_problem=group_size,
  )
  rows = pack_rows(
    answers.prompts, answers.completions, row_length, chat.pad_id
  )
  return Rollout(
    **rows,
    weight_version=np.where(
      rows["completion_mask"], np.int32(weight_version), np.int32(0)
    ),
    keys=np.asarray(jax.random.key_data(keys)),
    problems=answers.problems,
    texts=answers.texts,
    scores=answers.scores,
  )


def pack_rows(
  prompts: Sequence[Sequence[int]],
  completions: Any,
  row_length: int,
  pad_id: int,
) -> dict[str, np.ndarray]:
  """Prompts and completions as left-aligned rows of one length.

  Args:
    prompts: token ids of each prompt.
    completions: `rlm.sampling.sampler.Completions` of the prompts.
    row_length: T.
    pad_id: fills the rest.

  Returns:
    The array fields of `Rollout` that sampling gives.

  Raises:
    ValueError: a prompt and its completion exceed the row.
  """
  lengths = np.asarray(completions.lengths, np.int32)
  starts = np.array([len(p) for p in prompts], np.int32)
  ends = starts + lengths
  if ends.max() > row_length:
    raise ValueError(
      f"a prompt of {starts[ends.argmax()]} tokens and its completion of"
      f" {lengths[ends.argmax()]} exceed {row_length=}. Make row_length"
      " prompt_length + max_new_tokens."
    )
  num_rows = len(prompts)
  tokens = np.full((num_rows, row_length), pad_id, np.int32)
  logprobs = np.zeros((num_rows, row_length), np.float32)
  place = np.arange(row_length)[None]
  mask = (place >= starts[:, None]) & (place < ends[:, None])
  for i, prompt in enumerate(prompts):
    tokens[i, : starts[i]] = prompt
    tokens[i, starts[i] : ends[i]] = completions.tokens[i, : lengths[i]]
    logprobs[i, starts[i] : ends[i]] = completions.logprobs[i, : lengths[i]]
  routes = np.asarray(completions.expert_ids, np.int32)
  num_layers, _, known, per_token = routes.shape
  expert_ids = np.zeros((num_layers, num_rows, row_length, per_token), np.int32)
  shared = min(known, row_length)
  expert_ids[:, :, :shared] = np.where(
    (place < ends[:, None])[None, :, :shared, None], routes[:, :, :shared], 0
  )
  return {
    "tokens": tokens,
    "prompt_lengths": starts,
    "lengths": lengths,
    "finished": np.asarray(completions.finished, bool),
    "completion_mask": mask,
    "sampler_logprobs": logprobs,
    "expert_ids": expert_ids,
  }
