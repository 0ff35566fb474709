"""A sampler that recites, for tests of what surrounds sampling."""

import dataclasses

import jax
import numpy as np

from rlm.data.r1_chat import R1Chat
from rlm.data.tokenizer import ByteTokenizer
from rlm.tasks.registry import make_task

TOKENIZER = ByteTokenizer()
CHAT = R1Chat(TOKENIZER)
TASK = make_task(
  dict(
    name="column_addition",
    heldout_fraction=0.1,
    letters="abcdef",
    forget_carry=0.0,
    slip=0.0,
  )
)


def right(problem):
  """The worked solution's tokens, EOS included."""
  solution = TASK.worked_solution(problem)
  return CHAT.encode_response(solution.thinking, solution.answer)


def wrong(problem):
  """Well formed, with the right steps and another answer."""
  solution = TASK.worked_solution(problem)
  return CHAT.encode_response(solution.thinking, "a1")


@dataclasses.dataclass
class Completions:
  tokens: np.ndarray
  lengths: np.ndarray
  finished: np.ndarray
  logprobs: np.ndarray
  expert_ids: np.ndarray


class Reciter:
  """Says what it was told, reporting it as a sampler would.

  Token i of a row has log-prob -i - 1; position t of row b was routed to the
  experts 1 + (its place in the array).
  """

  def __init__(self, said, *, max_new, prompt_length=16, chat=CHAT):
    self.said, self.max_new, self.prompt_length = said, max_new, prompt_length
    self.chat = chat

  def generate(self, variables, prompts, keys):
    self.prompts, self.keys = prompts, np.asarray(jax.random.key_data(keys))
    rows = [tokens[: self.max_new] for tokens in self.said]
    assert len(rows) == len(prompts)
    shape = (len(rows), self.max_new)
    tokens = np.full(shape, self.chat.pad_id, np.int32)
    # Past the end there may be anything: it must not be believed.
    logprobs = np.full(shape, -99.0, np.float32)
    for i, row in enumerate(rows):
      tokens[i, : len(row)] = row
      logprobs[i, : len(row)] = -1.0 - np.arange(len(row))
    routes = (2, len(rows), self.prompt_length + self.max_new, 2)
    return Completions(
      tokens=tokens,
      lengths=np.array([len(row) for row in rows], np.int32),
      finished=np.array([row[-1] in self.chat.stop_tokens for row in rows]),
      logprobs=logprobs,
      expert_ids=1 + np.arange(np.prod(routes), dtype=np.int32).reshape(routes),
    )
