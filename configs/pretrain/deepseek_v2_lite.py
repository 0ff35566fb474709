r"""DeepSeek-V2-Lite: 15.7B parameters, 2.4B activated (arXiv:2405.04434, B).

  python -m experiments.pretrain \
    --config=configs/pretrain/deepseek_v2_lite.py --workdir=runs/v2_lite

The published sizes and recipe, in steps; never run here.  Departures: V2-Lite
balanced experts by a loss over the whole batch (alpha 0.001), here it is the
sequence-wise form; Adam's eps is unpublished; the data is yours.

This is the pretraining at 4K, with plain RoPE.  The released weights are those
after extension, with max_position_embeddings=163840 and rope_scaling =
dict(type="yarn", factor=40, original_max_position_embeddings=4096,
beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707).
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.stage = "pretrain"
  c.seed = 0
  c.steps = 301_997  # 5.7T tokens
  c.init_from = None
  # DeepSeek's tokenizer.json after rlm.data.tokenizer.add_markers.
  c.tokenizer = "data/deepseek_v2_tokenizer"
  c.model = dict(
    vocab_size=102400,
    n_vocab_used=102400,  # or as many ids as your tokenizer.json uses
    hidden_size=2048,
    num_hidden_layers=27,
    first_k_dense_replace=1,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    num_attention_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    initializer_range=0.006,
    tie_word_embeddings=False,
    num_nextn_predict_layers=0,
    dtype="bfloat16",
    param_dtype="float32",
    remat="block",
    unroll_layers=False,
    attention_chunk=512,
    logits_chunk=12800,  # an eighth of the vocabulary
  )
  c.tasks = {}
  c.data = dict(
    row_length=4096,
    packing_window=65536,
    heldout_rows=4096,
    sources=dict(
      corpus=dict(
        kind="jsonl",
        weight=1.0,
        layout="cross_document",
        heldout_fraction=0.001,
        fim_rate=0.1,
        path="data/corpus.jsonl",
      ),
    ),
  )
  c.batch = dict(rows=4608, first_rows=4608, ramp_steps=0, microbatch_rows=512)
  c.mesh = dict(data=1, fsdp=1, expert=1, context=1, tensor=1)
  c.mtp_weight = 0.0
  c.balance_weight = 0.001
  c.bias_update_rate = 0.0  # V2 selects experts without a bias
  c.optimizer = dict(
    clip_norm=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    moment_dtype="bfloat16",
    muon=None,
  )
  c.schedule = dict(
    peak=4.2e-4,
    phases=(
      dict(shape="linear", steps=2_000, factor=1.0),
      dict(shape="constant", steps=239_598, factor=1.0),  # to 80%
      dict(shape="constant", steps=30_199, factor=0.316),  # to 90%
      dict(shape="constant", steps=30_200, factor=0.316**2),
    ),
  )
  c.ema_decay = None
  c.eval = dict(
    every_steps=1_000,
    batch_rows=512,
    use_ema=False,
    task=None,
    levels=(),
    problems_per_level=0,
  )
  c.checkpoint_every_steps = 500
  c.keep_checkpoints = 3
  c.keep_best = None
  c.on_nonfinite = "stop"
  c.peak_flops = 8 * 989e12  # 8 H800, bfloat16; set your machine's
  return c
