"""The sections of an RL config; jax-free, so that a wrong key stops at once."""

import dataclasses
from typing import Literal

from rlm.parallel.config import MeshConfig


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """A row of `rlm.rl.objectives.OBJECTIVES`, and what the run changes of it.

  Attributes:
    name: the row.
    advantage_eps: added to the std of rewards; ours, no paper states it.
    clip_low: None for the row's own; likewise the next two.
    clip_high: see `Objective`.
    kl_weight: see `Objective`.
  """

  name: Literal["grpo", "grpo_r1", "dr_grpo", "dapo"]
  advantage_eps: float
  clip_low: float | None
  clip_high: float | None
  kl_weight: float | None

  def __post_init__(self):
    for key in ("clip_low", "clip_high", "kl_weight"):
      value = getattr(self, key)
      if value is not None and value < 0:
        raise ValueError(f"{key}={value} is negative. Make it 0 or more.")
    if self.advantage_eps <= 0:
      raise ValueError(
        f"advantage_eps={self.advantage_eps} divides by zero when all rewards"
        " of a group tie. Make it positive, such as 1e-4."
      )


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
  """How a rollout becomes updates.

  Attributes:
    rows: "all" learns from every completion, as R1; "untied" only from groups
      whose rewards differ, which also leaves tied groups out of the averages
      and of the KL, as DAPO.
    rows_per_rollout: rows of all minibatches together; with "all" it must be
      the whole rollout, with "untied" it is the most that are kept.
    num_minibatches: updates per rollout, over a random split of its rows.
    microbatch_rows: rows of one forward and backward pass; divides the rows
      of a minibatch and changes no result but by rounding.
  """

  rows: Literal["all", "untied"]
  rows_per_rollout: int
  num_minibatches: int
  microbatch_rows: int

  def __post_init__(self):
    sizes = (self.rows_per_rollout, self.num_minibatches, self.microbatch_rows)
    if min(sizes) < 1:
      raise ValueError(
        f"rows_per_rollout={self.rows_per_rollout}, num_minibatches="
        f"{self.num_minibatches} and microbatch_rows={self.microbatch_rows}"
        " must be at least 1."
      )
    if self.rows_per_rollout % (self.num_minibatches * self.microbatch_rows):
      raise ValueError(
        f"rows_per_rollout={self.rows_per_rollout} does not split into"
        f" num_minibatches={self.num_minibatches} of whole microbatches of"
        f" microbatch_rows={self.microbatch_rows}. Make it a multiple of their"
        " product."
      )

  @property
  def rows_per_minibatch(self) -> int:
    """Rows of one update, padding rows included."""
    return self.rows_per_rollout // self.num_minibatches

  @property
  def num_microbatches(self) -> int:
    """Microbatches of one update."""
    return self.rows_per_minibatch // self.microbatch_rows

  def check_mesh(self, mesh: MeshConfig) -> None:
    """Raises ValueError if the updates do not divide among these devices."""
    mesh.check_rows("mesh", "selection.microbatch_rows", self.microbatch_rows)
    mesh.check_whole_rows("mesh", "RL scores each token beside the one before")

  def check(self, prompts: int, group_size: int) -> None:
    """Raises ValueError if a rollout of this size cannot be used so."""
    rows = prompts * group_size
    if group_size < 2:
      raise ValueError(
        f"{group_size=} leaves nothing to compare a completion with. Make it"
        " at least 2."
      )
    if self.rows_per_rollout > rows or (
      self.rows == "all" and self.rows_per_rollout != rows
    ):
      raise ValueError(
        f"selection.rows={self.rows!r} cannot take rows_per_rollout="
        f"{self.rows_per_rollout} of a rollout of {rows} ({prompts} prompts"
        f" x {group_size} completions). Set rows_per_rollout={rows}"
        + (", or rows='untied' with fewer." if self.rows == "all" else ".")
      )


@dataclasses.dataclass(frozen=True)
class RejectionConfig:
  """What is asked, and what is kept of the answers.

  Attributes:
    levels: levels to ask, each once.
    problems_per_level: distinct training problems of each of `levels`.
    samples_per_problem: n.
    require_steps: keep an answer only if its steps are right too.
    keep_per_problem: the most that one problem gives; easy problems, which are
      solved every time, would crowd out the others.
    problems_per_chunk: problems between two saves. It changes no result.
  """

  levels: tuple[int, ...]
  problems_per_level: tuple[int, ...]
  samples_per_problem: int
  require_steps: bool
  keep_per_problem: int
  problems_per_chunk: int

  def __post_init__(self):
    if not self.levels or len(set(self.levels)) != len(self.levels):
      raise ValueError(
        f"levels={self.levels} must name one or more levels, each once."
      )
    if len(self.problems_per_level) != len(self.levels):
      raise ValueError(
        f"problems_per_level={self.problems_per_level} needs one number for"
        f" each of levels={self.levels}."
      )
    for name in (
      "samples_per_problem",
      "keep_per_problem",
      "problems_per_chunk",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
    if min(self.problems_per_level) < 1:
      raise ValueError(
        f"problems_per_level={self.problems_per_level}: each must be at least"
        " 1. Leave a level out to ask none of it."
      )
    if self.keep_per_problem > self.samples_per_problem:
      raise ValueError(
        f"keep_per_problem={self.keep_per_problem} exceeds"
        f" samples_per_problem={self.samples_per_problem}. Lower the first or"
        " raise the second."
      )

  @property
  def num_problems(self) -> int:
    """Problems of all levels."""
    return sum(self.problems_per_level)
