r"""Fine-tunes a published model on your own conversations.

  python -m experiments.sft --config=configs/sft/published.py \
    --workdir=runs/sft_published \
    --config.init_from=DeepSeek-R1-Distill-Qwen-1.5B \
    --config.data.sources.traces.path=conversations.jsonl

`init_from` is a folder with config.json, safetensors, tokenizer and chat
template, by which conversations are written (docs/checkpoints.md). The learning
rate is that of V3's own fine-tuning, 5e-6 falling to 1e-6. Not run at full
size: no such weights were at hand.
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.stage = "sft"
  c.seed = 0
  c.steps = 200
  c.init_from = None  # the published folder
  c.tokenizer = None  # the one in init_from
  c.model = dict(  # the rest is what init_from says
    num_nextn_predict_layers=0,  # MTP modules stay behind
    dtype="bfloat16",
    param_dtype="float32",
    remat="block",
    unroll_layers=False,
    attention_chunk=512,
    logits_chunk=16384,
  )
  c.tasks = {}
  c.data = dict(
    row_length=4096,
    packing_window=256,
    heldout_rows=8,
    sources=dict(
      traces=dict(
        kind="messages",
        weight=1.0,
        layout="isolated",
        path="conversations.jsonl",
      ),
    ),
  )
  c.batch = dict(rows=16, first_rows=16, ramp_steps=0, microbatch_rows=1)
  c.mesh = dict(data=1, fsdp=1, expert=1, context=1, tensor=1)
  c.mtp_weight = 0.0
  c.balance_weight = 1e-4
  c.bias_update_rate = 0.0
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
    peak=5e-6,
    phases=(
      dict(shape="linear", steps=10, factor=1.0),
      dict(shape="cosine", steps=190, factor=0.2),
    ),
  )
  c.ema_decay = None
  c.eval = dict(
    every_steps=50,
    batch_rows=1,
    use_ema=False,
    task=None,
    levels=(),
    problems_per_level=0,
  )
  c.checkpoint_every_steps = 50
  c.keep_checkpoints = 2
  c.keep_best = None
  c.on_nonfinite = "stop"
  c.peak_flops = None  # measured; set the accelerator's
  return c
