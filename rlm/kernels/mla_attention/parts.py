"""Parts of one softmax, computed apart over disjoint keys, joined exactly."""

import jax
import jax.numpy as jnp


def join_parts(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Attention over all keys from attention over parts of them.

  out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i).

  Args:
    outs: float32 [parts, B, T, N, h].
    lses: float32 [parts, B, N, T]; -inf where a part holds no key of a query.

  Returns:
    out float32 [B, T, N, h], zeros for a query that no part has keys of; lse
    float32 [B, N, T], -inf there.
  """
  top = lses.max(axis=0)
  finite = jnp.where(jnp.isneginf(top), 0.0, top)
  weights = jnp.exp(lses - finite[None])  # [parts, B, N, T]
  total = weights.sum(axis=0)
  safe = jnp.where(total > 0, total, 1.0)
  weights = (weights / safe[None]).swapaxes(2, 3)[..., None]
  lse = jnp.where(total > 0, jnp.log(safe) + finite, -jnp.inf)
  return (weights * outs).sum(axis=0), lse
