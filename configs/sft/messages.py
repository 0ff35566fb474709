r"""Fine-tunes on your own conversations, a `messages` JSONL file.

  python -m experiments.sft --config=configs/sft/messages.py \
    --workdir=runs/sft --config.init_from=runs/pretrain \
    --config.data.sources.traces.path=conversations.jsonl

A line is {"messages": [{"role": "user", "content": "..."}, {"role":
"assistant", "content": "..."}]}; the loss is on the assistant alone.  The same
config takes the file that rejection sampling writes.
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.stage = "sft"
  c.seed = 0
  c.steps = 30
  c.init_from = "runs/pretrain"
  c.tokenizer = "bytes"
  c.model = dict(
    vocab_size=272,
    n_vocab_used=268,  # 256 bytes and 12 markers
    hidden_size=64,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=192,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=4,
    n_group=1,
    topk_group=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    rope_theta=100.0,  # rows are short
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
  c.tasks = dict(
    sums=dict(
      name="column_addition",
      heldout_fraction=0.1,
      letters="abcdefghijklmnopqrstuvwxyz",
      forget_carry=0.5,
      slip=0.02,
    )
  )
  c.data = dict(
    row_length=128,
    packing_window=1024,
    heldout_rows=128,
    sources=dict(
      traces=dict(
        kind="messages",
        weight=1.0,
        layout="isolated",
        path="conversations.jsonl",
      ),
    ),
  )
  c.batch = dict(rows=64, first_rows=64, ramp_steps=0, microbatch_rows=32)
  c.mesh = dict(data=2, fsdp=1, expert=1, context=1, tensor=1)
  c.mtp_weight = 0.3
  c.balance_weight = 1e-4
  c.bias_update_rate = 0.01  # short runs: at 0.001 loads stay uneven
  c.optimizer = dict(
    clip_norm=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    moment_dtype="float32",
    muon=dict(momentum=0.95, ns_steps=5, update_rms=None, adam_factor=0.3),
  )
  c.schedule = dict(
    peak=0.005,
    phases=(
      dict(shape="linear", steps=2, factor=1.0),
      dict(shape="cosine", steps=28, factor=0.1),
    ),
  )
  c.ema_decay = None
  c.eval = dict(
    every_steps=15,
    batch_rows=64,
    use_ema=False,
    task="sums",
    levels=(2, 3, 4),
    problems_per_level=64,
  )
  c.checkpoint_every_steps = 15
  c.keep_checkpoints = 2
  c.keep_best = None
  c.on_nonfinite = "stop"
  c.peak_flops = None  # measured on this machine
  return c
