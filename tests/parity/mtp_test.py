"""Multi-token prediction against a reference by published names, in float64.

The reference is written from the fact sheet's section on MTP (V3 eq. 21-25 and
the README of the released weights): h' = eh_proj [enorm(embedding of the next
token); hnorm(state after the final norm)], a whole block, shared_head.norm and
the model's head. transformers leaves these layers out of its model.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rlm.losses import global_weights, make_pretrain_loss
from rlm.models.published_config import read_published_config
from tests.models import reference
from tests.parity import cases, compare
from tests.parity.ours import Ours, forward, make_batch, quick_jit

DEPTH = 2  # one more than published: states of a module feed the next
CONFIG = {
  **cases.CONFIGS["deepseek_v3"],
  "num_nextn_predict_layers": DEPTH,
}
WEIGHTS = cases.make_weights(CONFIG, seed=1)
LAYERS = CONFIG["num_hidden_layers"]


@dataclasses.dataclass(frozen=True)
class Mistake:
  """An error of a port; none by default."""

  hidden_first: bool = False  # in eh_proj, as the paper prints it
  swapped_norms: bool = False
  final_norm_for_shared_head: bool = False
  before_final_norm: bool = False
  this_token: bool = False  # embeds t_i where t_{i+1} belongs
  without_output_norm: bool = False


def norm(weights, name, x):
  return reference.rms_norm(x, weights[name + ".weight"], 1e-6)


def published_block(weights, layer):
  """The reference's names for the tensors of one layer, and its bias."""
  prefix = f"model.layers.{layer}."

  def get(name):
    return weights[prefix + name]

  def matrix(name):
    return get(name + ".weight").T

  def swiglu(module):
    names = ("gate_proj", "up_proj", "down_proj")
    return {name: matrix(f"{module}.{name}") for name in names}

  attention = {
    "q_a": matrix("self_attn.q_a_proj"),
    "q_norm": {"scale": get("self_attn.q_a_layernorm.weight")},
    "q_b": matrix("self_attn.q_b_proj"),
    "kv_a": matrix("self_attn.kv_a_proj_with_mqa"),
    "kv_norm": {"scale": get("self_attn.kv_a_layernorm.weight")},
    "kv_b": matrix("self_attn.kv_b_proj"),
    "out_proj": matrix("self_attn.o_proj"),
  }
  parts = {
    "attn_norm": {"scale": get("input_layernorm.weight")},
    "attn": attention,
    "ffn_norm": {"scale": get("post_attention_layernorm.weight")},
  }
  if layer < CONFIG["first_k_dense_replace"]:
    return {**parts, "ffn": swiglu("mlp")}, None
  experts = [
    swiglu(f"mlp.experts.{expert}")
    for expert in range(CONFIG["n_routed_experts"])
  ]
  joined = {name: np.stack([e[name] for e in experts]) for name in experts[0]}
  ffn = {
    **joined,
    "router": matrix("mlp.gate"),
    "shared": swiglu("mlp.shared_experts"),
  }
  return {**parts, "ffn": ffn}, get("mlp.gate.e_score_correction_bias")


def reference_logits(cfg, tokens, mistake=Mistake()):
  """Logits of one document: next token [n, V], then depth k [n - 1 - k, V]."""
  weights = {name: x.astype(np.float64) for name, x in WEIGHTS.items()}
  embedding, head = (
    weights[name] for name in ("model.embed_tokens.weight", "lm_head.weight")
  )
  x = embedding[tokens]
  for layer in range(LAYERS):
    x, _ = reference.block(*published_block(weights, layer), x, cfg)
  hidden = norm(weights, "model.norm", x)
  logits = [hidden @ head.T]
  if not mistake.before_final_norm:
    x = hidden
  for k in range(DEPTH):
    prefix = f"model.layers.{LAYERS + k}."
    enorm, hnorm = prefix + "enorm", prefix + "hnorm"
    if mistake.swapped_norms:
      enorm, hnorm = hnorm, enorm
    length = len(tokens) - 1 - k
    first = k if mistake.this_token else k + 1
    ahead = embedding[tokens[first : first + length]]
    joined = [norm(weights, enorm, ahead), norm(weights, hnorm, x[:length])]
    if mistake.hidden_first:
      joined.reverse()
    x = np.concatenate(joined, axis=-1) @ weights[prefix + "eh_proj.weight"].T
    x, _ = reference.block(*published_block(weights, LAYERS + k), x, cfg)
    final = prefix + "shared_head.norm"
    if mistake.final_norm_for_shared_head:
      final = "model.norm"
    if not mistake.without_output_norm:
      x = norm(weights, final, x)
    logits.append(x @ head.T)
  return logits


@functools.cache
def reference_rows(mistake=Mistake()):
  """All documents of the packed batch: [1 + DEPTH, 2, LENGTH, V], else NaN.

  Also the mean cross-entropy of every depth.
  """
  tokens = cases.make_batch(cases.BATCHES["packed"])["tokens"]
  grid = np.full((1 + DEPTH, *tokens.shape, CONFIG["vocab_size"]), np.nan)
  cfg = config()
  losses: list[list[float]] = [[] for _ in grid]
  for row, start, length in cases.BATCHES["packed"]:
    document = tokens[row, start : start + length]
    for k, logits in enumerate(reference_logits(cfg, document, mistake)):
      grid[k, row, start : start + len(logits)] = logits
      shifted = logits - logits.max(axis=-1, keepdims=True)
      logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
      targets = document[1 + k :]  # the last state of all has none
      losses[k] += [
        -logprobs[t, token] for t, token in enumerate(targets.tolist())
      ]
  return grid, np.array([np.mean(x) for x in losses])


@functools.cache
def config():
  return read_published_config(CONFIG)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """Our logits [1 + DEPTH, 2, LENGTH, V], and metrics of the loss."""
  folder = tmp_path_factory.mktemp("mtp")
  cases.write_folder(folder, CONFIG, WEIGHTS)
  ours = Ours.load(folder)
  assert ours.model.cfg == config()
  loss_fn = make_pretrain_loss(ours.model, train_mtp=True, balance_weight=0.0)

  def run(variables, batch):
    rows = [batch[key] for key in ("tokens", "positions", "segment_ids")]
    hidden, _ = ours.model.apply(variables, *rows)
    states, _ = ours.model.apply(variables, hidden, *rows, method="mtp")
    mtp = states @ variables["params"]["head"][None, None]
    _, aux = loss_fn(variables, batch, jax.random.key(0))
    return forward(ours.model, variables, batch), mtp, aux.metrics

  batch = global_weights(make_batch("packed"), mtp_depth=DEPTH)
  batch["mtp_weight"] = np.float32(0.3)
  logits, mtp, metrics = quick_jit(run)(ours.variables, batch)
  return np.concatenate([np.asarray(logits)[None], mtp]), metrics


def farthest(found, mistake=Mistake()):
  """Per depth, the main model's first."""
  expected, _ = reference_rows(mistake)
  return np.nanmax(np.abs(found[0] - expected), axis=(1, 2, 3))


def test_logits_of_every_depth(found):
  worst = farthest(found)
  assert (worst <= compare.LOGITS).all(), worst
  expected, _ = reference_rows()
  assert np.nanstd(expected, axis=(1, 2, 3)).min() >= 1


def test_loss(found):
  next_token, *mtp = reference_rows()[1]
  _, metrics = found
  np.testing.assert_allclose(
    metrics["loss/next_token"], next_token, rtol=compare.LOSS
  )
  np.testing.assert_allclose(
    metrics["loss/mtp"], np.mean(mtp), rtol=compare.LOSS
  )


@pytest.mark.parametrize(
  "name", [field.name for field in dataclasses.fields(Mistake)]
)
def test_every_mistake_moves_the_logits(found, name):
  moved = farthest(found, Mistake(**{name: True}))
  assert moved[0] <= compare.LOGITS  # of the main model
  assert moved[1:].max() >= 100 * compare.LOGITS, moved
