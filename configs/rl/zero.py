r"""R1-Zero: RL from the base model, without a cold start.

  python -m experiments.rl \
    --config=configs/rl/zero.py --workdir=runs/zero

From runs/pretrain (configs/pretrain/laptop.py), a quarter of whose problems had
the chat format: at random it must hit the format now and then, or no reward
ever comes.  The objective is as R1 writes it, with its published clip range 10
and KL 0.001: a ratio for the whole output, and every completion of a rollout
in one of 16 random minibatches, one epoch.  The reference becomes the policy
every 25 rollouts, which is every 400 updates, as published.  Learning rate and
sizes are those of a small model (published: 3e-6, 32 prompts x 16 an update).
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.stage = "rl"
  c.seed = 0
  c.steps = 60
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
  c.task = dict(
    name="column_addition",
    heldout_fraction=0.1,
    letters="abcdefghijklmnopqrstuvwxyz",
    forget_carry=0.5,
    slip=0.02,
  )
  c.curriculum = dict(
    levels=(2, 3, 4, 5),
    start_level=3,
    threshold=0.7,
    smoothing=0.0,
    min_steps=1,
    top_share=0.5,
  )
  c.prompts_per_step = 64
  c.group_size = 16
  # R1 weighs both alike; here only accuracy should set a group apart.
  c.rewards = dict(accuracy=1.0, format=0.1)
  c.sampling = dict(
    temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64, stop_tokens=()
  )
  c.slots = 256
  c.sampling_mesh = dict(data=2, fsdp=1, expert=1, context=1, tensor=1)
  c.prompt_length = 24
  c.replay_routes = True
  c.objective = dict(  # None: as the row of rlm/rl/objectives.py says
    name="grpo_r1",
    advantage_eps=1e-4,
    clip_low=None,
    clip_high=None,
    kl_weight=None,
  )
  c.selection = dict(
    rows="all",
    rows_per_rollout=1024,
    num_minibatches=16,
    microbatch_rows=64,
  )
  c.mesh = dict(data=2, fsdp=1, expert=1, context=1, tensor=1)
  c.optimizer = dict(
    clip_norm=1.0,
    b1=0.9,
    b2=0.98,
    eps=1e-8,
    weight_decay=0.0,
    moment_dtype="float32",
    muon=None,
  )
  c.schedule = dict(
    peak=2e-4,
    phases=(
      dict(shape="linear", steps=5, factor=1.0),
      dict(shape="constant", steps=1, factor=1.0),  # from then on
    ),
  )
  c.bias_update_rate = 0.0
  c.reference_every_steps = 25
  c.monitor_kl = False
  c.diagnostics_every_steps = 5
  c.traces_every_steps = 10
  c.traces_per_step = 4
  c.checkpoint_every_steps = 20
  c.keep_checkpoints = 2
  c.keep_best = None
  c.on_nonfinite = "stop"
  return c
