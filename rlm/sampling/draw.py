"""One token per row from one uniform number per row.

A row's number depends on its request's key and the token's index alone, never
on its slot or its neighbours, and there is one of it: inverting the cumulative
distribution costs B random numbers where Gumbel noise costs B * V.
"""

import math

import jax
import jax.numpy as jnp

from rlm.kernels.product import einsum


def request_uniforms(key_data: jax.Array, index: jax.Array) -> jax.Array:
  """The uniform number of token `index` of each request.

  Args:
    key_data: uint32 [B, 2], threefry keys (`jax.random.key_data`).
    index: int32 [B], tokens already drawn for the request.

  Returns:
    float32 [B] in [0, 1).
  """
  keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
  return jax.vmap(
    lambda key, i: jax.random.uniform(jax.random.fold_in(key, i))
  )(keys, index)


def draw_tokens(
  logits: jax.Array, uniforms: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Draws from softmax(logits) by inverting its cumulative distribution.

  The vocabulary is cut into about sqrt(V) blocks: first the block, then the
  token in it. A token of probability zero is never drawn, whatever rounding
  does to the sums.

  Args:
    logits: float32 [B, V], at least one of each row finite.
    uniforms: float32 [B] in [0, 1).

  Returns:
    tokens int32 [B] and their log-probs float32 [B].
  """
  rows, vocab = logits.shape
  width = 1 << (math.isqrt(vocab).bit_length())  # of a block
  blocks = -(-vocab // width)
  top = logits.max(axis=-1, keepdims=True)
  weights = jnp.exp(logits - top)
  weights = jnp.pad(weights, [(0, 0), (0, blocks * width - vocab)])
  weights = weights.reshape(rows, blocks, width)
  block_weights = weights.sum(axis=-1)
  total = block_weights.sum(axis=-1)
  block, rest = _pick(block_weights, uniforms * total)
  inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
  token, _ = _pick(inside, rest)
  token += block * width
  logprobs = _gather(logits, token) - top[:, 0] - jnp.log(total)
  return token, logprobs


def argmax_tokens(logits: jax.Array) -> jax.Array:
  """The likeliest token, the lowest id among ties; float32 [B, V] -> int32 [B].

  As a max and a min, which XLA vectorises on the CPU, as it does not its
  argmax.
  """
  return _first(logits == logits.max(axis=-1, keepdims=True))


def _first(hits):
  """Index of the first True of each row, V if there is none."""
  ids = jnp.arange(hits.shape[-1], dtype=jnp.int32)[None]
  return jnp.min(jnp.where(hits, ids, hits.shape[-1]), axis=-1)


def _gather(values, ids):
  return jnp.take_along_axis(values, ids[:, None], axis=-1)[:, 0]


def _pick(weights, target):
  """First index whose running sum passes `target`, and what is left of it."""
  n = weights.shape[-1]
  sums = einsum("Bi,ij->Bj", weights, jnp.triu(jnp.ones((n, n), jnp.float32)))
  ids = jnp.arange(n, dtype=jnp.int32)[None]
  # If rounding put the target past the end, the first token that has weight.
  order = jnp.where(sums > target[:, None], ids, ids + n)
  picked = jnp.min(jnp.where(weights > 0, order, 2 * n), axis=-1) % n
  before = _gather(sums, picked) - _gather(weights, picked)
  return picked, jnp.maximum(target - before, 0.0)
