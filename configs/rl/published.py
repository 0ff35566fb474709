r"""RL with verified answers on a published model.

  python -m experiments.rl \
    --config=configs/rl/published.py --workdir=runs/rl_published \
    --config.init_from=DeepSeek-R1-Distill-Qwen-1.5B --config.task.path=MY.jsonl

`init_from` as in configs/sft/published.py; problems as in configs/rl/jsonl.py,
asked by the model's chat template and answered in \boxed{}. Not run at full
size: no such weights were at hand.
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.stage = "rl"
  c.seed = 0
  c.steps = 100
  c.init_from = None  # the published folder
  c.tokenizer = None  # the one in init_from
  c.model = dict(  # the rest is what init_from says
    num_nextn_predict_layers=0,  # MTP modules stay behind
    dtype="bfloat16",
    param_dtype="float32",
    remat="block",
    unroll_layers=False,
    attention_chunk=0,
    logits_chunk=16384,
  )
  c.task = dict(
    name="jsonl",
    heldout_fraction=0.1,
    path="configs/rl/problems.jsonl",
    max_line_bytes=65536,
  )
  c.curriculum = dict(
    levels=(1,),
    start_level=1,
    threshold=0.7,
    smoothing=0.0,
    min_steps=1,
    top_share=1.0,
  )
  c.prompts_per_step = 16
  c.group_size = 16
  # R1 weighs both alike; here only accuracy should set a group apart.
  c.rewards = dict(accuracy=1.0, format=0.1)
  c.sampling = dict(
    temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=2048, stop_tokens=()
  )
  c.slots = 64
  c.sampling_mesh = dict(data=1, fsdp=1, expert=1, context=1, tensor=1)
  c.prompt_length = 512
  c.replay_routes = True
  c.objective = dict(  # None: as the row of rlm/rl/objectives.py says
    name="grpo",
    advantage_eps=1e-4,
    clip_low=None,
    clip_high=None,
    kl_weight=None,
  )
  c.selection = dict(
    rows="all",
    rows_per_rollout=256,
    num_minibatches=2,
    microbatch_rows=1,
  )
  c.mesh = dict(data=1, fsdp=1, expert=1, context=1, tensor=1)
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
    peak=1e-6,
    phases=(
      dict(shape="linear", steps=5, factor=1.0),
      dict(shape="constant", steps=1, factor=1.0),  # from then on
    ),
  )
  c.bias_update_rate = 0.0
  c.reference_every_steps = 20
  c.monitor_kl = False
  c.diagnostics_every_steps = 5
  c.traces_every_steps = 10
  c.traces_per_step = 4
  c.checkpoint_every_steps = 20
  c.keep_checkpoints = 2
  c.keep_best = None
  c.on_nonfinite = "stop"
  return c
