"""How evenly the experts work, layer by layer: load, MaxVio and bias.

Pure functions over what the step already has, to be called in the jitted step
once the loads of all microbatches and devices are joined. No name ends in
"/max" or "/min", which would name a reduction across microbatches.
"""

from typing import Any

import jax
import jax.numpy as jnp


def load_metrics(name: str, load: jax.Array | None) -> dict[str, jax.Array]:
  """Each expert's share of its layer's tokens, and how far from even it is.

  MaxVio is that of the aux-loss-free paper (arXiv:2408.15664), (max - mean) /
  mean of a batch's counts: 0 is perfect balance, E / K - 1 the worst. An expert
  that gets nothing shows in min_over_mean.

  Args:
    name: prefix of the metrics.
    load: float32 [L, E], tokens sent to each expert over the global batch; or
      None.

  Returns:
    {name: [L, E] shares, name/max_over_mean, name/min_over_mean and
    name/max_violation: [L]}, float32; empty without experts, and zeros for a
    layer without tokens.
  """
  if load is None or not load.size:
    return {}
  total = load.sum(axis=1, keepdims=True)
  share = load / jnp.maximum(total, 1.0)
  busiest = share.max(axis=1) * load.shape[1]
  return {
    name: share,
    f"{name}/max_over_mean": busiest,
    f"{name}/min_over_mean": share.min(axis=1) * load.shape[1],
    f"{name}/max_violation": jnp.where(total[:, 0] > 0, busiest - 1, 0),
  }


def bias_metrics(name: str, bias: jax.Array | None) -> dict[str, jax.Array]:
  """Where the expert bias of each layer stands; V3 section 2.1.2.

  A constant added to a whole layer's bias changes no choice, so that `std`,
  against scores between 0 and 1, says how much the bias decides.

  Args:
    name: prefix of the metrics.
    bias: float32 [L, E]; or None.

  Returns:
    {name/mean, name/std, name/lowest, name/highest}, float32 [L]; empty
    without experts.
  """
  if bias is None or not bias.size:
    return {}
  return {
    f"{name}/mean": bias.mean(axis=1),
    f"{name}/std": bias.std(axis=1),
    f"{name}/lowest": bias.min(axis=1),
    f"{name}/highest": bias.max(axis=1),
  }


def router_metrics(router: Any) -> dict[str, jax.Array]:
  """`bias_metrics` of the `router` collection, MTP's under mtp_.

  Args:
    router: Flax's collection `router`, stacked per kind of layer; empty for a
      dense model.

  Returns:
    expert_bias/... and mtp_expert_bias/..., float32 [L] each.
  """
  metrics: dict[str, jax.Array] = {}
  if "moe_layers" in router:
    bias = router["moe_layers"]["ffn"]["expert_bias"]
    metrics |= bias_metrics("expert_bias", bias)
  if "mtp_modules" in router:
    bias = router["mtp_modules"]["block"]["ffn"]["expert_bias"]
    metrics |= bias_metrics("mtp_expert_bias", bias)
  return metrics
