"""Six tiny steps on 8 devices: a growing batch, two sources, held-out."""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.stage = "pretrain"
  c.seed = 0
  c.steps = 6
  c.init_from = None
  c.tokenizer = "bytes"
  c.model = dict(
    vocab_size=272,
    n_vocab_used=268,
    hidden_size=16,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    intermediate_size=24,
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    rope_theta=100.0,
    rope_scaling=None,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    initializer_range=0.2,
    tie_word_embeddings=False,
    num_nextn_predict_layers=0,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    unroll_layers=False,
    attention_chunk=0,
    logits_chunk=0,
  )
  c.tasks = dict(
    sums=dict(
      name="column_addition",
      heldout_fraction=0.2,
      letters="abcdef",
      forget_carry=0.5,
      slip=0.02,
    )
  )
  c.data = dict(
    row_length=48,
    packing_window=64,
    heldout_rows=6,
    sources=dict(
      stdlib=dict(
        kind="stdlib",
        weight=1.0,
        layout="cross_document",
        heldout_fraction=0.2,
        fim_rate=0.5,
        max_bytes=60_000,
      ),
      sums=dict(
        kind="task",
        weight=1.0,
        layout="isolated",
        task="sums",
        documents=90,
        heldout_documents=8,
        levels=(2,),
        author="noisy",
        tagged=0.25,
      ),
    ),
  )
  c.batch = dict(rows=16, first_rows=8, ramp_steps=3, microbatch_rows=8)
  c.mesh = dict(data=2, fsdp=2, expert=2, context=1, tensor=1)
  c.mtp_weight = 0.0
  c.balance_weight = 1e-4
  c.bias_update_rate = 0.01
  c.optimizer = dict(
    clip_norm=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    moment_dtype="float32",
    muon=None,
  )
  c.schedule = dict(
    peak=0.01, phases=(dict(shape="constant", steps=6, factor=1.0),)
  )
  c.ema_decay = None
  c.eval = dict(
    every_steps=3,
    batch_rows=8,
    use_ema=False,
    task="sums",
    levels=(2,),
    problems_per_level=3,
  )
  c.checkpoint_every_steps = 3
  c.keep_checkpoints = 2
  c.keep_best = dict(metric="heldout/stdlib/bits_per_byte", mode="min")
  c.on_nonfinite = "stop"
  c.peak_flops = 1e12
  return c
