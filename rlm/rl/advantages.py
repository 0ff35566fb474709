"""Group-relative advantages: how much better a completion did than its peers.

The G completions of one prompt are adjacent rows; rewards are float32 [B] with
B = P * G. `ADVANTAGES` is what the objectives table names.
"""

import chex
import jax
import jax.numpy as jnp


def _grouped(rewards, group_size):
  """float32 [B] -> [P, G], with the error of a batch that does not split."""
  chex.assert_rank(rewards, 1)
  if rewards.shape[0] % group_size:
    raise ValueError(
      f"{rewards.shape[0]} completions do not split into groups of"
      f" {group_size=}. Make batch_size a multiple of group_size."
    )
  return rewards.reshape(-1, group_size)


def group_advantages(
  rewards: jax.Array, group_size: int, *, eps: float
) -> jax.Array:
  """Group-relative advantages, (r_i - mean) / (std + eps); R1 eq. 3.

  Departure: `eps` is ours; the paper's std is zero when all rewards tie.

  Args:
    rewards: float32 [B], one per completion, the G of a prompt adjacent.
    group_size: G, completions per prompt.
    eps: added to the std, in units of reward.

  Returns:
    float32 [B]; mean zero in each group; near zero where one ties.

  Raises:
    ValueError: B is not a multiple of `group_size`.
  """
  r_PG = _grouped(rewards, group_size)
  adv_PG = r_PG - r_PG.mean(axis=1, keepdims=True)
  return (adv_PG / (r_PG.std(axis=1, keepdims=True) + eps)).reshape(-1)


def centered_advantages(
  rewards: jax.Array, group_size: int, *, eps: float
) -> jax.Array:
  """r_i - mean, without the division by the std; Dr. GRPO (2503.20783).

  Dividing by the std gives prompts that are almost always or almost never
  solved a larger weight; this estimator does not.

  Args:
    rewards: float32 [B], one per completion, the G of a prompt adjacent.
    group_size: G, completions per prompt.
    eps: unused; there is no std to guard. Taken so that every row of
      `ADVANTAGES` is called alike.

  Returns:
    float32 [B], in units of reward; mean zero in each group.

  Raises:
    ValueError: B is not a multiple of `group_size`.
  """
  del eps
  r_PG = _grouped(rewards, group_size)
  return (r_PG - r_PG.mean(axis=1, keepdims=True)).reshape(-1)


def tied_groups(rewards: jax.Array, group_size: int) -> jax.Array:
  """Which prompts teach nothing, because all their rewards are equal.

  Compared exactly, not through the advantages: the mean of equal rewards may
  differ from them by a rounding, which the division by eps would magnify.

  Args:
    rewards: float32 [B], one per completion, the G of a prompt adjacent.
    group_size: G, completions per prompt.

  Returns:
    bool [P], True where max == min.

  Raises:
    ValueError: B is not a multiple of `group_size`.
  """
  r_PG = _grouped(rewards, group_size)
  return r_PG.max(axis=1) == r_PG.min(axis=1)


ADVANTAGES = {
  "group_std": group_advantages,
  "group_mean": centered_advantages,
}


def advantages_of(
  name: str, rewards: jax.Array, group_size: int, *, eps: float
) -> jax.Array:
  """The estimator `name` of `ADVANTAGES`, with tied groups exactly zero.

  Args:
    name: a row of `ADVANTAGES`.
    rewards: float32 [B], one per completion, the G of a prompt adjacent.
    group_size: G, completions per prompt.
    eps: added to the std where the estimator has one.

  Returns:
    float32 [B].

  Raises:
    ValueError: B is not a multiple of `group_size`.
  """
  advantages = ADVANTAGES[name](rewards, group_size, eps=eps)
  tied = jnp.repeat(tied_groups(rewards, group_size), group_size)
  return jnp.where(tied, 0.0, advantages)
