"""What a step of RL costs, by formula."""

import numpy as np

from rlm import flops
from rlm.models.config import ModelConfig
from rlm.rl.rollout import Rollout


def step_flops(
  cfg: ModelConfig,
  rollout: Rollout,
  *,
  group_size: int,
  row_length: int,
  trained_tokens: int,
  scorings: int,
  measured_rows: int,
  measurings: int,
) -> float:
  """Operations of sampling, updating, and every other forward pass.

  Padding is left out, and so are the MTP modules, which RL does not train; a
  measured draft of theirs counts as a pass of the whole model.

  Args:
    cfg: the model's sizes.
    rollout: the step's; a prompt is prefilled once for its group.
    group_size: G.
    row_length: T.
    trained_tokens: prompts and completions that were learned from.
    scorings: forward passes over each of them besides the update's own: by the
      policy that sampled, by the reference.
    measured_rows: first rows of the rollout that diagnostics read.
    measurings: forward passes over each of them.
  """
  prompts = rollout.prompt_lengths[::group_size]
  ends = rollout.prompt_lengths + rollout.lengths
  measured = int(np.sum(ends[:measured_rows]))
  passes = 3 * trained_tokens + scorings * trained_tokens
  passes += measurings * measured
  forward = flops.forward_flops_per_token(cfg, row_length, mtp=False)
  return passes * forward + flops.sampling_flops(
    cfg, prompts, rollout.lengths.reshape(-1, group_size)
  )
