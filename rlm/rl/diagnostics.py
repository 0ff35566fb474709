"""What one extra forward pass tells about an RL run, every so many steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlm.kernels.product import einsum
from rlm.models.transformer import Transformer, head_kernel


def route_flips(
  expert_ids: jax.Array, replayed: jax.Array, mask: jax.Array
) -> jax.Array:
  """How many (layer, token) pairs chose another set of experts.

  Args:
    expert_ids: int32 [L, B, T, K], chosen freely.
    replayed: int32 [L, B, T, K], the sampler's.
    mask: bool [B, T], tokens that count.

  Returns:
    float32 [].
  """
  same = jnp.sort(expert_ids, axis=-1) == jnp.sort(replayed, axis=-1)
  return (~same.all(axis=-1) & mask[None]).sum().astype(jnp.float32)


def make_diagnostics(
  model: Transformer, *, temperature: float
) -> Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]:
  """Free routing against replayed, and MTP as a speculative drafter.

  route_flip_rate is the share of (MoE layer, token) whose freely chosen set of
  experts differs from the one that the sampler reported.

  mtp_acceptance is the chance that a speculative decoder accepts the draft of
  the first MTP module at the sampling temperature: the mean over completion
  tokens of sum_v min(p(v), q(v)), with p the model's distribution of that
  token and q the module's, one token earlier (Leviathan et al., 2211.17192,
  eq. 3).  Unlike the agreement of two argmaxes it is what a decoder that
  samples would measure; unlike counting accepted drafts it has no noise.

  Args:
    model: the Transformer.
    temperature: as sampled.

  Returns:
    (variables, batch) -> metrics, over arrays [M, b, ...] of
    `rlm.train.split_microbatches`; either metric only where the model has
    experts, or MTP modules.  Jit it.
  """
  cfg = model.cfg

  def one(variables, batch):
    rows = (batch["tokens"], batch["positions"], batch["segment_ids"])
    hidden, routing = model.apply(variables, *rows)
    sums = {}
    if cfg.num_moe_layers:
      seen = batch["segment_ids"] > 0
      sums["route_flip_rate"] = (
        route_flips(
          routing.expert_ids, batch["expert_ids"].swapaxes(0, 1), seen
        ),
        seen.sum() * jnp.float32(cfg.num_moe_layers),
      )
    if cfg.num_nextn_predict_layers:
      states, _ = model.apply(variables, hidden, *rows, method="mtp")
      drafted = batch["loss_mask"][:, 2:]  # no draft for a row's second token
      overlap = _overlap(
        variables, hidden[:, 1:-1], states[0][:, :-2], temperature
      )
      sums["mtp_acceptance"] = (
        jnp.where(drafted, overlap, 0.0).sum(),
        drafted.sum().astype(jnp.float32),
      )
    return sums

  def _overlap(variables, hidden, drafts, temperature):
    """float32 [B, T] of sum_v min(p, q); a row at a time, as [T, V] is big."""
    head = head_kernel(variables, cfg)[:, : cfg.n_vocab_used]

    def probs(states):
      logits = einsum("TD,DV->TV", states, head.astype(states.dtype))
      return jax.nn.softmax(logits / temperature, axis=-1)

    return jax.lax.map(
      lambda pair: jnp.minimum(probs(pair[0]), probs(pair[1])).sum(axis=-1),
      (hidden, drafts),
    )

  def diagnostics(variables, batch):
    arrays = {k: v for k, v in batch.items() if k != "num_live"}
    sums = jax.lax.map(lambda microbatch: one(variables, microbatch), arrays)
    return {
      name: total.sum() / jnp.maximum(count.sum(), 1.0)
      for name, (total, count) in sums.items()
    }

  return diagnostics
