"""What training can be judged by without sampling: loss on rows held out.

Bits per byte of each source, and the share of problems whose whole worked
response the model would write greedily, one token at a time, if it were given
the right tokens before.  The latter says which levels a base has learned,
at a thousandth of the cost of sampling answers.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rlm.data.chat import Chat, check_fits
from rlm.data.packing import empty_row
from rlm.data.pipeline import Heldout
from rlm.losses import Batch, is_greedy, own_targets, token_logprobs
from rlm.models.layout import Layout
from rlm.models.transformer import head_kernel
from rlm.parallel.config import ROWS
from rlm.parallel.rows import own_rows, place_rows
from rlm.parallel.sharding import batch_specs
from rlm.tasks.base import Task


class RowScores(NamedTuple):
  """Scores of the targets of each row.

  Attributes:
    nats: float32 [B], sum of -log p.
    exact: bool [B], whether every target has the largest logit.
  """

  nats: jax.Array
  exact: jax.Array


ScoreRows = Callable[[Any, Batch], RowScores]


def make_score_rows(layout: Layout) -> ScoreRows:
  """A function (variables, batch) -> RowScores; rows are divided.

  Batches are whole on every process, and so are their scores.
  """
  model, shard, cfg = layout.model, layout.shard, layout.model.cfg

  def score_own(variables, batch):
    hidden, _ = model.apply(
      variables, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    head = head_kernel(variables, cfg)
    targets, mask = own_targets(batch, 1, shard)
    flat = (hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1))
    n_vocab_used, chunk = cfg.n_vocab_used, cfg.logits_chunk
    logprobs, _ = token_logprobs(
      *flat,
      n_vocab_used=n_vocab_used,
      temperature=1.0,
      chunk=chunk,
      shard=shard,
    )
    greedy = is_greedy(
      *flat, n_vocab_used=n_vocab_used, chunk=chunk, shard=shard
    )
    nats = -jnp.where(mask, logprobs.reshape(mask.shape), 0.0).sum(axis=1)
    missed = (~greedy.reshape(mask.shape) & mask).sum(axis=1)
    return RowScores(nats=shard.sum_row(nats), exact=shard.sum_row(missed) == 0)

  @functools.partial(jax.jit, out_shardings=layout.everywhere)
  def score_placed(variables, batch):
    specs = (layout.specs(variables), batch_specs(batch, leading=0))
    return layout.map(score_own, specs, P(ROWS))(variables, batch)

  def score_rows(variables, batch):
    rows = len(batch["tokens"])
    own = own_rows(layout.mesh, rows)
    mine = {name: x[own] for name, x in batch.items()}
    placed = place_rows(layout.mesh, mine, own, rows=rows, leading=0)
    return score_placed(variables, placed)

  return score_rows


def bits_per_byte(
  score_rows: ScoreRows, variables: Any, heldout: Mapping[str, Heldout]
) -> dict[str, float]:
  """Bits per byte of text of each held-out source.

  Args:
    score_rows: from `make_score_rows`.
    variables: of the model.
    heldout: from `load_heldout`.

  Returns:
    {"heldout/SOURCE/bits_per_byte": bits}.
  """
  metrics = {}
  for name, rows in heldout.items():
    nats = sum(
      np.asarray(score_rows(variables, batch).nats, np.float64).sum()
      for batch in rows.batches
    )
    bits = float(nats) / math.log(2)
    metrics[f"heldout/{name}/bits_per_byte"] = bits / rows.num_bytes
  return metrics


class WorkedProblems(NamedTuple):
  """Held-out problems with their right solutions, as rows to score.

  Attributes:
    batches: dicts of arrays [B, T], filled up with padding.
    levels: level of each row, padding left out.
  """

  batches: list[Batch]
  levels: list[int]


def worked_problems(
  task: Task,
  chat: Chat,
  *,
  levels: Sequence[int],
  problems_per_level: int,
  seed: int,
  batch_size: int,
  row_length: int,
) -> WorkedProblems:
  """Encodes held-out problems of each level in the chat format.

  Args:
    task: the family; it must have worked solutions.
    chat: how the model is written to.
    levels: difficulties.
    problems_per_level: how many of each.
    seed: names the stream of problems.
    batch_size: B.
    row_length: T.

  Raises:
    ValueError: no worked solutions, an unknown level, or one too long.
  """
  if not task.has_worked_solutions:
    raise ValueError(
      f"{task.name} has no worked solutions to compare with. Set the levels of"
      " this check to ()."
    )
  rows, row_levels = [], []
  for level in levels:
    for i in range(problems_per_level):
      problem = task.problem(seed, i, level, "heldout")
      solution = task.worked_solution(problem)
      tokens, mask = chat.encode_turn(
        problem.prompt, solution.thinking, solution.answer
      )
      check_fits(len(tokens), row_length, f"a problem of {level=}")
      row = empty_row(row_length, chat.pad_id)
      row["tokens"][: len(tokens)] = tokens
      row["loss_mask"][: len(tokens)] = mask
      row["segment_ids"][: len(tokens)] = 1
      row["positions"][: len(tokens)] = np.arange(len(tokens))
      rows.append(row)
      row_levels.append(level)
  rows += [empty_row(row_length, chat.pad_id)] * (-len(rows) % batch_size)
  batches = [
    {
      key: np.stack([row[key] for row in rows[begin : begin + batch_size]])
      for key in rows[0]
    }
    for begin in range(0, len(rows), batch_size)
  ]
  return WorkedProblems(batches, row_levels)


def worked_accuracy(
  score_rows: ScoreRows, variables: Any, problems: WorkedProblems
) -> dict[str, float]:
  """Share of problems whose worked response is greedy token by token.

  Args:
    score_rows: from `make_score_rows`.
    variables: of the model.
    problems: from `worked_problems`.

  Returns:
    {"level/LEVEL/worked_accuracy": share}.
  """
  if not problems.levels:
    return {}
  exact = np.concatenate(
    [
      np.asarray(score_rows(variables, batch).exact)
      for batch in problems.batches
    ]
  )[: len(problems.levels)]
  levels = np.asarray(problems.levels)
  return {
    f"level/{level}/worked_accuracy": float(exact[levels == level].mean())
    for level in sorted(set(problems.levels))
  }
