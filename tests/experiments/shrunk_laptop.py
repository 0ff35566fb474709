"""configs/r1/laptop.py with every number small: the whole recipe in seconds.

Its stages, their kinds and their order are the laptop's own, so that a change
there is tried here.  Sums are of two columns, named always alike, by
authors who do not err, so that few steps teach enough for rejection sampling to
find right answers.  Stages share shapes and schedules where that loses nothing:
most of the time goes into compiling.
"""

from configs.r1 import laptop

SIZES = dict(
  hidden_size=32,
  num_hidden_layers=2,
  intermediate_size=64,
  moe_intermediate_size=16,
  n_routed_experts=4,
  n_shared_experts=2,
  num_attention_heads=2,
  max_position_embeddings=64,
)
SCHEDULE = dict(
  peak=0.03,
  phases=(
    dict(shape="linear", steps=5, factor=1.0),
    dict(shape="constant", steps=115, factor=1.0),
    dict(shape="linear", steps=80, factor=0.05),
  ),
)
STEPS = dict(
  pretrain=200,
  cold_start=6,
  rl=6,
  sft=6,
  rl_final=2,
  student_pretrain=6,
  distill=6,
)
SAVED_EVERY = dict(pretrain=40, rl=2, distill=2)  # the rest at their end


def get_config():
  c = laptop.get_config()
  c.task.update(letters="abc", forget_carry=0.0, slip=0.0)
  c.models.model.update(SIZES)
  c.models.student.update(
    SIZES | dict(intermediate_size=32, first_k_dense_replace=2)
  )
  for name, stage in c.stages.items():
    if stage.experiment == "rl":
      shrink_rl(stage)
    elif stage.experiment != "reject":
      shrink_supervised(stage)
    if stage.experiment != "reject":
      stage.steps = STEPS[name]
      stage.checkpoint_every_steps = SAVED_EVERY.get(name, stage.steps)
  shrink_sampling(c.stages.rejection)
  c.stages.rejection.rejection.update(
    levels=(2,), problems_per_level=(64,), problems_per_chunk=24
  )
  shrink_sampling(c.evaluate)
  c.evaluate.evaluation.update(
    levels=(2,),
    levels_trained=(2,),
    problems_per_level=4,
    bootstrap_resamples=50,
    traces_per_level=2,
  )
  return c


def shrink_sampling(section):
  """Just the room for two columns."""
  section.update(slots=16, prompt_length=10)
  section.sampling.max_new_tokens = 25


def shrink_supervised(stage):
  stage.data.update(row_length=48, packing_window=64, heldout_rows=8)
  stage.batch.update(rows=16, first_rows=16, microbatch_rows=8)
  stage.mtp_weight = min(stage.mtp_weight, 0.1)
  stage.schedule = SCHEDULE
  stage.peak_flops = 1e10
  stage.eval.update(
    every_steps=100, batch_rows=8, levels=(2,), problems_per_level=8
  )
  for source in stage.data.sources.values():
    if source.kind == "stdlib":
      source.update(max_bytes=100_000, weight=0.25)
    if source.kind == "task":
      source.update(documents=500, levels=(2,), tagged=1.0)
      source.heldout_documents = min(source.heldout_documents, 8)


def shrink_rl(stage):
  shrink_sampling(stage)
  stage.curriculum.update(levels=(2,), start_level=2)
  stage.update(prompts_per_step=4, group_size=4)
  stage.selection.update(rows_per_rollout=16, microbatch_rows=8)
  stage.schedule = SCHEDULE | dict(peak=1e-3)
  stage.update(
    diagnostics_every_steps=2, traces_every_steps=2, traces_per_step=2
  )
