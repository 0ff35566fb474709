"""Three small models that between them have every part, and packed rows.

They also run in different ways (scan or straight-line code, remat policy, query
chunks); one reference holds for all.

Sizes differ from each other wherever they may, so that a swapped axis is an
error of shape and not a silent one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlm.models.config import YarnScaling
from rlm.models.transformer import Transformer
from tests.fast_jit import fast_jit
from tests.models import reference
from tests.tiny_model import tiny_config

YARN = YarnScaling(
  factor=4.0,
  original_max_position_embeddings=16,
  beta_fast=2.0,
  beta_slow=1.0,
  mscale=0.8,
  mscale_all_dim=1.2,
)

COMMON = dict(
  n_vocab_used=22,
  rope_theta=10.0,
  num_attention_heads=3,
  kv_lora_rank=7,
  qk_nope_head_dim=6,
  qk_rope_head_dim=8,
  v_head_dim=5,
)
FAMILIES = {
  "v3": dict(
    COMMON,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    q_lora_rank=9,
    rope_scaling=YARN,
    num_nextn_predict_layers=2,
    remat="none",
    unroll_layers=False,
    attention_chunk=0,
  ),
  "v2": dict(
    COMMON,
    num_hidden_layers=2,
    first_k_dense_replace=0,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_shared_experts=2,
    n_group=3,
    topk_group=2,
    topk_method="group_limited_greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=1.5,
    q_lora_rank=None,
    tie_word_embeddings=True,
    num_nextn_predict_layers=0,
    remat="dots",
    unroll_layers=True,
    attention_chunk=0,
  ),
  "dense": dict(
    COMMON,
    num_hidden_layers=2,
    first_k_dense_replace=2,
    moe_intermediate_size=0,
    n_routed_experts=0,
    num_experts_per_tok=0,
    n_shared_experts=0,
    q_lora_rank=None,
    num_nextn_predict_layers=1,
    remat="block",
    unroll_layers=False,
    attention_chunk=1,
  ),
}

# (row, first position, length) of each document in three rows of seven
# tokens; row 2 is padding alone.
DOCUMENTS = ((0, 0, 3), (0, 3, 4), (1, 0, 5))
SHAPE = (3, 7)


def model_of(name, **changes):
  return Transformer(tiny_config(**{**FAMILIES[name], **changes}))


@functools.cache
def variables_of(name, std=0.4):
  """Normal matrices, norms about 1, biases that change what is chosen."""
  row = jnp.ones((1, 4), jnp.int32)
  init = model_of(name).init
  shapes = jax.eval_shape(init, jax.random.key(0), row, row, row)
  rng = np.random.default_rng(5)

  def draw(path, leaf):
    x = std * rng.standard_normal(leaf.shape)
    if path[-1].key == "scale":
      x = 1 + 0.5 * x
    return x.astype(leaf.dtype)

  return jax.tree.map_with_path(draw, shapes)


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def packed_rows():
  """tokens (no id twice, so that an id tells its cell), positions, segments."""
  tokens = np.arange(1, 22, dtype=np.int32).reshape(SHAPE)
  positions, segments = np.zeros((2, *SHAPE), np.int32)
  for number, (row, start, length) in enumerate(DOCUMENTS):
    cells = slice(start, start + length)
    positions[row, cells] = np.arange(length)
    segments[row, cells] = number + 1
  return tokens, positions, segments


def whole_rows():
  """The same tokens as three documents of seven."""
  tokens, _, _ = packed_rows()
  positions = np.broadcast_to(np.arange(SHAPE[1], dtype=np.int32), SHAPE)
  return tokens, positions, np.ones(SHAPE, np.int32)


def predicts(depth):
  """bool [depth, B, T]: where depth k reads tokens of its own document."""
  mask = np.zeros((depth, *SHAPE), bool)
  for k in range(depth):
    for row, start, length in DOCUMENTS:
      mask[k, row, start : start + max(length - 1 - k, 0)] = True
  return mask


def no_cotangents(cfg):
  """Weights of the scalar that `differentiate` takes the gradient of."""
  depth = cfg.num_nextn_predict_layers
  return {
    "hidden": np.zeros((*SHAPE, cfg.hidden_size), np.float32),
    "mtp": np.zeros((depth, *SHAPE, cfg.hidden_size), np.float32),
    "balance": np.zeros((cfg.num_moe_layers, SHAPE[0]), np.float32),
    "mtp_balance": np.zeros(
      (0 if cfg.is_dense else depth, SHAPE[0]), np.float32
    ),
  }


@functools.cache
def differentiate(name, **changes):
  """(variables, rows, cotangents) -> outputs, gradients, compiled once.

  outputs: hidden, routing, and with MTP mtp_hidden, mtp_routing. gradients:
  of the sum of outputs times cotangents, in the tree of the variables.
  """
  model = model_of(name, **changes)

  def scalar(variables, rows, cotangents):
    hidden, routing = model.apply(variables, *rows)
    outputs = {"hidden": hidden, "routing": routing}
    total = (hidden * cotangents["hidden"]).sum()
    total += (routing.balance_loss * cotangents["balance"]).sum()
    if model.cfg.num_nextn_predict_layers:
      mtp_hidden, mtp_routing = model.apply(
        variables, hidden, *rows, method="mtp"
      )
      outputs |= {"mtp_hidden": mtp_hidden, "mtp_routing": mtp_routing}
      total += (mtp_hidden * cotangents["mtp"]).sum()
      total += (mtp_routing.balance_loss * cotangents["mtp_balance"]).sum()
    return total, outputs

  grad = fast_jit(jax.value_and_grad(scalar, has_aux=True))

  def call(variables, rows, cotangents):
    (_, outputs), gradients = grad(variables, rows, cotangents)
    return jax.device_get((outputs, gradients))

  return call


def reference_rows(variables, cfg, tokens, replayed=None):
  """The reference over each document of the packed rows, on their grid.

  Returns:
    hidden [B, T, D]; ids [L, B, T, K], -1 outside documents; mtp_hidden
    [depth, B, T, D]; balance_loss of layers [L, B] and of depths [depth, B].
  """
  layers, depth = cfg.num_moe_layers, cfg.num_nextn_predict_layers
  hidden = np.zeros((*SHAPE, cfg.hidden_size))
  ids = -np.ones((layers, *SHAPE, cfg.num_experts_per_tok), int)
  mtp_hidden = np.zeros((depth, *SHAPE, cfg.hidden_size))
  # Per layer, then per depth, then row: scores of its tokens.
  scores = [[[] for _ in range(SHAPE[0])] for _ in range(layers + depth)]
  for row, start, length in DOCUMENTS:
    cells = slice(start, start + length)
    given = None if replayed is None else replayed[:, row, cells]
    out = reference.forward(variables, tokens[row, cells], cfg, given)
    hidden[row, cells] = out.hidden
    for k, h in enumerate(out.mtp_hidden):
      mtp_hidden[k, row, start : start + len(h)] = h
    for i in range(layers):
      ids[i, row, cells] = out.ids[i]
      scores[i][row].extend(out.scores[i])
    for k, s in enumerate(out.mtp_scores):
      scores[layers + k][row].extend(s)
  balance = [
    [reference.balance_loss(np.array(s), cfg.num_experts_per_tok) for s in rows]
    for rows in scores
  ]
  balance = np.array(balance).reshape(layers + depth, SHAPE[0])
  if cfg.is_dense:  # has no losses of either kind
    balance = np.zeros((0, SHAPE[0]))
  return hidden, ids, mtp_hidden, balance[:layers], balance[layers:]
