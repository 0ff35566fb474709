r"""The R1 recipe on two CPU cores, within ten minutes.

  python -m experiments.r1 \
    --config=configs/r1/laptop.py --workdir=runs/quickstart

A small DeepSeek-V3 (latent attention, mixture of experts, multi-token
prediction) learns to read Python's own source and to add numbers in columns.

What RL has to teach: the worked sums of the corpus are written by authors who
err, as the authors of real text do. Half of them always forget the carry, and
every step slips by one with probability 0.02, so that a quarter of the
documents are wrong at two columns and half at five. The cold start shows the
format with the same authors. Nothing but the verified reward of RL says which
of them to follow.

Levels (columns): pretraining saw 2-6, the cold start 2-3, RL 2-5, and nothing
ever saw 7.
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.tokenizer = "bytes"
  c.task = dict(
    name="column_addition",
    heldout_fraction=0.1,
    letters="abcdefghijklmnopqrstuvwxyz",
    forget_carry=0.5,
    slip=0.02,
  )
  model = dict(
    vocab_size=272,
    n_vocab_used=268,  # 256 bytes and 12 markers
    hidden_size=64,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=128,
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
    dtype="float32",  # bfloat16 is no faster on a CPU at these sizes
    param_dtype="float32",
    remat="none",
    unroll_layers=True,
    attention_chunk=0,
    logits_chunk=0,
  )
  c.models = dict(
    model=model,
    student=model  # dense, and about half as many parameters
    | dict(
      hidden_size=48,
      first_k_dense_replace=3,
      intermediate_size=96,
      kv_lora_rank=24,
      qk_nope_head_dim=12,
      qk_rope_head_dim=12,
      v_head_dim=12,
      num_nextn_predict_layers=0,
    ),
  )

  # --- What the stages share. ------------------------------------------------
  columns = dict(
    kind="task",
    layout="isolated",
    task="column_addition",
    heldout_documents=0,
    author="noisy",
  )
  corpus = dict(
    stdlib=dict(
      kind="stdlib",
      weight=1.0,
      layout="cross_document",
      heldout_fraction=0.05,
      fim_rate=0.1,
      max_bytes=3_000_000,
    ),
    columns=columns
    | dict(
      weight=3.0,
      documents=60_000,
      heldout_documents=500,
      levels=(2, 3, 4, 5, 6, 6),
      tagged=0.25,  # a quarter in the chat format: the base knows the markers
    ),
  )
  rows = dict(row_length=128, packing_window=1024, heldout_rows=128)
  muon = dict(
    clip_norm=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    moment_dtype="float32",
    muon=dict(momentum=0.95, ns_steps=5, update_rms=None, adam_factor=0.3),
  )
  saving = dict(keep_checkpoints=2, keep_best=None, on_nonfinite="stop")
  supervised = dict(
    init_from=None,
    batch=dict(rows=64, first_rows=64, ramp_steps=0, microbatch_rows=32),
    mesh=dict(data=2, fsdp=1, expert=1, context=1, tensor=1),
    balance_weight=1e-4,
    bias_update_rate=0.01,  # short runs: at 0.001 loads stay uneven
    optimizer=muon,
    ema_decay=None,
    peak_flops=None,  # measured on this machine
    eval=dict(
      every_steps=100,
      batch_rows=64,
      use_ema=False,
      task="column_addition",
      levels=(2, 3, 4, 5, 6),
      problems_per_level=64,
    ),
    **saving,
  )
  sampling = dict(temperature=1.0, top_k=0, top_p=1.0)
  rl = dict(
    experiment="rl",
    model="model",
    evaluate=True,
    curriculum=dict(
      levels=(2, 3, 4, 5),
      start_level=3,
      threshold=0.7,
      smoothing=0.0,
      min_steps=1,
      top_share=0.5,
    ),
    prompts_per_step=16,
    group_size=16,
    # R1 weighs both alike; here only accuracy should set a group apart.
    rewards=dict(accuracy=1.0, format=0.1),
    sampling=sampling | dict(max_new_tokens=64),
    slots=256,
    sampling_mesh=dict(data=2, fsdp=1, expert=1, context=1, tensor=1),
    prompt_length=24,
    replay_routes=True,
    objective=dict(
      name="dapo",
      advantage_eps=1e-4,
      clip_low=None,
      clip_high=None,
      kl_weight=None,
    ),
    selection=dict(
      rows="untied",
      rows_per_rollout=128,
      num_minibatches=2,
      microbatch_rows=32,
    ),
    mesh=dict(data=2, fsdp=1, expert=1, context=1, tensor=1),
    optimizer=muon | dict(b2=0.98, muon=None),
    bias_update_rate=0.0,
    reference_every_steps=0,
    monitor_kl=True,
    diagnostics_every_steps=5,
    traces_every_steps=10,
    traces_per_step=4,
    **saving,
  )

  # --- The stages. -----------------------------------------------------------
  c.order = (
    "pretrain",
    "cold_start",
    "rl",
    "rejection",
    "sft",
    "rl_final",
    "student_pretrain",
    "distill",
  )
  c.stages = dict(
    pretrain=supervised
    | dict(
      experiment="pretrain",
      model="model",
      evaluate=True,
      steps=400,
      data=rows | dict(sources=corpus),
      mtp_weight=0.3,
      schedule=dict(
        peak=0.03,
        phases=(
          dict(shape="linear", steps=20, factor=1.0),
          dict(shape="constant", steps=180, factor=1.0),
          dict(shape="linear", steps=200, factor=0.05),
        ),
      ),
      checkpoint_every_steps=100,
    ),
    cold_start=supervised
    | dict(
      experiment="sft",
      model="model",
      evaluate=True,
      init_from="stage:pretrain",
      steps=30,
      data=rows
      | dict(
        sources=dict(
          traces=columns
          | dict(weight=1.0, documents=256, levels=(2, 3), tagged=1.0)
        )
      ),
      batch=dict(rows=32, first_rows=32, ramp_steps=0, microbatch_rows=32),
      mesh=dict(data=2, fsdp=1, expert=1, context=1, tensor=1),
      mtp_weight=0.1,
      schedule=dict(
        peak=0.005,
        phases=(
          dict(shape="linear", steps=2, factor=1.0),
          dict(shape="constant", steps=13, factor=1.0),
          dict(shape="linear", steps=15, factor=0.05),
        ),
      ),
      checkpoint_every_steps=30,
    ),
    rl=rl
    | dict(
      init_from="stage:cold_start",
      steps=80,
      schedule=dict(
        peak=5e-4,  # steps here are updates, two a rollout
        phases=(
          dict(shape="linear", steps=10, factor=1.0),
          dict(shape="constant", steps=102, factor=1.0),
          dict(shape="linear", steps=48, factor=0.05),
        ),
      ),
      checkpoint_every_steps=20,
    ),
    rejection=dict(
      experiment="reject",
      model=None,
      evaluate=False,
      init_from="stage:rl",
      rejection=dict(
        levels=(2, 3, 4, 5),
        problems_per_level=(128, 256, 384, 512),
        samples_per_problem=4,
        require_steps=True,
        keep_per_problem=1,
        problems_per_chunk=320,
      ),
      sampling=sampling | dict(max_new_tokens=64),
      slots=256,
      sampling_mesh=dict(data=2, fsdp=1, expert=1, context=1, tensor=1),
      prompt_length=24,
    ),
    sft=supervised
    | dict(
      experiment="sft",
      model="model",
      evaluate=True,
      init_from="stage:pretrain",
      steps=40,
      data=rows
      | dict(
        sources=dict(
          traces=dict(
            kind="messages",
            weight=1.0,
            layout="isolated",
            path="stage:rejection/messages.jsonl",
          )
        )
      ),
      mtp_weight=0.1,
      schedule=dict(
        peak=0.005,
        phases=(
          dict(shape="linear", steps=2, factor=1.0),
          dict(shape="constant", steps=18, factor=1.0),
          dict(shape="linear", steps=20, factor=0.05),
        ),
      ),
      checkpoint_every_steps=40,
    ),
    rl_final=rl
    | dict(
      init_from="stage:sft",
      steps=15,
      curriculum=rl["curriculum"] | dict(start_level=5),
      schedule=dict(
        peak=3e-4,
        phases=(
          dict(shape="linear", steps=4, factor=1.0),
          dict(shape="linear", steps=26, factor=0.05),
        ),
      ),
      checkpoint_every_steps=15,
    ),
    student_pretrain=supervised
    | dict(
      experiment="pretrain",
      model="student",
      evaluate=True,
      steps=300,
      data=rows | dict(sources=dict(columns=corpus["columns"])),
      mtp_weight=0.0,
      schedule=dict(
        peak=0.03,
        phases=(
          dict(shape="linear", steps=20, factor=1.0),
          dict(shape="constant", steps=130, factor=1.0),
          dict(shape="linear", steps=150, factor=0.05),
        ),
      ),
      checkpoint_every_steps=100,
    ),
    distill=supervised
    | dict(
      experiment="distill",
      model="student",
      evaluate=True,
      init_from="stage:student_pretrain",
      steps=120,
      data=rows
      | dict(
        sources=dict(
          traces=dict(
            kind="messages",
            weight=1.0,
            layout="isolated",
            path="stage:rejection/messages.jsonl",
          )
        )
      ),
      mtp_weight=0.0,
      schedule=dict(
        peak=0.01,
        phases=(
          dict(shape="linear", steps=2, factor=1.0),
          dict(shape="constant", steps=58, factor=1.0),
          dict(shape="linear", steps=60, factor=0.05),
        ),
      ),
      checkpoint_every_steps=60,
    ),
  )
  c.evaluate = dict(
    evaluation=dict(
      seed=0,
      levels=(2, 3, 4, 5, 6, 7),
      levels_trained=(2, 3, 4, 5),  # the headline: those that RL draws
      problems_per_level=48,
      samples_per_problem=8,
      ks=(1, 8),
      bootstrap_resamples=2000,
      traces_per_level=4,
      samples_per_trace=1,
    ),
    sampling=sampling | dict(max_new_tokens=80),
    slots=256,
    sampling_mesh=dict(data=2, fsdp=1, expert=1, context=1, tensor=1),
    prompt_length=28,
  )
  c.rl_gain = ("cold_start", "rl")
  c.distilled = ("student_pretrain", "distill")
  return c
