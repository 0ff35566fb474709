"""Documents: token ids with a loss mask, all of a corpus in flat arrays.

A document is what packing keeps together: a source file, a worked problem, a
conversation. Texts and problems become documents here; conversations do in
`rlm/data/chat.py`.
"""

import dataclasses
import random
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from rlm.data.chat import Chat, check_fits
from rlm.data.fim import fim_tokens, split_text
from rlm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
  """A corpus in flat arrays: document i is [offsets[i], offsets[i + 1]).

  It is held in memory, 5 bytes a token.

  Attributes:
    tokens: int32 [total].
    loss_mask: bool [total]; True where a token counts as a target.
    offsets: int64 [documents + 1].
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  offsets: np.ndarray

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def lengths(self) -> np.ndarray:
    """int64 [documents], in tokens."""
    return np.diff(self.offsets)

  @classmethod
  def join(
    cls, documents: Iterable[tuple[Sequence[int], Sequence[bool]]]
  ) -> "Documents":
    """Lays (tokens, loss mask) pairs of equal length end to end."""
    tokens, masks = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    lengths = [0]
    for ids, mask in documents:
      tokens.append(np.asarray(ids, np.int32))
      masks.append(np.asarray(mask, bool))
      lengths.append(len(ids))
    return cls(
      np.concatenate(tokens), np.concatenate(masks), np.cumsum(lengths)
    )


def text_documents(
  tokenizer: Tokenizer, texts: Sequence[str], *, fim_rate: float, seed: int
) -> Documents:
  """BOS text EOS for each text, or a share of them as fill-in-the-middle.

  The loss is on everything but BOS; in a rearranged document on everything
  but its first marker, which takes the place of BOS.

  Args:
    tokenizer: spells text and markers.
    texts: one per document.
    fim_rate: share of the documents to rearrange, 0.1 in DeepSeek-V3.
    seed: which ones and where they are cut is a function of (seed, index).
  """

  def encode():
    for i, ids in enumerate(tokenizer.encode_batch(texts)):
      tokens = np.empty(len(ids) + 2, np.int32)
      tokens[0], tokens[1:-1], tokens[-1] = (
        *(tokenizer.bos_id, ids, tokenizer.eos_id),
      )
      if fim_rate:
        rng = random.Random(f"fim/{seed}/{i}")
        if rng.random() < fim_rate:
          prefix, middle, suffix = split_text(texts[i], rng)
          tokens = np.asarray(
            fim_tokens(tokenizer, prefix, middle, suffix), np.int32
          )
      mask = np.ones(len(tokens), bool)
      mask[0] = False
      yield tokens, mask

  return Documents.join(encode())


class Task(Protocol):
  """What a corpus needs of a family of problems; `rlm.tasks` has them."""

  def problem(self, seed: int, index: int, level: int, split: str) -> Any: ...
  def worked_solution(self, problem: Any) -> Any: ...
  def authored_solution(self, problem: Any, rng: random.Random) -> Any: ...


def task_documents(
  chat: Chat,
  task: Task,
  *,
  count: int,
  levels: Sequence[int],
  author: str,
  tagged: float,
  seed: int,
  split: str,
  row_length: int,
) -> Documents:
  """Worked problems; document i is a pure function of (seed, i).

  A share `tagged` is written as a conversation with its markers, the rest as
  plain text, the way books print a problem and its working:

    BOS prompt newline steps newline answer EOS

  A base model that never saw the markers cannot be given a format by a few
  hundred examples. The loss is on the steps, the answer and EOS alone: the
  prompt is noise, and predicting it wastes a small model.

  Args:
    chat: how the model is written to.
    task: draws problems and writes solutions.
    count: number of documents.
    levels: difficulties drawn from uniformly; a repeated one weighs more.
    author: "clean" for right solutions, "noisy" for the task's own authors.
    tagged: share of the documents in the chat format.
    seed: names the stream of problems.
    split: "train" or "heldout".
    row_length: tokens of a row; a problem is never cut.

  Raises:
    ValueError: a problem does not fit a row.
  """
  solve = {
    "clean": lambda problem, rng: task.worked_solution(problem),
    "noisy": task.authored_solution,
  }[author]

  def encode():
    for i in range(count):
      rng = random.Random(f"task/{seed}/{split}/{i}")
      level = levels[int(rng.random() * len(levels))]
      is_tagged = rng.random() < tagged
      problem = task.problem(seed, i, level, split)
      solution = solve(problem, rng)
      if is_tagged:
        tokens, mask = chat.encode_turn(
          problem.prompt, solution.thinking, solution.answer
        )
      else:
        tokenizer = chat.markers
        asked = tokenizer.encode(problem.prompt + "\n")
        said = tokenizer.encode(f"{solution.thinking}\n{solution.answer}")
        tokens = [tokenizer.bos_id, *asked, *said, tokenizer.eos_id]
        mask = [False] * (1 + len(asked)) + [True] * (len(said) + 1)
      check_fits(len(tokens), row_length, f"a problem of {level=}")
      yield tokens, mask

  return Documents.join(encode())
