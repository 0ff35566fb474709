r"""The right answers of a laptop RL run, as data for fine-tuning.

  python -m experiments.reject \
    --config=configs/reject/laptop.py --workdir=runs/rejection

Of each problem the two shortest solutions with a right answer are kept.
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.stage = "rejection"
  c.seed = 0
  c.init_from = "runs/rl"
  c.task = dict(
    name="column_addition",
    heldout_fraction=0.1,  # as in training: held-out problems are never asked
    letters="abcdefghijklmnopqrstuvwxyz",
    forget_carry=0.5,
    slip=0.02,
  )
  c.rejection = dict(
    levels=(2, 3, 4, 5),
    problems_per_level=(200, 300, 300, 400),
    samples_per_problem=4,
    require_steps=False,  # as R1, which looks at the answer
    keep_per_problem=2,
    problems_per_chunk=200,
  )
  c.sampling = dict(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=80)
  c.slots = 256
  c.sampling_mesh = dict(data=2, fsdp=1, expert=1, context=1, tensor=1)
  c.prompt_length = 32
  return c
