"""What forward passes of its own tell about an RL run, every so many steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlm.kernels.product import einsum
from rlm.models.transformer import Transformer, head_kernel


def make_diagnostics(
  model: Transformer, *, temperature: float
) -> Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]:
  """MTP as a speculative drafter.

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
    `rlm.train.split_microbatches`; none for a model without MTP modules.  Jit
    it.
  """
  cfg = model.cfg

  def one(variables, batch):
    """Sum of the overlaps, and how many; along the sampler's routes."""
    rows = (batch["tokens"], batch["positions"], batch["segment_ids"])
    hidden, _ = model.apply(
      variables, *rows, batch["expert_ids"].swapaxes(0, 1)
    )
    states, _ = model.apply(variables, hidden, *rows, method="mtp")
    drafted = batch["loss_mask"][:, 2:]  # no draft for a row's second token
    overlap = _overlap(variables, hidden[:, 1:-1], states[0][:, :-2])
    return (
      jnp.where(drafted, overlap, 0.0).sum(),
      drafted.sum().astype(jnp.float32),
    )

  def _overlap(variables, hidden, drafts):
    """float32 [B, T] of sum_v min(p, q); a row at a time, as [T, V] is big."""
    head = head_kernel(variables, cfg)[:, : cfg.n_vocab_used]
    head = model.shard.matrices({"head": head}, cfg.dtype)["head"]

    def probs(states):
      logits = einsum("TD,DV->TV", states, head.astype(states.dtype))
      return jax.nn.softmax(logits / temperature, axis=-1)

    return jax.lax.map(
      lambda pair: jnp.minimum(probs(pair[0]), probs(pair[1])).sum(axis=-1),
      (hidden, drafts),
    )

  def diagnostics(variables, batch):
    if not cfg.num_nextn_predict_layers:
      return {}
    arrays = {k: v for k, v in batch.items() if k != "num_live"}
    total, count = jax.lax.map(
      lambda microbatch: one(variables, microbatch), arrays
    )
    total, count = (model.shard.sum_tokens(x.sum()) for x in (total, count))
    return {"mtp_acceptance": total / jnp.maximum(count, 1.0)}

  return diagnostics
