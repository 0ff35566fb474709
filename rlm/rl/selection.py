"""Which rows of a rollout the update learns from, and in which minibatches.

Groups whose rewards all tie have zero advantage: they cost a forward and a
backward pass and give no gradient.  DAPO resamples them; here a fixed number
of the other rows is kept, so that every update has one shape.
"""

import jax
import numpy as np

from rlm.rl.config import SelectionConfig
from rlm.rl.objectives import Objective, token_weights
from rlm.rl.rollout import Rollout


def split_rows(
  cfg: SelectionConfig, tied: np.ndarray, group_size: int, key: jax.Array
) -> list[np.ndarray]:
  """Indices of the rows of each minibatch, at random; a function of `key`.

  Rows are shuffled and dealt out in turn, so that when few remain every
  minibatch gets as many as any other, give or take one.

  Args:
    cfg: how many.
    tied: bool [P], groups without signal; see `tied_groups`.
    group_size: G.
    key: of this step's split.

  Returns:
    One int array per minibatch, of at most rows_per_minibatch rows; minibatches
    without any row are left out, so that a rollout without signal gives [].
  """
  usable = np.ones(len(tied) * group_size, bool)
  if cfg.rows == "untied":
    usable = np.repeat(~np.asarray(tied), group_size)
  order = np.asarray(jax.random.permutation(key, len(usable)))
  chosen = order[usable[order]][: cfg.rows_per_rollout]
  dealt = [chosen[i :: cfg.num_minibatches] for i in range(cfg.num_minibatches)]
  return [rows for rows in dealt if len(rows)]


def make_minibatch(
  rollout: Rollout,
  advantages: np.ndarray,
  rows: np.ndarray,
  objective: Objective,
  *,
  num_rows: int,
  max_new_tokens: int,
) -> dict[str, np.ndarray]:
  """The batch of one update: chosen rows, then padding rows of zero weight.

  Args:
    rollout: where the rows come from.
    advantages: float32 [B] of the whole rollout.
    rows: int [n], which rows; n <= num_rows.
    objective: says how tokens are weighed.
    num_rows: rows of the batch.
    max_new_tokens: the longest completion, L of "constant_length".

  Returns:
    Arrays that lead with num_rows: tokens, positions, segment_ids int32 [., T];
    loss_mask bool [., T], the completions; advantages float32 [.];
    sampler_logprobs, weights, metric_weights float32 [., T]; expert_ids int32
    [., L, T, K].  Weights are those of this whole update.
  """
  length = rollout.tokens.shape[1]

  def take(x):
    padding = [(0, num_rows - len(rows))] + [(0, 0)] * (x.ndim - 1)
    return np.pad(x[rows], padding)

  ends = take(rollout.prompt_lengths + rollout.lengths)
  place = np.arange(length, dtype=np.int32)[None]
  mask = take(rollout.completion_mask)

  def weigh(aggregation):
    weights = token_weights(aggregation, mask, constant_length=max_new_tokens)
    return np.asarray(weights)

  return {
    "tokens": take(rollout.tokens),
    "positions": np.broadcast_to(place, (num_rows, length)).copy(),
    "segment_ids": (place < ends[:, None]).astype(np.int32),
    "loss_mask": mask,
    "advantages": take(np.asarray(advantages, np.float32)),
    "sampler_logprobs": take(rollout.sampler_logprobs),
    "weights": weigh(objective.aggregation),
    "metric_weights": weigh("token_mean"),
    "expert_ids": take(rollout.expert_ids.swapaxes(0, 1)),
  }
