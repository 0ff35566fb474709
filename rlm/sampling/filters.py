"""Temperature, top-k and top-p: pure functions over logits.

Each keeps the shape and sets what it removes to -inf, so that a log-softmax of
the result is the distribution sampled from. The k-th logit and the edge of the
nucleus are found by bisection over the float32 numbers, in 32 halvings, and not
by sorting, which on a CPU takes longer than the model.

Tokens tied with the last one kept are all kept: which of them came first would
be an accident of their ids.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Key (see `_sort_keys`) of -inf, below that of every other logit.
_LOWEST = np.array(-np.inf, np.float32).view(np.int32) ^ np.int32(0x7FFFFFFF)


def scale_logits(logits: jax.Array, temperature: float) -> jax.Array:
  """Logits of the tempered distribution, p^(1 / temperature) renormalised.

  Args:
    logits: float32 [B, V].
    temperature: above 0; 0 (greedy) is no distribution over logits.
  """
  return logits / jnp.float32(temperature)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
  """Removes all but the k largest logits of each row, and ties of the k-th.

  Args:
    logits: float32 [B, V].
    k: at least 1; from V on nothing is removed.
  """
  return _keep_heaviest(logits, jnp.ones_like(logits), k)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
  """Nucleus: the fewest likeliest tokens whose probabilities reach p.

  Holtzman et al., arXiv:1904.09751. The token that crosses `p` is kept, so at
  least one is.

  Args:
    logits: float32 [B, V].
    p: in (0, 1].
  """
  return _keep_heaviest(logits, jax.nn.softmax(logits, axis=-1), p)


def filter_logits(
  logits: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> jax.Array:
  """Temperature, then top-k, then top-p of what is left.

  Args:
    logits: float32 [B, V]; ids that cannot be drawn are -inf.
    temperature: above 0.
    top_k: tokens kept; 0 keeps all.
    top_p: probability kept; 1 keeps all.

  Returns:
    float32 [B, V], -inf where removed.
  """
  logits = scale_logits(logits, temperature)
  if top_k:
    logits = keep_top_k(logits, top_k)
  if top_p < 1:
    logits = keep_top_p(logits, top_p)
  return logits


def _sort_keys(x: jax.Array) -> jax.Array:
  """int32 that order as the float32 `x` do."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _keep_heaviest(logits, weights, need):
  """Keeps logits >= t for the largest t whose `weights` sum to `need`."""
  keys = _sort_keys(logits)

  def halve(_, bounds):
    low, high = bounds  # enough weight at low, too little at high
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    weight = jnp.sum(jnp.where(keys >= middle, weights, 0.0), -1, keepdims=True)
    enough = weight >= need
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  high = keys.max(axis=-1, keepdims=True) + 1
  bounds = jnp.full_like(high, _LOWEST), high
  threshold, _ = jax.lax.fori_loop(0, 32, halve, bounds)
  return jnp.where(keys >= threshold, logits, -jnp.inf)
