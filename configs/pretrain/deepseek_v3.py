r"""DeepSeek-V3: 671B parameters, 37B activated (arXiv:2412.19437).

  python -m experiments.pretrain \
    --config=configs/pretrain/deepseek_v3.py --workdir=runs/deepseek_v3

The published sizes and recipe, in steps: `tests/flops_test.py` counts it by
shapes alone.  It was never run here.  Departures and gaps: the batch ramps over
steps, not tokens; Adam's eps and the EMA's decay are unpublished; the data is
yours.

This is the pretraining at 4K, with plain RoPE. The context is then widened to
128K by YaRN in two phases of 1000 steps, each from the one before:

  --config=configs/pretrain/deepseek_v3.py:32k --workdir=runs/deepseek_v3_32k
  --config=configs/pretrain/deepseek_v3.py:128k --workdir=runs/deepseek_v3_128k

The released weights are those after, with max_position_embeddings=163840; their
config.json says initializer_range=0.02, the paper 0.006.
"""

import ml_collections


def get_config(phase="4k"):
  c = _pretraining()
  if phase == "32k":
    _extend(c, "runs/deepseek_v3", length=32768, rows=1920)
    # 128 rows at a time, each on 4 chips: 8192 tokens a chip.
    c.mesh.update(fsdp=16, context=4)
  elif phase == "128k":
    _extend(c, "runs/deepseek_v3_32k", length=131072, rows=480)
    c.mesh.update(fsdp=4, context=16)
  elif phase != "4k":
    raise ValueError(f"phase {phase!r} is none of 4k, 32k, 128k.")
  return c


def _extend(c, init_from, *, length, rows):
  """1000 steps at the last learning rate (section 4.3 of the paper)."""
  c.init_from = init_from
  c.steps = 1000
  c.model.update(
    max_position_embeddings=length,
    rope_scaling=dict(
      type="yarn",
      factor=40,
      original_max_position_embeddings=4096,
      beta_fast=32,
      beta_slow=1,
      mscale=1.0,
      mscale_all_dim=1.0,
    ),
    remat="block",
    attention_chunk=2**23 // length,  # scores of 4.3 GB at a time
    logits_chunk=8080,
  )
  c.data.update(row_length=length, packing_window=1024, heldout_rows=256)
  microbatch_rows = 512 * 8192 // length
  c.batch.update(
    rows=rows, first_rows=rows, ramp_steps=0, microbatch_rows=microbatch_rows
  )
  c.mesh.expert_chunk = 4096

  def constant(peak, factor=1.0):
    phase = dict(shape="constant", steps=c.steps, factor=factor)
    return dict(peak=peak, phases=(phase,))

  c.schedule = constant(7.3e-6)
  # Both as at the end of the pretraining; unpublished for the extension.
  c.mtp_weight = constant(0.1)
  c.bias_update_rate = constant(0.001, factor=0.0)
  c.eval.update(every_steps=100, batch_rows=microbatch_rows)
  c.checkpoint_every_steps = 50


def _pretraining():
  c = ml_collections.ConfigDict()
  c.stage = "pretrain"
  c.seed = 0
  c.steps = 240_209  # 14.8T tokens
  c.init_from = None
  # DeepSeek's tokenizer.json after rlm.data.tokenizer.add_markers.
  c.tokenizer = "data/deepseek_v3_tokenizer"
  c.model = dict(
    vocab_size=129280,
    n_vocab_used=128817,  # 128815 published, and <answer>, </answer>
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_shared_experts=1,
    n_group=8,
    topk_group=4,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    num_attention_heads=128,
    q_lora_rank=1536,
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
    num_nextn_predict_layers=1,
    dtype="bfloat16",
    param_dtype="float32",
    remat="attention",
    unroll_layers=False,
    attention_chunk=512,
    logits_chunk=16160,  # an eighth of the vocabulary
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
  # 3072 to 15360 rows within the first 469B tokens.
  c.batch = dict(
    rows=15360, first_rows=3072, ramp_steps=12_424, microbatch_rows=512
  )
  # 512 chips, such as v5p:8x8x8: one row each at a time. A chip of the axis
  # `expert` holds one of V3's 8 groups of experts, so that a token's row goes
  # to 4 chips at most, once to each.
  c.mesh = dict(
    data=1,
    fsdp=64,
    expert=8,
    context=1,
    tensor=1,
    node_limited=True,
    expert_chunk=0,
    dense_over_expert=True,
    gradient_dtype="bfloat16",
  )
  c.mtp_weight = dict(
    peak=0.3,
    phases=(
      dict(shape="constant", steps=163_915, factor=1.0),  # to 10T tokens
      dict(shape="constant", steps=76_294, factor=1 / 3),
    ),
  )
  c.balance_weight = 1e-4
  c.bias_update_rate = dict(
    peak=0.001,
    phases=(
      dict(shape="constant", steps=232_262, factor=1.0),  # to 14.3T tokens
      dict(shape="constant", steps=7_947, factor=0.0),
    ),
  )
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
    peak=2.2e-4,
    phases=(
      dict(shape="linear", steps=2_000, factor=1.0),
      dict(shape="constant", steps=161_915, factor=1.0),  # to 10T tokens
      dict(shape="cosine", steps=68_347, factor=0.1),  # 4.3T
      dict(shape="constant", steps=5_293, factor=0.1),  # 333B
      dict(shape="constant", steps=2_654, factor=7.3e-6 / 2.2e-4),  # 167B
    ),
  )
  c.ema_decay = 0.999
  c.eval = dict(
    every_steps=1_000,
    batch_rows=512,
    use_ema=True,
    task=None,
    levels=(),
    problems_per_level=0,
  )
  c.checkpoint_every_steps = 500
  c.keep_checkpoints = 3
  c.keep_best = None
  c.on_nonfinite = "stop"
  c.peak_flops = None  # the chip's published one
  return c
