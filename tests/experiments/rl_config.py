"""The smallest RL run with everything on."""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.stage, c.seed, c.steps = "rl", 0, 4
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
    q_lora_rank=None,
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
    num_nextn_predict_layers=1,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    unroll_layers=False,
    attention_chunk=0,
    logits_chunk=0,
  )
  c.task = dict(
    name="column_addition",
    heldout_fraction=0.1,
    letters="abcdef",
    forget_carry=0.0,
    slip=0.0,
  )
  c.curriculum = dict(
    levels=(2, 3),
    start_level=2,
    threshold=0.9,
    smoothing=0.5,
    min_steps=1,
    top_share=0.5,
  )
  c.prompts_per_step, c.group_size = 2, 16
  c.rewards = dict(accuracy=1.0, format=0.1)
  c.sampling = dict(
    temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=34, stop_tokens=()
  )
  c.slots, c.prompt_length = 32, 16
  c.mesh = dict(data=1, fsdp=1, expert=2, context=1, tensor=1)
  c.sampling_mesh = dict(data=2, fsdp=1, expert=1, context=1, tensor=1)
  c.replay_routes = True
  c.objective = dict(
    name="grpo",
    advantage_eps=1e-4,
    clip_low=None,
    clip_high=None,
    kl_weight=None,
  )
  c.selection = dict(
    rows="all", rows_per_rollout=32, num_minibatches=2, microbatch_rows=8
  )
  c.optimizer = dict(
    clip_norm=1.0,
    b1=0.9,
    b2=0.98,
    eps=1e-8,
    weight_decay=0.1,
    moment_dtype="float32",
    muon=None,
  )
  c.schedule = dict(
    peak=0.1, phases=(dict(shape="constant", steps=1, factor=1.0),)
  )
  c.bias_update_rate = 0.0
  c.reference_every_steps = 2
  c.monitor_kl = False
  c.diagnostics_every_steps = 2
  c.traces_every_steps, c.traces_per_step = 2, 1
  c.checkpoint_every_steps, c.keep_checkpoints, c.keep_best = 2, 2, None
  c.on_nonfinite = "stop"
  return c
