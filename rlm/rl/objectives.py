"""Policy-gradient objectives, as rows of one table.

Every row maximises a clipped surrogate of the ratio pi_theta / pi_old times a
group-relative advantage, less a k3 KL to a reference (DeepSeekMath,
2402.03300, eq. 3-4):

  min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) - kl_weight k3

The rows differ in where the ratio is taken (each token, or the whole output)
and in how terms are averaged.  The averaging is a float32 [B, T] array of
weights, `token_weights`, made once over the *global* batch of an update: the
loss is then a plain weighted sum, so that values and gradients do not depend
on how the batch is cut into microbatches or on padding.

Log-prob arrays are aligned with their targets: `logprobs[b, t]` is that of
`tokens[b, t]`; entries outside the completion mask are ignored.
"""

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlm.rl.advantages import ADVANTAGES
from rlm.rl.config import ObjectiveConfig

# exp() of a float32 overflows at 88, and the log-ratio of a whole output is a
# sum over its tokens that may well pass it; inf then turns gradients to NaN.
# Log-ratios are capped here *from above*, value and gradient (zero beyond):
# ratios stay below 4.9e8, far outside any clip range, and exp of a very
# negative log-ratio is an exact, harmless 0.  Capping (rather than letting the
# linear term of k3 through) never leaves a gradient of the wrong sign.
LOG_RATIO_CAP = 20.0


@dataclasses.dataclass(frozen=True)
class Objective:
  """One row of the table; hashable, so that jit can close over it.

  Attributes:
    advantage: a row of `rlm.rl.advantages.ADVANTAGES`.
    ratio_level: "token", pi_theta/pi_old of each token; or "sequence", of the
      whole output, exp(sum of the tokens' log-ratios).  The KL is taken at the
      same level.
    clip_low: ratios below 1 - clip_low stop moving completions with A < 0.
    clip_high: ratios above 1 + clip_high stop moving those with A > 0.
    aggregation: how terms are averaged, see `token_weights`.
    kl: a row of `KL_ESTIMATORS`.
    kl_weight: beta; 0 needs no reference.
  """

  advantage: Literal["group_std", "group_mean"]
  ratio_level: Literal["token", "sequence"]
  clip_low: float
  clip_high: float
  aggregation: Literal["sequence_mean", "token_mean", "constant_length"]
  kl: Literal["k3"]
  kl_weight: float


OBJECTIVES = {
  # DeepSeekMath (2402.03300) section 4: per-token ratio, 1/|o_i| inside each
  # output, KL 0.04.  Its clip range is not published; 0.2 is PPO's.
  "grpo": Objective(
    advantage="group_std",
    ratio_level="token",
    clip_low=0.2,
    clip_high=0.2,
    aggregation="sequence_mean",
    kl="k3",
    kl_weight=0.04,
  ),
  # R1 (2501.12948) eq. 1-3: pi(o_i|q) is that of the whole output, so there
  # is no 1/|o_i|; the mean over a row of a term that its tokens share is that
  # term.  Clip 10 and KL 0.001 are those of R1's first RL stage; 1 - 10 < 0,
  # so only the upper side ever binds.
  "grpo_r1": Objective(
    advantage="group_std",
    ratio_level="sequence",
    clip_low=10.0,
    clip_high=10.0,
    aggregation="sequence_mean",
    kl="k3",
    kl_weight=0.001,
  ),
  # Dr. GRPO (2503.20783): no std, and a constant in place of 1/|o_i|, so that
  # long wrong answers are not punished less per token.
  "dr_grpo": Objective(
    advantage="group_mean",
    ratio_level="token",
    clip_low=0.2,
    clip_high=0.2,
    aggregation="constant_length",
    kl="k3",
    kl_weight=0.0,
  ),
  # DAPO (2503.14476): clip-higher, every token of the batch alike, no KL.
  "dapo": Objective(
    advantage="group_std",
    ratio_level="token",
    clip_low=0.2,
    clip_high=0.28,
    aggregation="token_mean",
    kl="k3",
    kl_weight=0.0,
  ),
}


def make_objective(cfg: ObjectiveConfig) -> Objective:
  """The row that a config names, with the config's changes."""
  changes = {
    key: getattr(cfg, key)
    for key in ("clip_low", "clip_high", "kl_weight")
    if getattr(cfg, key) is not None
  }
  return dataclasses.replace(OBJECTIVES[cfg.name], **changes)


def token_weights(
  aggregation: str, mask: jax.Array, *, constant_length: int
) -> jax.Array:
  """Weight of each token's term in the loss of one update.

  With N the rows that have any masked token (rows added to fill a batch have
  none, and count nowhere) and |o_i| the masked tokens of row i:

    sequence_mean    1 / (N |o_i|)      mean over outputs of the mean inside
    token_mean       1 / sum_i |o_i|    every token of the batch alike
    constant_length  1 / (N L)          L the same for all outputs

  Args:
    aggregation: one of the three.
    mask: bool [B, T] over the global batch of the update; True on completion
      tokens, EOS included.
    constant_length: L in tokens, the longest completion allowed; used by
      "constant_length" only.

  Returns:
    float32 [B, T], zero outside the mask.
  """
  chex.assert_rank(mask, 2)
  ones = mask.astype(jnp.float32)
  lengths = ones.sum(axis=1, keepdims=True)
  # maximum(): a batch without a token has weights 0, not 0/0.
  num_rows = jnp.maximum((lengths > 0).sum().astype(jnp.float32), 1.0)
  if aggregation == "sequence_mean":
    return ones / jnp.maximum(lengths, 1.0) / num_rows
  if aggregation == "token_mean":
    return ones / jnp.maximum(lengths.sum(), 1.0)
  if aggregation == "constant_length":
    return ones / (num_rows * constant_length)
  raise ValueError(
    f"unknown {aggregation=}. Take sequence_mean, token_mean or"
    " constant_length."
  )


def k3(log_ratio: jax.Array) -> jax.Array:
  """exp(x) - x - 1 for x = log pi_ref - log pi_theta; never negative.

  The estimator of KL(pi_theta || pi_ref) of DeepSeekMath eq. 4, at samples of
  pi_theta, in nats.  expm1 keeps it exact where the two nearly agree.

  Args:
    log_ratio: float32, any shape; capped at `LOG_RATIO_CAP` from above.

  Returns:
    float32 of the same shape.
  """
  log_ratio = jnp.minimum(log_ratio, LOG_RATIO_CAP)
  return jnp.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k3": k3}


def policy_loss(
  objective: Objective,
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  ref_logprobs: jax.Array | None,
  advantages: jax.Array,
  mask: jax.Array,
  weights: jax.Array,
  metric_weights: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """This microbatch's share of the loss (to minimise) and of the metrics.

  Shares of the microbatches of one update add up to the loss of the update,
  except `ratio/max` and `ratio/min`, of which take the maximum and minimum.

  Args:
    objective: a row of the table.
    logprobs: float32 [B, T], under the policy; gradients flow here only.
    old_logprobs: float32 [B, T], under the policy that sampled.
    ref_logprobs: float32 [B, T], under the reference; None leaves out the KL,
      from loss and metrics, and needs kl_weight 0.
    advantages: float32 [B], one per output, shared by its tokens.
    mask: bool [B, T], True on completion tokens.
    weights: float32 [B, T] of `token_weights` for this objective.
    metric_weights: float32 [B, T] of `token_weights("token_mean", ...)`.

  Returns:
    loss, float32 []; and metrics, float32 [] each: loss/policy; the shares of
    completion tokens whose gradient the clip removes, clip_fraction/low and
    clip_fraction/high; ratio/max and ratio/min at the objective's level; and,
    given a reference, kl (per token, whatever the level of the loss) and
    loss/kl (before kl_weight).
  """
  chex.assert_equal_shape([logprobs, old_logprobs, mask, weights])
  chex.assert_shape(advantages, (logprobs.shape[0],))
  per_output = objective.ratio_level == "sequence"
  log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
  term_weights, live = weights, mask
  if per_output:  # one term per output, [B, 1], weighing as all its tokens
    log_ratio = log_ratio.sum(axis=1, keepdims=True)
    term_weights = weights.sum(axis=1, keepdims=True)
    live = mask.any(axis=1, keepdims=True)
  adv = advantages[:, None]
  ratio = jnp.exp(jnp.minimum(log_ratio, LOG_RATIO_CAP))
  low, high = 1.0 - objective.clip_low, 1.0 + objective.clip_high
  surrogate = jnp.minimum(ratio * adv, jnp.clip(ratio, low, high) * adv)
  loss = -(term_weights * surrogate).sum()

  clipped_low = live & (ratio < low) & (adv < 0)
  clipped_high = live & (ratio > high) & (adv > 0)
  metrics = {
    "loss/policy": loss,
    "clip_fraction/low": (metric_weights * clipped_low).sum(),
    "clip_fraction/high": (metric_weights * clipped_high).sum(),
    "ratio/max": jnp.where(live, ratio, -jnp.inf).max(),
    "ratio/min": jnp.where(live, ratio, jnp.inf).min(),
  }
  if ref_logprobs is None:
    if objective.kl_weight > 0:
      raise ValueError(
        f"kl_weight={objective.kl_weight} needs reference log-probs; got None."
      )
    return loss, metrics
  estimate_kl = KL_ESTIMATORS[objective.kl]
  ref_log_ratio = jnp.where(mask, ref_logprobs - logprobs, 0.0)
  metrics["kl"] = (metric_weights * estimate_kl(ref_log_ratio)).sum()
  if per_output:
    ref_log_ratio = ref_log_ratio.sum(axis=1, keepdims=True)
  kl_loss = (term_weights * estimate_kl(ref_log_ratio)).sum()
  metrics["loss/kl"] = kl_loss
  return loss + objective.kl_weight * kl_loss, metrics


# A row that names no estimator would only fail after the first rollout.
assert all(
  row.advantage in ADVANTAGES and row.kl in KL_ESTIMATORS
  for row in OBJECTIVES.values()
)
