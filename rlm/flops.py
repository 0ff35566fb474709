"""Parameters and floating-point operations by formula, and MFU from them.

XLA's own count is of no use here: it counts the body of a scan once, and the
padded or masked work of an implementation as if it were the model's.  These
formulas count what the model needs, as published figures do.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from rlm.kernels.product import einsum
from rlm.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
  """Parameters of a model; expert biases, which are not trained, left out.

  Attributes:
    embedding: rows of the embedding.
    head: of the head, 0 where it is the embedding.
    layers: all layers and the final norm.
    activated_layers: of `layers`, those that one token uses.
    mtp: what the MTP modules add; embedding and head are shared.
    activated_mtp: of `mtp`, those that one token uses.
  """

  embedding: int
  head: int
  layers: int
  activated_layers: int
  mtp: int
  activated_mtp: int

  @property
  def total(self) -> int:
    """The model without MTP, as model sizes are quoted."""
    return self.embedding + self.head + self.layers

  @property
  def activated(self) -> int:
    """Those that one token uses, embedding and head included."""
    return self.embedding + self.head + self.activated_layers


@dataclasses.dataclass(frozen=True)
class Part:
  """Parameters of one kind in some layers.

  Attributes:
    total: all.
    activated: those that one token uses.
  """

  total: int
  activated: int

  def times(self, layers: int) -> "Part":
    """Of so many layers."""
    return Part(layers * self.total, layers * self.activated)


def count_parameters(cfg: ModelConfig) -> ParameterCounts:
  """Counts parameters by formula (sheet: V3 671.03B, 37.55B activated).

  Args:
    cfg: the model's sizes.
  """
  main, mtp = model_parts(cfg), mtp_parts(cfg)
  embedding, head = main.pop("embedding"), main.pop("head")
  return ParameterCounts(
    embedding=embedding.total,
    head=head.total,
    layers=sum(part.total for part in main.values()),
    activated_layers=sum(part.activated for part in main.values()),
    mtp=sum(part.total for part in mtp.values()),
    activated_mtp=sum(part.activated for part in mtp.values()),
  )


def model_parts(cfg: ModelConfig) -> dict[str, Part]:
  """Parameters of the model by kind, MTP modules apart.

  Kinds that this model lacks are there with 0.  The embedding counts as
  activated in full, as published figures have it, though a token reads one row.

  Args:
    cfg: the model's sizes.
  """
  c = cfg
  table = c.vocab_size * c.hidden_size
  dense, routed = layer_parts(c, routed=False), layer_parts(c, routed=True)
  head = 0 if c.tie_word_embeddings else table
  parts = {"embedding": Part(table, table), "head": Part(head, head)}
  for kind in dense:
    a = dense[kind].times(c.first_k_dense_replace)
    b = routed[kind].times(c.num_moe_layers)
    parts[kind] = Part(a.total + b.total, a.activated + b.activated)
  final_norm = c.hidden_size
  vectors = parts["norms and biases"]
  parts["norms and biases"] = Part(
    vectors.total + final_norm, vectors.activated + final_norm
  )
  return parts


def mtp_parts(cfg: ModelConfig) -> dict[str, Part]:
  """Parameters that the MTP modules add, by kind; empty without modules.

  Args:
    cfg: the model's sizes.
  """
  depth, d = cfg.num_nextn_predict_layers, cfg.hidden_size
  if not depth:
    return {}
  block = layer_parts(cfg, routed=not cfg.is_dense)
  block["projection"] = Part(2 * d * d, 2 * d * d)
  norms = block["norms and biases"].total + 3 * d
  block["norms and biases"] = Part(norms, norms)
  return {kind: part.times(depth) for kind, part in block.items()}


def layer_parts(cfg: ModelConfig, *, routed: bool) -> dict[str, Part]:
  """Parameters of one block by kind.

  Args:
    cfg: the model's sizes.
    routed: whether its feed-forward is a mixture of experts.
  """
  c, d = cfg, cfg.hidden_size
  attention, vectors = _attention(c)
  dense = 0 if routed else 3 * d * c.intermediate_size
  expert = 3 * d * c.moe_intermediate_size if routed else 0
  router = d * c.n_routed_experts if routed else 0
  shared = c.n_shared_experts * expert
  norms = vectors + 2 * d
  return {
    "attention": Part(attention, attention),
    "dense feed-forward": Part(dense, dense),
    "routed experts": Part(
      c.n_routed_experts * expert, c.num_experts_per_tok * expert
    ),
    "shared experts": Part(shared, shared),
    "router": Part(router, router),
    "norms and biases": Part(norms, norms),
  }


def _attention(c: ModelConfig) -> tuple[int, int]:
  """Parameters of a layer's attention: matrices, and its norms and biases."""
  d, n = c.hidden_size, c.num_attention_heads
  if not c.has_latent_attention:
    keys = c.num_key_value_heads * c.rope_dim
    queries = n * c.rope_dim
    biases = queries + 2 * keys if c.qkv_bias else 0
    norms = 2 * c.rope_dim if c.qk_norm else 0
    return 2 * d * (queries + keys), biases + norms
  qk_head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
  norms = c.kv_lora_rank
  if c.q_lora_rank is None:
    query = d * n * qk_head_dim
  else:
    query = c.q_lora_rank * (d + n * qk_head_dim)
    norms += c.q_lora_rank
  kv_down = d * (c.kv_lora_rank + c.qk_rope_head_dim)
  kv_up = c.kv_lora_rank * n * (c.qk_nope_head_dim + c.v_head_dim)
  return query + kv_down + kv_up + n * c.v_head_dim * d, norms


def train_flops_per_token(
  cfg: ModelConfig, row_length: int, *, mtp: bool
) -> float:
  """Operations of forward and backward pass, per token of a full row.

  6 per activated parameter that multiplies (the embedding does not), plus
  causal attention, 3 N (H + R + h) T per layer, H + R and h being the widths of
  a key and a value: each token reads T / 2 others on average.  V3 at T = 4096:
  250.5 GFLOP, the 250 that its authors quote (arXiv:2505.09343, table 2),
  without MTP.

  Args:
    cfg: the model's sizes.
    row_length: T; packed rows of isolated documents need less.
    mtp: whether the MTP modules are trained too; each runs the head again.
  """
  return 3 * forward_flops_per_token(cfg, row_length, mtp=mtp)


def forward_flops_per_token(
  cfg: ModelConfig, row_length: int, *, mtp: bool
) -> float:
  """Operations of the expanded form, forward only; see the training count."""
  by_part = forward_flops_by_part(cfg, row_length, mtp=mtp)
  return float(sum(by_part.values()))


def forward_flops_by_part(
  cfg: ModelConfig, row_length: int, *, mtp: bool
) -> dict[str, int]:
  """Forward operations per token of a full row, by part of the model.

  The backward pass takes twice as many: each product has two gradients.

  Args:
    cfg: the model's sizes.
    row_length: T.
    mtp: whether the MTP modules run too.

  Returns:
    Kinds as in `model_parts`, the embedding's lookup left out; "attention
    scores", the products of queries with keys and of their softmax with values;
    "MTP modules" whole, if they run: blocks, projections, and the head again.
  """
  by_part = {
    kind: 2 * part.activated
    for kind, part in model_parts(cfg).items()
    if kind != "embedding"
  }
  # A head that is the embedding has no parameters, and works all the same.
  by_part["head"] = head = 2 * cfg.vocab_size * cfg.hidden_size
  per_pair = 2 * cfg.rope_dim
  if cfg.has_latent_attention:
    per_pair = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
  scores = cfg.num_attention_heads * per_pair * row_length
  by_part["attention scores"] = cfg.num_hidden_layers * scores
  if mtp and cfg.num_nextn_predict_layers:
    activated = sum(part.activated for part in mtp_parts(cfg).values())
    depth = cfg.num_nextn_predict_layers
    by_part["MTP modules"] = 2 * activated + depth * (head + scores)
  return by_part


def decode_flops_per_token(cfg: ModelConfig, context: float) -> float:
  """Operations of decode for one token over the cache.

  The absorbed products with W^UK and W^UV cost what the expanded ones do for
  one token; each cached token costs 2 N (2 C + R) a layer, 4 N H with
  grouped-query attention.

  Args:
    cfg: the model's sizes.
    context: tokens in the cache, on average.
  """
  counts = count_parameters(cfg)
  multiplied = counts.activated_layers + cfg.vocab_size * cfg.hidden_size
  per_pair = 4 * cfg.rope_dim
  if cfg.has_latent_attention:
    per_pair = 2 * (2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim)
  attention = cfg.num_attention_heads * per_pair * context
  return float(2 * multiplied + cfg.num_hidden_layers * attention)


def sampling_flops(
  cfg: ModelConfig, prompt_lengths: np.ndarray, lengths: np.ndarray
) -> float:
  """Operations of drawing n completions of each prompt, prefilled once for all.

  Prefill in the expanded form, decoding in the absorbed one, each token over
  what really stands before it; both are linear in that, so means are exact.

  Args:
    cfg: the model's sizes.
    prompt_lengths: int [P], tokens.
    lengths: int [P, n], tokens of each prompt's completions.
  """
  prefill = sum(
    p * forward_flops_per_token(cfg, p, mtp=False)
    for p in prompt_lengths.tolist()
  )
  contexts = prompt_lengths[:, None] + lengths / 2
  tokens = float(lengths.sum())
  if tokens == 0:
    return float(prefill)
  context = float((lengths * contexts).sum()) / tokens
  return float(prefill + tokens * decode_flops_per_token(cfg, context))


def measure_peak_flops(dtype: str, *, size: int, seconds: float) -> float:
  """Operations per second of the default device on a large matrix product.

  A product as exact as the model's, which on a GPU costs float32 its TF32.

  Stands in for a data sheet where there is none, as for a laptop's CPU; on an
  accelerator set the published peak in the config instead.

  Args:
    dtype: of the inputs; sums are float32.
    size: side of the square matrices.
    seconds: how long to measure.

  Returns:
    The best rate seen, in operations per second.
  """
  x = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a, b: einsum("ij,jk->ik", a, b))
  product(x, x).block_until_ready()
  best, end = float("inf"), time.monotonic() + seconds
  while True:
    began = time.monotonic()
    product(x, x).block_until_ready()
    now = time.monotonic()
    best = min(best, now - began)
    if now >= end:
      return 2 * size**3 / best
