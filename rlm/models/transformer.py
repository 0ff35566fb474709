"""The Transformer: embedding, stacked blocks, final norm, head, MTP.

One definition for training, prefill, decode and published checkpoints. The
parameters of each kind of layer (dense, MoE, MTP) are stacked on a leading
axis; whether layers run in a scan or unrolled never changes the tree.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlm.kernels.product import einsum
from rlm.models.block import Block
from rlm.models.cache import TokenCache
from rlm.models.config import ModelConfig
from rlm.models.layers import (
  ATTENTION_OUTPUT,
  Embedding,
  RMSNorm,
  normal_init,
  parameter,
)
from rlm.models.moe import Routing, update_expert_bias
from rlm.models.mtp import MTPModule, next_inputs, reads_own_segment
from rlm.models.rope import rope_rotations
from rlm.parallel.shard import WHOLE, Whole

Variables = Any  # Flax's {"params": tree, "router": tree}


def _remat(body, policy: str, *, unrolled: bool):
  """Wraps a layer body: body(module, carry, xs) -> carry, ys."""
  if policy == "none":
    return body
  policies = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(
      ATTENTION_OUTPUT
    ),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  }
  # In straight-line code XLA would find the forward pass's values again and
  # recompute nothing; a loop hides them from it.
  return nn.remat(body, prevent_cse=unrolled, policy=policies[policy])


class Transformer(nn.Module):
  """DeepSeek-V2/V3, or a Qwen or Llama (`cfg` says). See the methods.

  Variables: `params`, and `router` with the expert biases, float32 [L, E],
  which no gradient touches.

  Attributes:
    cfg: sizes.
    shard: where the model is one device's part of a larger one, inside a
      shard_map (`rlm.parallel.shard`): its rows, tokens and heads, pieces of
      its matrices, some of its experts.
  """

  cfg: ModelConfig
  shard: Whole = WHOLE

  def setup(self):
    c, shard = self.cfg, self.shard
    self.embed = Embedding(c, shard)
    if c.first_k_dense_replace:
      self.dense_layers = self._of_whole_matrices(Block)(c, False, shard)
    if c.num_moe_layers:
      self.moe_layers = self._of_whole_matrices(Block)(c, True, shard)
    self.final_norm = RMSNorm(c)
    if not c.tie_word_embeddings:
      shape = (c.hidden_size, c.vocab_size)
      self.head = parameter(self, "head", normal_init(c), shape)
    if c.num_nextn_predict_layers:
      self.mtp_modules = self._of_whole_matrices(MTPModule)(c, shard)

  def _of_whole_matrices(self, module):
    """The module's class, whose matrices are made whole where it is called.

    That is inside a scan's body and inside what is recomputed, so that one
    layer's matrices are whole at a time.
    """
    if not self.shard.gathers:
      return module
    return nn.map_variables(
      module,
      "params",
      trans_in_fn=lambda collection: {
        name: self.shard.matrices(tree, self.cfg.dtype)
        for name, tree in collection.items()
      },
      methods=["__call__", "decode"] if module is Block else ["__call__"],
    )

  def _scan(self, body, module, length, carry, xs, *, unroll=False):
    """Runs `body` over a stack of `length` layers; xs and ys lead with it."""
    c = self.cfg
    unrolled = c.unroll_layers or unroll
    scanned = nn.scan(
      _remat(body, c.remat, unrolled=unrolled),
      variable_axes={"params": 0, "router": 0},
      split_rngs={"params": True},
      length=length,
      unroll=length if unrolled else 1,
    )
    return scanned(module, carry, xs)

  def _rotations(self, positions):
    c = self.cfg
    return rope_rotations(positions, c.rope_dim, c.rope_theta, c.rope_scaling)

  def _layers(self, x, dense_body, moe_body, dense_xs, moe_xs, *, unroll=False):
    """All blocks in order; returns x, per-layer entries [L, ...], Routing."""
    c = self.cfg
    entries, routing = [], _no_routing(c, x)
    if c.first_k_dense_replace:
      x, (entry, _) = self._scan(
        dense_body,
        self.dense_layers,
        c.first_k_dense_replace,
        x,
        dense_xs,
        unroll=unroll,
      )
      entries.append(entry)
    if c.num_moe_layers:
      x, (entry, routing) = self._scan(
        moe_body, self.moe_layers, c.num_moe_layers, x, moe_xs, unroll=unroll
      )
      entries.append(entry)
    entries = jax.tree.map(lambda *e: jnp.concatenate(e), *entries)
    return x, entries, routing

  def _expanded(self, tokens, positions, segment_ids, expert_ids):
    rotations = self._rotations(positions)

    def body(block, x, ids):
      return block(x, rotations, positions, segment_ids, ids)

    x = self.embed(tokens)
    x, entries, routing = self._layers(x, body, body, None, expert_ids)
    return self.final_norm(x), entries, routing

  def __call__(self, tokens, positions, segment_ids, expert_ids=None):
    """Training form.

    Args:
      tokens: int32 [B, T].
      positions: int32 [B, T], within each segment.
      segment_ids: int32 [B, T]; tokens see their own segment; 0 is padding.
      expert_ids: int32 [L_moe, B, T, K] to replay routes, or None.

    Returns:
      hidden: cfg.dtype [B, T, D], after the final norm.
      routing: Routing of the MoE layers, leading axis L_moe (0 if dense).
    """
    hidden, _, routing = self._expanded(
      tokens, positions, segment_ids, expert_ids
    )
    if self.is_initializing() and self.cfg.num_nextn_predict_layers:
      self.mtp(hidden, tokens, positions, segment_ids)
    return hidden, routing

  @nn.nowrap
  def logits(self, variables, tokens, segment_ids=None):
    """Scores of every next token, for analysis; jitted, and all at once.

    Training and sampling never make this array: see `rlm.losses`.

    Args:
      variables: of this model.
      tokens: int32 [B, T].
      segment_ids: int32 [B, T], 0 is padding; None is one segment a row.
        Positions count from the start of each segment.

    Returns:
      float32 [B, T, V]; -inf for ids not in use.

    Raises:
      ValueError: tokens are not [B, T], or longer than the context.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    context = self.cfg.max_position_embeddings
    if tokens.ndim != 2 or tokens.shape[1] > context:
      raise ValueError(
        f"tokens have shape {tokens.shape}; [rows, at most {context} tokens]"
        " (max_position_embeddings) are needed."
      )
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    # Rows of any length: chunks, which save memory in training, must divide.
    model = Transformer(dataclasses.replace(self.cfg, attention_chunk=0))
    return _logits(model, variables, tokens, jnp.asarray(segment_ids))

  def states(self, tokens, positions, segment_ids):
    """The residual stream after every layer, for analysis.

    `model.apply(variables, x, method=lambda m, x: m.final_norm(x))` and the
    head turn a state into logits, as if it were the last.

    Args:
      tokens: int32 [B, T].
      positions: int32 [B, T], within each segment.
      segment_ids: int32 [B, T]; 0 is padding.

    Returns:
      states: cfg.dtype [L, B, T, D], before the final norm.
      routing: Routing of the MoE layers, as `__call__` gives it.
    """
    rotations = self._rotations(positions)

    def body(block, x, ids):
      x, (_, routing) = block(x, rotations, positions, segment_ids, ids)
      return x, (x, routing)

    x = self.embed(tokens)
    _, states, routing = self._layers(x, body, body, None, None)
    return states, routing

  def mtp(self, hidden, tokens, positions, segment_ids):
    """States that predict the tokens after the next; V3 eq. 21-23.

    Args:
      hidden: [B, T, D] of `__call__`, after the final norm.
      tokens: int32 [B, T].
      positions: int32 [B, T].
      segment_ids: int32 [B, T].

    Returns:
      mtp_hidden: [depth, B, T, D]; depth k at position t predicts
        tokens[t + 2 + k]. Where that lies in another segment the state is
        meaningless and the caller's loss leaves it out.
      routing: Routing with leading axis `depth`; its load and balance count the
        positions whose input lies in their own segment.

    Raises:
      ValueError: the model has no MTP modules.
    """
    c = self.cfg
    depth = c.num_nextn_predict_layers
    if not depth:
      raise ValueError(
        "This model has no MTP modules. Set num_nextn_predict_layers to 1."
      )
    rotations = self._rotations(positions)

    def body(module, hidden, xs):
      embedded, counted = xs
      hidden, routing = module(
        hidden, embedded, rotations, positions, segment_ids, counted
      )
      return hidden, (hidden, routing)

    # Outside the scan: what a lifted body closes over cannot make parameters.
    own, whole = self.shard.own_tokens, self.shard.whole_rows
    embedded = self.embed(own(next_inputs(whole(tokens), depth), 2))
    counted = own(reads_own_segment(whole(segment_ids), depth), 2)
    _, (states, routing) = self._scan(
      body, self.mtp_modules, depth, hidden, (embedded, counted)
    )
    return states, _no_routing(c, hidden) if c.is_dense else routing

  def prefill(self, tokens, positions, segment_ids):
    """As training, and keeps what decode needs, for left-aligned prompts.

    Args:
      tokens: int32 [B, T]; row b is a prompt in its first tokens.
      positions: int32 [B, T].
      segment_ids: int32 [B, T], 1 for the prompt and 0 after it.

    Returns:
      hidden [B, T, D]; TokenCache of capacity T; expert_ids int32
      [L_moe, B, T, K].
    """
    hidden, layers, routing = self._expanded(
      tokens, positions, segment_ids, None
    )
    lengths = (segment_ids != 0).sum(axis=1, dtype=jnp.int32)
    return hidden, TokenCache(tuple(layers), lengths), routing.expert_ids

  def decode(self, tokens, cache: TokenCache):
    """One new token a row over the cache, at position `cache.lengths`.

    Args:
      tokens: int32 [B, 1].
      cache: with room for one more token in each row that matters; a full row
        writes nothing.

    Returns:
      hidden [B, 1, D]; the cache with the token added; expert_ids int32
      [L_moe, B, 1, K].
    """
    k = self.cfg.first_k_dense_replace
    rotations = self._rotations(cache.lengths[:, None])
    segment_ids = jnp.ones_like(tokens)

    def body(block, x, layer):
      return block.decode(x, rotations, layer, cache.lengths, segment_ids)

    # Always unrolled, so that a layer's cache is updated in place: XLA undoes
    # the stacks below. A scan would copy every cache through its outputs.
    x, layers, routing = self._layers(
      self.embed(tokens),
      body,
      body,
      jnp.stack(cache.layers[:k]) if k else None,
      jnp.stack(cache.layers[k:]) if self.cfg.num_moe_layers else None,
      unroll=True,
    )
    cache = TokenCache(tuple(layers), cache.lengths + 1)
    return self.final_norm(x), cache, routing.expert_ids


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, variables, tokens, segment_ids):
  c = model.cfg
  place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
  start = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
  hidden, _ = model.apply(variables, tokens, place - start, segment_ids)
  head = head_kernel(variables, c).astype(hidden.dtype)
  logits = einsum("BTD,DV->BTV", hidden, head)
  used = jnp.arange(c.vocab_size) < c.n_vocab_used
  return jnp.where(used[None, None], logits, -jnp.inf)


def _no_routing(cfg: ModelConfig, x: jax.Array) -> Routing:
  """The Routing of no layers, for dense models."""
  b, t = x.shape[:2]
  experts = max(cfg.n_routed_experts, 1)
  return Routing(
    expert_ids=jnp.zeros((0, b, t, cfg.num_experts_per_tok), jnp.int32),
    expert_load=jnp.zeros((0, experts), jnp.float32),
    balance_loss=jnp.zeros((0, b), jnp.float32),
    flips=jnp.zeros((0, b, t), bool),
    dropped=jnp.zeros((0,), jnp.float32),
  )


def head_kernel(variables: Variables, cfg: ModelConfig) -> jax.Array:
  """The head [D, V], shared with MTP; the embedding's transpose if tied."""
  params = variables["params"]
  if cfg.tie_word_embeddings:
    return params["embed"]["embedding"].T
  return params["head"]


def update_router(
  router: Any, expert_load: jax.Array, mtp_load: jax.Array, rate
) -> Any:
  """One aux-loss-free step of every expert bias.

  Args:
    router: the `router` collection; empty for a dense model.
    expert_load: float32 [L_moe, E], tokens over the global batch.
    mtp_load: float32 [depth, E], of the MTP modules; None leaves theirs.
    rate: gamma.

  Returns:
    The new collection.
  """
  router = jax.tree.map(lambda x: x, dict(router))
  if "moe_layers" in router:
    bias = router["moe_layers"]["ffn"]["expert_bias"]
    bias = update_expert_bias(bias, expert_load, rate)
    router["moe_layers"] = {"ffn": {"expert_bias": bias}}
  if "mtp_modules" in router and mtp_load is not None:
    bias = router["mtp_modules"]["block"]["ffn"]["expert_bias"]
    bias = update_expert_bias(bias, mtp_load, rate)
    router["mtp_modules"] = {"block": {"ffn": {"expert_bias": bias}}}
  return router
