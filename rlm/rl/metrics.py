"""What a step of RL tells about itself, on the host."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlm.rl.rollout import Rollout


def rollout_metrics(
  rollout: Rollout, tied: np.ndarray
) -> dict[str, float | int | None]:
  """Rewards, accuracy and lengths of the completions of one step.

  Args:
    rollout: scored.
    tied: bool [P], groups whose rewards are all equal.

  Returns:
    reward/mean, reward/std and reward/NAME (before its weight); accuracy and
    accuracy_given_format; steps_correct; response_length/mean and /finished in
    tokens; truncated, the share that ran out of tokens; zero_std_groups, the
    share of prompts without signal; level/K/accuracy of each level drawn;
    tokens, those that went through the sampler, a prompt once for its group.
    None where there is nothing to take a mean of.
  """
  correct = rollout.verdicts("correct")
  well_formed = rollout.verdicts("well_formed")
  rewards, lengths = rollout.rewards, rollout.lengths
  levels = rollout.levels
  group_size = len(lengths) // len(tied)
  return {
    "reward/mean": float(rewards.mean()),
    "reward/std": float(rewards.std()),
    **{f"reward/{k}": v for k, v in rollout.reward_means().items()},
    "accuracy": float(correct.mean()),
    "accuracy_given_format": _mean(correct[well_formed]),
    "steps_correct": float(rollout.verdicts("steps_correct").mean()),
    "response_length/mean": float(lengths.mean()),
    "response_length/finished": _mean(lengths[rollout.finished]),
    "truncated": float((~rollout.finished).mean()),
    "zero_std_groups": float(np.mean(tied)),
    **{
      f"level/{level}/accuracy": float(correct[levels == level].mean())
      for level in sorted(set(levels.tolist()))
    },
    "tokens": int(rollout.prompt_lengths[::group_size].sum() + lengths.sum()),
  }


def level_success(rollout: Rollout) -> dict[int, float]:
  """Share of correct completions at each level drawn, for the curriculum."""
  correct, levels = rollout.verdicts("correct"), rollout.levels
  return {
    level: float(correct[levels == level].mean())
    for level in sorted(set(levels.tolist()))
  }


def _mean(values: np.ndarray) -> float | None:
  return float(values.mean()) if len(values) else None


def combine_updates(updates: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Metrics of a step's updates as one record.

  Args:
    updates: metrics of each minibatch, numpy or numbers; may be empty, where
      no group had a signal.

  Returns:
    By name: the maximum of those that end in "/max", the minimum of "/min", the
    mean of the others, all over the updates that were finite if any was; and
    the sum of `nonfinite`.  Empty for no updates.
  """
  if not updates:
    return {}
  finite = [update for update in updates if not update["nonfinite"]]
  combined = {}
  for name in updates[0]:
    chosen = updates if name == "nonfinite" else finite or updates
    values = np.stack([np.asarray(update[name]) for update in chosen])
    if name.endswith("/max"):
      combined[name] = values.max(axis=0)
    elif name.endswith("/min"):
      combined[name] = values.min(axis=0)
    elif name == "nonfinite":
      combined[name] = values.sum(axis=0)
    else:
      combined[name] = values.mean(axis=0)
  return combined
