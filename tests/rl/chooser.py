"""A sampler whose answer depends on prompt and key alone, as a real one's."""

import jax
import numpy as np

from tests.rl.reciter import CHAT, TOKENIZER, Completions, right, wrong


def longer(problem):
  """Right, with the thinking said twice: its steps do not check."""
  answer = right(problem)
  end = answer.index(TOKENIZER.end_think_id)
  return answer[:end] + answer[1:end] + answer[end:]


def marked(problem):
  """Right, with a marker of a turn inside the thinking."""
  answer = right(problem)
  return [answer[0], TOKENIZER.user_id, *answer[1:]]


def broken(problem):
  """Right, with half a character inside the thinking."""
  answer = right(problem)
  return [answer[0], 0xC3, *answer[1:]]


def cut(problem):
  """The whole format without the EOS."""
  return right(problem)[:-1]


WAYS = (right, wrong, longer, marked, broken, cut)


class Chooser:
  """Answers one of `ways`, by the request's key.

  Attributes:
    asked: requests so far.
    capacity: of a row, as a sampler has it.
    stop_after: requests after which it raises KeyboardInterrupt, as a kill
      inside `generate` would; None never.
  """

  def __init__(self, problems, *, ways=WAYS, max_new=120, stop_after=None):
    self.by_prompt = {tuple(CHAT.encode_prompt(p.prompt)): p for p in problems}
    self.ways, self.max_new = ways, max_new
    self.asked, self.stop_after = 0, stop_after
    self.capacity = 16 + max_new

  def generate(self, variables, prompts, keys):
    tokens = np.full((len(prompts), self.max_new), TOKENIZER.pad_id, np.int32)
    lengths, finished = [], []
    for i, key in enumerate(np.asarray(jax.random.key_data(keys))):
      if self.asked == self.stop_after:
        raise KeyboardInterrupt
      self.asked += 1
      way = self.ways[int(key.sum()) % len(self.ways)]
      said = way(self.by_prompt[tuple(prompts[i])])
      tokens[i, : len(said)] = said
      lengths.append(len(said))
      finished.append(said[-1] == TOKENIZER.eos_id)
    return Completions(
      tokens=tokens,
      lengths=np.array(lengths, np.int32),
      finished=np.array(finished),
      logprobs=np.zeros(tokens.shape, np.float32),
      expert_ids=np.zeros((0, len(prompts), 1, 2), np.int32),
    )
