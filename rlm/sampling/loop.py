"""The device side of the sampler: prefill, admit, and the decode loop.

Pure functions over `Slots`. Nothing here waits on the host: `decode_tokens`
runs as many steps as it may in one `lax.while_loop` and leaves early when
enough rows have ended. A step first draws from the state left by the last one
and then feeds the token, so that also the last token of a row has gone through
the model and has its routes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from rlm.kernels.product import einsum
from rlm.models.cache import TokenCache
from rlm.models.layer_stacks import join_layers, split_layers
from rlm.models.transformer import Transformer, head_kernel
from rlm.sampling.draw import request_uniforms

# (logits float32 [B, V], uniforms float32 [B]) -> tokens [B], logprobs [B]
Draw = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class Slots:
  """What each of the B slots remembers between steps.

  Attributes:
    cache: TokenCache of B rows.
    hidden: cfg.dtype [B, D], after the final norm; predicts the next token.
    key_data: uint32 [B, 2], the key of each request.
    index: int32 [B], tokens drawn so far.
    live: bool [B]; False for a row that has ended or was never filled.
  """

  cache: TokenCache
  hidden: jax.Array
  key_data: jax.Array
  index: jax.Array
  live: jax.Array


class Prefilled(NamedTuple):
  """A block of R prompts ready to enter slots, each as often as wanted."""

  cache: TokenCache  # capacity of the slots
  hidden: jax.Array  # cfg.dtype [R, D], at the last token of each prompt
  expert_ids: jax.Array  # int32 [L_moe, R, P, K]


class Drawn(NamedTuple):
  """What one call of `decode_tokens` drew; rows from `steps` on are unset."""

  tokens: jax.Array  # int32 [n, B], pad where the row was not live
  logprobs: jax.Array  # float32 [n, B], 0 there
  expert_ids: jax.Array  # int32 [n, L_moe, B, K], routes of `tokens`
  steps: jax.Array  # int32 [], steps taken
  finite: jax.Array  # bool [], every logit of live rows was; else it stopped


def next_token_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
  """float32 [B, V] of hidden [B, D] and head [D, V], both of one dtype."""
  return einsum("BD,DV->BV", hidden, head)


def empty_slots(model: Transformer, slots: int, capacity: int) -> Slots:
  """B slots without requests, for `capacity` tokens each, prompt included."""
  c = model.cfg
  return Slots(
    cache=TokenCache.empty(c, slots, capacity),
    hidden=jnp.zeros((slots, c.hidden_size), c.dtype),
    key_data=jnp.zeros((slots, 2), jnp.uint32),
    index=jnp.zeros((slots,), jnp.int32),
    live=jnp.zeros((slots,), bool),
  )


def prefill(
  model: Transformer,
  variables: Any,
  tokens: jax.Array,
  lengths: jax.Array,
  capacity: int,
) -> Prefilled:
  """Runs R prompts through the expanded form.

  Args:
    model: the Transformer.
    variables: its variables.
    tokens: int32 [R, P], left-aligned.
    lengths: int32 [R]; 0 for a row that holds no prompt.
    capacity: tokens that the cache has room for, prompt included.
  """
  positions = jnp.broadcast_to(
    jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
  )
  segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
  hidden, cache, expert_ids = model.apply(
    variables, tokens, positions, segment_ids, method="prefill"
  )
  last = jnp.maximum(lengths - 1, 0)
  hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  return Prefilled(cache.extend(capacity), hidden, expert_ids)


def admit(
  slots: Slots, prefilled: Prefilled, rows: jax.Array, key_data: jax.Array
) -> Slots:
  """Puts requests into slots.

  Args:
    slots: donate them.
    prefilled: the prompts.
    rows: int32 [B], the prompt that each slot receives; -1 leaves a slot alone.
    key_data: uint32 [B, 2], of the requests; read where rows >= 0.
  """
  taken = rows >= 0
  hidden = jnp.take(prefilled.hidden, jnp.maximum(rows, 0), axis=0)
  return Slots(
    cache=slots.cache.replace_rows(prefilled.cache, rows),
    hidden=jnp.where(taken[:, None], hidden, slots.hidden),
    key_data=jnp.where(taken[:, None], key_data, slots.key_data),
    index=jnp.where(taken, 0, slots.index),
    live=slots.live | taken,
  )


def decode_tokens(
  model: Transformer,
  variables: Any,
  slots: Slots,
  max_steps: jax.Array,
  min_live: jax.Array,
  *,
  draw: Draw,
  max_new_tokens: int,
  buffer_steps: int,
  stop_tokens: tuple[int, ...],
  pad_token: int,
) -> tuple[Slots, Drawn]:
  """Draws tokens for all live rows until told to stop.

  Args:
    model: the Transformer.
    variables: its variables.
    slots: donate them.
    max_steps: int32 [], at most `buffer_steps`.
    min_live: int32 [], goes on while at least so many rows are live: 1 runs to
      the end of the last one, B to the first end.
    draw: what to draw with.
    max_new_tokens: length at which a row ends without a stop token.
    buffer_steps: n, steps whose results the call has room for.
    stop_tokens: ids that end a row, drawn and kept themselves.
    pad_token: id reported for, and fed to, rows that are not live.
  """
  c = model.cfg
  batch = slots.index.shape[0]
  stops = jnp.array(stop_tokens, jnp.int32)
  # Once a call and not once a step, since XLA leaves what does not change in
  # a loop where it finds it. Ids not in use are cut off.
  head = head_kernel(variables, c)[:, : c.n_vocab_used].astype(c.dtype)
  head = model.shard.matrices({"head": head}, c.dtype)["head"]
  layers = split_layers(variables)
  uniforms = jax.vmap(request_uniforms, in_axes=(None, 0))(
    slots.key_data,
    slots.index[None] + jnp.arange(buffer_steps, dtype=jnp.int32)[:, None],
  )

  def goes_on(slots, drawn):
    enough = slots.live.sum(dtype=jnp.int32) >= min_live
    going = (drawn.steps < max_steps) & enough & drawn.finite
    # Devices that need each other's weights or experts stop together.
    return model.shard.any_device(going)

  def step(carry):
    slots, drawn, _ = carry
    live = slots.live
    logits = next_token_logits(slots.hidden, head)
    finite = jnp.isfinite(logits).all(axis=1) | ~live
    tokens, logprobs = draw(logits, uniforms[drawn.steps])
    tokens = jnp.where(live, tokens, pad_token)
    logprobs = jnp.where(live, logprobs, 0.0)
    hidden, cache, expert_ids = model.apply(
      join_layers(layers), tokens[:, None], slots.cache, method="decode"
    )
    # A row that is not live rewrites one entry for ever, and never grows.
    lengths = jnp.where(live, cache.lengths, slots.cache.lengths)
    index = slots.index + live
    stopped = (tokens[:, None] == stops[None]).any(axis=1)
    i = drawn.steps
    slots = Slots(
      cache=cache.replace(lengths=lengths),
      hidden=hidden[:, 0],
      key_data=slots.key_data,
      index=index,
      live=live & ~stopped & (index < max_new_tokens),
    )
    drawn = Drawn(
      tokens=drawn.tokens.at[i].set(tokens),
      logprobs=drawn.logprobs.at[i].set(logprobs),
      expert_ids=drawn.expert_ids.at[i].set(expert_ids[:, :, 0]),
      steps=i + 1,
      finite=drawn.finite & finite.all(),
    )
    return slots, drawn, goes_on(slots, drawn)

  routes = (buffer_steps, c.num_moe_layers, batch, c.num_experts_per_tok)
  drawn = Drawn(
    tokens=jnp.full((buffer_steps, batch), pad_token, jnp.int32),
    logprobs=jnp.zeros((buffer_steps, batch), jnp.float32),
    expert_ids=jnp.zeros(routes, jnp.int32),
    steps=jnp.int32(0),
    finite=jnp.bool_(True),
  )
  start = (slots, drawn, goes_on(slots, drawn))
  slots, drawn, _ = jax.lax.while_loop(lambda carry: carry[2], step, start)
  return slots, drawn
