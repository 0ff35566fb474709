"""From problems to judged completions: encode, sample, decode, score.

RL, rejection sampling and evaluation all ask here; they differ in the keys of
their requests and in what they make of the verdicts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from rlm.data.chat import Chat
from rlm.rewards.registry import Scored
from rlm.tasks.base import Problem


class Sampler(Protocol):
  """What is needed of `rlm.sampling.sampler.Sampler`."""

  def generate(self, variables: Any, prompts: list, keys: Any) -> Any:
    """Completions of `prompts`, one per request key."""


class Scorer(Protocol):
  """What is needed of `rlm.rewards.registry.Scorer`."""

  def score(self, problem: Problem, text: str, finished: bool) -> Scored:
    """The verdict on one completion's text."""


@dataclasses.dataclass(frozen=True)
class Answers:
  """n completions of each of P problems, those of a problem adjacent.

  Attributes:
    problems: the P problems, each n times.
    prompts: their token ids, chat markers included.
    completions: `rlm.sampling.sampler.Completions` of the P * n requests.
    texts: the responses' texts, without EOS; see `Chat.response_text`.
    scores: the verdicts.
  """

  problems: list[Problem]
  prompts: list[list[int]]
  completions: Any
  texts: list[str]
  scores: list[Scored]

  def tokens(self, i: int) -> np.ndarray:
    """int32 [length], what completion i holds before its EOS."""
    return _spoken(self.completions, i)


def _spoken(completions: Any, i: int) -> np.ndarray:
  """Tokens of completion i, without padding and the EOS that ended it."""
  end = completions.lengths[i] - int(completions.finished[i])
  return completions.tokens[i, :end]


def answer_problems(
  sampler: Sampler,
  variables: Any,
  problems: Sequence[Problem],
  chat: Chat,
  scorer: Scorer,
  keys: Any,
  *,
  samples_per_problem: int,
) -> Answers:
  """Draws and scores n completions of each problem.

  A completion that ran out of tokens is scored as not finished: it earns
  nothing, even if its text so far has the whole format.

  Args:
    sampler: draws; its stop tokens must be the chat's, and no more.
    variables: of the model.
    problems: P problems.
    chat: encodes prompts, decodes completions.
    scorer: judges texts.
    keys: [P * n], one per request; the sampler's.
    samples_per_problem: n.

  Raises:
    ValueError: a prompt is too long for the sampler or the model.
  """
  n = samples_per_problem
  repeated = [problem for problem in problems for _ in range(n)]
  asked = [chat.encode_prompt(problem.prompt) for problem in problems]
  prompts = [ids for ids in asked for _ in range(n)]
  completions = sampler.generate(variables, prompts, keys)
  texts = [
    chat.response_text(_spoken(completions, i)) for i in range(len(prompts))
  ]
  return Answers(
    problems=repeated,
    prompts=prompts,
    completions=completions,
    texts=texts,
    scores=[
      scorer.score(problem, text, finished=bool(finished))
      for problem, text, finished in zip(
        repeated, texts, completions.finished, strict=True
      )
    ],
  )
