"""Models whose sizes divide by every mesh of 8 devices, and rows for them."""

import functools

import numpy as np

from rlm.models.transformer import Transformer
from tests.models.gqa_test import GQA
from tests.tiny_model import tiny_config, tiny_variables

SIZES = dict(
  hidden_size=32,
  vocab_size=48,
  n_vocab_used=45,
  intermediate_size=64,
  num_attention_heads=4,
)
LATENT = dict(
  SIZES,
  moe_intermediate_size=16,
  n_routed_experts=8,
  num_experts_per_tok=3,
  kv_lora_rank=16,
  qk_nope_head_dim=8,
  qk_rope_head_dim=4,
  v_head_dim=8,
)
V3 = dict(n_group=4, topk_group=2, q_lora_rank=16, logits_chunk=16)
MODELS = {
  "v3": dict(LATENT, **V3, num_hidden_layers=3),
  # Its MoE layers alone: a third of the code to compile.
  "v3_moe": dict(
    LATENT,
    **V3,
    num_hidden_layers=2,
    first_k_dense_replace=0,
    num_nextn_predict_layers=0,
  ),
  # DeepSeek-V2-Lite's choices, and tied embeddings; one layer.
  "v2": dict(
    LATENT,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    topk_method="greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    n_shared_experts=2,
    q_lora_rank=None,
    num_nextn_predict_layers=0,
    tie_word_embeddings=True,
  ),
  "qwen2": GQA
  | SIZES
  | dict(head_dim=8, qkv_bias=True, tie_word_embeddings=True),
  "qwen3": GQA | SIZES | dict(head_dim=8, qk_norm=True),
}


def mesh_model(name: str, **changes) -> Transformer:
  return Transformer(tiny_config(**{**MODELS[name], **changes}))


@functools.cache
def mesh_variables(name: str):
  return tiny_variables(mesh_model(name))


def packed_batch(rows: int, length: int) -> dict[str, np.ndarray]:
  """Rows of up to four documents; one row is padding, and one a document."""
  rng = np.random.default_rng(0)
  shape = (rows, length)
  segment_ids = np.sort(rng.integers(0, 4, shape), axis=1)[:, ::-1].copy()
  segment_ids[0], segment_ids[1] = 0, 1
  positions = np.zeros(shape, np.int32)
  for t in range(1, length):
    same = segment_ids[:, t] == segment_ids[:, t - 1]
    positions[:, t] = np.where(same, positions[:, t - 1] + 1, 0)
  return dict(
    tokens=rng.integers(0, 45, shape).astype(np.int32),
    positions=positions,
    segment_ids=segment_ids.astype(np.int32),
    loss_mask=rng.random(shape) < 0.8,
  )
