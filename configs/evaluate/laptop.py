r"""Held-out accuracy on column addition, by level.

  python -m experiments.evaluate \
    --config=configs/evaluate/laptop.py --workdir=runs/rl_evaluated

Of runs/rl (configs/rl/laptop.py); another with --config.init_from=RUN.  RL drew
levels 2 to 5, pretraining 2 to 6, nothing 7.
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.init_from = "runs/rl"
  c.stage = "rl"
  c.task = dict(
    name="column_addition",
    heldout_fraction=0.1,
    letters="abcdefghijklmnopqrstuvwxyz",
    forget_carry=0.5,
    slip=0.02,
  )
  c.evaluation = dict(
    seed=0,
    levels=(2, 3, 4, 5, 6, 7),
    levels_trained=(2, 3, 4, 5),  # the headline: those that RL draws
    problems_per_level=128,
    samples_per_problem=8,
    ks=(1, 8),
    bootstrap_resamples=2000,
    traces_per_level=8,
    samples_per_trace=2,
  )
  c.sampling = dict(
    temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=80, stop_tokens=()
  )
  c.slots = 256
  c.sampling_mesh = dict(data=2, fsdp=1, expert=1, context=1, tensor=1)
  c.prompt_length = 28
  return c
