"""Next-token, multi-token-prediction and balance losses over packed rows.

Every loss here is a *sum* of terms that already carry their share of the
global batch: `global_weights` divides by the number of targets in the whole
batch before it is split, so that any split into microbatches adds up to the
same value and gradient.  A mean inside each microbatch would not: rows hold
unequal numbers of targets.

Logits never exist for all tokens and all ids at once when `chunk` is set:
`token_logprobs` walks over the vocabulary, joins the softmax of its parts and
recomputes each part in the backward pass.

In this file N counts tokens (rows times positions), V ids.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlm.kernels.product import einsum
from rlm.kernels.recomputed import map_recomputed
from rlm.models.moe import Routing
from rlm.models.transformer import Transformer, head_kernel
from rlm.parallel.shard import WHOLE, Whole

Batch = dict[str, Any]  # arrays by name


class Aux(NamedTuple):
  """What a loss reports beside its value; all of it adds over microbatches.

  Attributes:
    metrics: scalars by name.  Names that end in "/max" or "/min" are reduced
      by maximum and minimum instead.
    expert_load: float32 [L, E], tokens sent to each expert of each MoE layer.
    mtp_expert_load: float32 [depth, E], the same in the MTP modules; None
      where the loss does not run them, which leaves their bias as it is.
    choices: float32 [2] of `count_choices`.
  """

  metrics: dict[str, jax.Array]
  expert_load: jax.Array
  mtp_expert_load: jax.Array | None
  choices: jax.Array


LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Aux]]


def count_choices(routing: Routing) -> jax.Array:
  """Choices of an expert by a token, padding too: the dropped ones, and all.

  Args:
    routing: with a leading axis of layers.

  Returns:
    float32 [2].
  """
  total = jnp.float32(routing.expert_ids.size)
  return jnp.stack([routing.dropped.sum(), total])


class _Softmax(NamedTuple):
  """Softmax over some ids, each float32 [N], or [parts, N] of parts of them."""

  top: jax.Array  # largest logit
  total: jax.Array  # sum of exp(logit - top)
  mean: jax.Array  # sum of exp(logit - top) * (logit - top)
  target: jax.Array  # the target's logit, 0 if it is of other ids


def _softmax_of(
  logits: jax.Array, first_id: jax.Array, targets: jax.Array
) -> _Softmax:
  """Of the logits [N, c] of the ids first_id, first_id + 1, ..."""
  # The result does not depend on `top`, so no gradient needs to pass it.
  top = jax.lax.stop_gradient(logits.max(axis=1))
  shifted = logits - top[:, None]
  mass = jnp.exp(shifted)
  ids = first_id + jnp.arange(logits.shape[1], dtype=jnp.int32)
  # Compare instead of gather: its transpose is no scatter, and it fuses.
  is_target = ids[None, :] == targets[:, None]
  return _Softmax(
    top=top,
    total=mass.sum(axis=1),
    mean=(mass * shifted).sum(axis=1),
    target=jnp.where(is_target, logits, 0.0).sum(axis=1),
  )


def _joined(parts: _Softmax) -> _Softmax:
  """Over the ids of all parts; [parts, N] -> [N]."""
  top = parts.top.max(axis=0)
  shift = parts.top - top[None]
  mass = jnp.exp(shift)
  return _Softmax(
    top=top,
    total=(parts.total * mass).sum(axis=0),
    mean=((parts.mean + shift * parts.total) * mass).sum(axis=0),
    target=parts.target.sum(axis=0),
  )


def _softmax(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  *,
  n_vocab_used: int,
  temperature: float | jax.Array,
  chunk: int,
  shard: Whole,
) -> _Softmax:
  """Of hidden @ head over the ids in use; target -inf where it is not one."""
  chex.assert_rank([hidden, head, targets], [2, 2, 1])
  if not 0 < n_vocab_used <= head.shape[1]:
    raise ValueError(
      f"{n_vocab_used=} does not fit a head of {head.shape[1]} ids. Give the"
      " number of ids that the tokenizer uses."
    )
  if chunk < 0:
    raise ValueError(
      f"{chunk=} is negative. Give the ids per vocabulary chunk, or 0 for the"
      " whole vocabulary at once."
    )
  # Ids that no tokenizer produces are cut off, which masks them for nothing.
  head = head[:, :n_vocab_used].astype(hidden.dtype)

  def of_part(shared, part):
    hidden, targets, temperature = shared
    head_part, first_id = part
    matrix = shard.matrices({"head": head_part}, hidden.dtype)["head"]
    logits = einsum("ND,DV->NV", hidden, matrix) / temperature
    return _softmax_of(logits, first_id, targets)

  shared = (hidden, targets, jnp.asarray(temperature, jnp.float32))
  if chunk == 0 or chunk >= n_vocab_used:
    softmax = of_part(shared, (head, jnp.int32(0)))
  else:
    n_chunks = n_vocab_used // chunk
    whole = n_chunks * chunk
    # As parts, not as slices of a constant: the gradient of a slice is as
    # large as the head, once per chunk.
    chunks = head[:, :whole].reshape(-1, n_chunks, chunk).transpose((1, 0, 2))
    first_ids = jnp.arange(n_chunks, dtype=jnp.int32) * chunk
    parts = map_recomputed(of_part, shared, (chunks, first_ids))
    if whole < n_vocab_used:
      last = jax.checkpoint(of_part)(
        shared, (head[:, whole:], jnp.int32(whole))
      )
      parts = jax.tree.map(
        lambda x, y: jnp.concatenate([x, y[None]]), parts, last
      )
    softmax = _joined(parts)
  in_use = (targets >= 0) & (targets < n_vocab_used)
  return softmax._replace(target=jnp.where(in_use, softmax.target, -jnp.inf))


def token_logprobs(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  *,
  n_vocab_used: int,
  temperature: float | jax.Array,
  chunk: int,
  shard: Whole = WHOLE,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target, and the entropy it was drawn with.

  The distribution is softmax(hidden @ head / temperature) in float32 over the
  ids below `n_vocab_used`.

  Args:
    hidden: [N, D], after the final norm.
    head: [D, V].
    targets: int32 [N]; an id >= n_vocab_used has probability zero.
    n_vocab_used: ids that the tokenizer can produce; the rest are masked.
    temperature: divides the logits, > 0.
    chunk: ids per vocabulary chunk, which bounds memory by [N, chunk];
      0 takes the vocabulary whole.
    shard: of the model, on a mesh: `head` may then be a piece of its rows.

  Returns:
    logprobs float32 [N] and entropy float32 [N], in nats.

  Raises:
    ValueError: a static size or the temperature is out of range.
  """
  if isinstance(temperature, (int, float)) and temperature <= 0:
    raise ValueError(
      f"{temperature=} must be above 0. For greedy decoding use the sampler's"
      " setting; a log-probability needs a distribution."
    )
  softmax = _softmax(
    hidden,
    head,
    targets,
    n_vocab_used=n_vocab_used,
    temperature=temperature,
    chunk=chunk,
    shard=shard,
  )
  log_total = jnp.log(softmax.total)
  logprobs = softmax.target - softmax.top - log_total
  return logprobs, log_total - softmax.mean / softmax.total


def is_greedy(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  *,
  n_vocab_used: int,
  chunk: int,
  shard: Whole = WHOLE,
) -> jax.Array:
  """Whether each target has the largest logit; arguments as token_logprobs.

  Returns:
    bool [N]; of several equal logits each counts as the largest.
  """
  softmax = _softmax(
    hidden,
    head,
    targets,
    n_vocab_used=n_vocab_used,
    temperature=1.0,
    chunk=chunk,
    shard=shard,
  )
  return softmax.target >= softmax.top


def shift_targets(batch: Batch, offset: int) -> tuple[jax.Array, jax.Array]:
  """The token `offset` positions later, and where it is a target.

  A target counts where `loss_mask` is True at its own position, in the same
  segment as the position that predicts it, outside padding.

  Args:
    batch: tokens, segment_ids int32 [..., T]; loss_mask bool [..., T].
    offset: 1 for the next token, 2 + k for MTP depth k.

  Returns:
    targets int32 [..., T] (0 past the end) and mask bool [..., T].
  """

  def later(x):
    kept = x[..., offset:]
    pad = x.shape[-1] - kept.shape[-1]
    return jnp.pad(kept, [(0, 0)] * (x.ndim - 1) + [(0, pad)])

  segment_ids = batch["segment_ids"]
  same_segment = (later(segment_ids) == segment_ids) & (segment_ids > 0)
  return later(batch["tokens"]), later(batch["loss_mask"]) & same_segment


def own_targets(
  batch: Batch, offset: int, shard: Whole
) -> tuple[jax.Array, jax.Array]:
  """`shift_targets` of a shard's tokens, of which the last predict another's.

  Args:
    batch: tokens, segment_ids int32 [B, T]; loss_mask bool [B, T].
    offset: as there.
    shard: what holds the other tokens of the rows.

  Returns:
    targets int32 [B, T] and mask bool [B, T].
  """
  names = ("tokens", "segment_ids", "loss_mask")
  rows = {name: shard.whole_rows(batch[name]) for name in names}
  targets, mask = shift_targets(rows, offset)
  return shard.own_tokens(targets, 1), shard.own_tokens(mask, 1)


def global_weights(batch: Batch, *, mtp_depth: int) -> Batch:
  """Adds the weight of every target in the losses of the whole batch.

  Call it on all rows of a step, before they are split into microbatches.

  Args:
    batch: tokens, segment_ids int32 [..., T]; loss_mask bool [..., T], with
      any leading axes.
    mtp_depth: D, number of MTP modules.

  Returns:
    The batch and, each with sum 1 (0 where nothing is predicted):
      next_token_weights: float32 [..., T], at the position that predicts.
      mtp_weights: float32 [..., D, T]; sum 1 in each depth.
      row_weights: float32 [...], one per row that holds any token.
  """

  def share(mask, axes=None):
    count = mask.sum(axis=axes, keepdims=axes is not None)
    return mask / jnp.maximum(count, 1).astype(jnp.float32)

  mtp_masks = [shift_targets(batch, 2 + k)[1] for k in range(mtp_depth)]
  if mtp_depth:
    mtp_mask = jnp.stack(mtp_masks, axis=-2)
  else:
    *rows, length = batch["tokens"].shape
    mtp_mask = jnp.zeros((*rows, 0, length), bool)
  every_axis_but_depth = tuple(
    i for i in range(mtp_mask.ndim) if i != mtp_mask.ndim - 2
  )
  return {
    **batch,
    "next_token_weights": share(shift_targets(batch, 1)[1]),
    "mtp_weights": share(mtp_mask, every_axis_but_depth),
    "row_weights": share((batch["segment_ids"] > 0).any(axis=-1)),
  }


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
  """sum(values * weights), where a zero weight hides even an infinite value."""
  return jnp.where(weights > 0, values * weights, 0.0).sum()


def _gradients_together(variables, hidden):
  """The same; what the MTP modules give to either's gradient is one moment's.

  Nothing needs the modules' own gradients before the optimizer, so that XLA
  leaves them for last and keeps their operands, a layer's worth, through the
  backward pass of all layers.
  """
  params = variables["params"]
  modules, hidden = jax.lax.optimization_barrier(
    (params["mtp_modules"], hidden)
  )
  return {**variables, "params": {**params, "mtp_modules": modules}}, hidden


def make_pretrain_loss(
  model: Transformer, *, train_mtp: bool, balance_weight: float
) -> LossFn:
  """Next-token + MTP + sequence-wise balance loss; V3 eq. 17-20 and 24-25.

  loss = next_token + mtp_weight / D * sum_k mtp_k + balance_weight * balance,
  where mtp_k is the mean cross-entropy of depth k over the positions that
  have a target, and balance sums over MoE layers (those in the MTP modules
  too) the mean over rows of sum_i f_i P_i.

  Args:
    model: the Transformer; its cfg says depth, vocabulary and chunk.
    train_mtp: whether the MTP modules run; each batch then holds mtp_weight,
      lambda of eq. 25, float32 [], which may change in training.  Otherwise
      the term is absent.
    balance_weight: alpha of eq. 17.

  Returns:
    LossFn over batches of `global_weights`.  Metrics: loss/next_token,
    loss/mtp (mean over depths, 0 where they do not run) and loss/balance, all
    without their weights, and tokens (int32, padding excluded).

  Raises:
    ValueError: `train_mtp` for a model without MTP modules.
  """
  cfg, shard = model.cfg, model.shard
  depth = cfg.num_nextn_predict_layers
  if train_mtp and not depth:
    raise ValueError(
      "a loss with an mtp_weight needs MTP modules, and"
      " num_nextn_predict_layers is 0. Set mtp_weight to 0 or"
      " num_nextn_predict_layers to 1."
    )

  def cross_entropy(hidden, head, targets, weights):
    logprobs, _ = token_logprobs(
      hidden.reshape(-1, hidden.shape[-1]),
      head,
      targets.reshape(-1),
      n_vocab_used=cfg.n_vocab_used,
      temperature=1.0,
      chunk=cfg.logits_chunk,
      shard=shard,
    )
    return -weighted_sum(logprobs, weights.reshape(-1))

  def loss_fn(variables, batch, key):
    del key  # nothing here is random; RL and distillation share the type
    rows = (batch["tokens"], batch["positions"], batch["segment_ids"])
    head = head_kernel(variables, cfg)
    hidden, routing = model.apply(variables, *rows)
    next_token = cross_entropy(
      hidden, head, own_targets(batch, 1, shard)[0], batch["next_token_weights"]
    )
    balance = routing.balance_loss.sum(axis=0)  # [B]
    mtp = jnp.float32(0.0)
    mtp_load = None
    choices = count_choices(routing)
    loss = next_token
    if train_mtp:
      mtp_hidden, mtp_routing = model.apply(
        *_gradients_together(variables, hidden), *rows, method="mtp"
      )
      targets = [own_targets(batch, 2 + k, shard)[0] for k in range(depth)]
      mtp = (
        cross_entropy(
          mtp_hidden,
          head,
          jnp.stack(targets),
          batch["mtp_weights"].swapaxes(0, 1),
        )
        / depth
      )
      balance += mtp_routing.balance_loss.sum(axis=0)
      mtp_load = mtp_routing.expert_load
      choices += count_choices(mtp_routing)
      loss += batch["mtp_weight"] * mtp
    balance = weighted_sum(balance, batch["row_weights"])
    loss += balance_weight * balance
    metrics = {
      "loss/next_token": next_token,
      "loss/mtp": mtp,
      "loss/balance": balance,
      "tokens": (batch["segment_ids"] > 0).sum(dtype=jnp.int32),
    }
    return loss, Aux(metrics, routing.expert_load, mtp_load, choices)

  return loss_fn
