r"""A language model of the Python standard library, and of nothing else.

  python -m experiments.pretrain \
    --config=configs/pretrain/stdlib.py --workdir=runs/stdlib

Held-out files are scored in bits per byte, beside the unigram and bigram
entropies of the same bytes (4.47 and 3.29 with Python 3.11).  Averaged weights
score 3.84, 3.04 and 2.19 after 100, 200 and 300 steps (commit 54cd712, 2 CPU
cores that other work shared, so no time is given; the 600 were not run).
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.stage = "pretrain"
  c.seed = 0
  c.steps = 600
  c.init_from = None
  c.tokenizer = "bytes"
  c.model = dict(
    vocab_size=272,
    n_vocab_used=268,  # 256 bytes and 12 markers
    hidden_size=96,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    intermediate_size=256,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=2,
    n_group=1,
    topk_group=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=48,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=24,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    initializer_range=0.02,
    tie_word_embeddings=False,
    num_nextn_predict_layers=1,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    unroll_layers=True,
    attention_chunk=0,
    logits_chunk=0,
  )
  c.tasks = {}
  c.data = dict(
    row_length=256,
    packing_window=4096,
    heldout_rows=128,
    sources=dict(
      stdlib=dict(
        kind="stdlib",
        weight=1.0,
        layout="cross_document",
        heldout_fraction=0.05,
        fim_rate=0.1,
        max_bytes=8_000_000,
      ),
    ),
  )
  c.batch = dict(rows=32, first_rows=8, ramp_steps=100, microbatch_rows=8)
  c.mesh = dict(data=2, fsdp=1, expert=1, context=1, tensor=1)
  c.mtp_weight = dict(
    peak=0.3,
    phases=(
      dict(shape="constant", steps=400, factor=1.0),
      dict(shape="constant", steps=200, factor=1 / 3),
    ),
  )
  c.balance_weight = 1e-4
  c.bias_update_rate = dict(
    peak=0.01,
    phases=(
      dict(shape="constant", steps=580, factor=1.0),
      dict(shape="constant", steps=20, factor=0.0),
    ),
  )
  c.optimizer = dict(
    clip_norm=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    moment_dtype="float32",
    muon=dict(momentum=0.95, ns_steps=5, update_rms=None, adam_factor=0.3),
  )
  # Warm-up, constant, cosine and two tails: V3's shape.
  c.schedule = dict(
    peak=0.02,
    phases=(
      dict(shape="linear", steps=30, factor=1.0),
      dict(shape="constant", steps=370, factor=1.0),
      dict(shape="cosine", steps=160, factor=0.1),
      dict(shape="constant", steps=25, factor=0.1),
      dict(shape="constant", steps=15, factor=0.033),
    ),
  )
  c.ema_decay = 0.99
  c.eval = dict(
    every_steps=100,
    batch_rows=32,
    use_ema=True,
    task=None,
    levels=(),
    problems_per_level=0,
  )
  c.checkpoint_every_steps = 100
  c.keep_checkpoints = 2
  c.keep_best = None
  c.on_nonfinite = "stop"
  c.peak_flops = None  # measured on this machine
  return c
