"""The keys of configs/pretrain, configs/sft and configs/distill."""

import dataclasses
from typing import Any, Literal

from rlm.checkpoint.config import KeepBest
from rlm.config import did_you_mean
from rlm.data.sources import DataConfig
from rlm.models.config import ModelConfig
from rlm.optim.config import OptimizerConfig, ScheduleConfig
from rlm.parallel.config import MeshConfig


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """Rows of a step, and how they grow; V3 section 4.2.

  Attributes:
    rows: rows of a full batch.
    first_rows: rows of the first step; `rows` for no ramp.
    ramp_steps: steps until the batch is full; 0 for no ramp.
    microbatch_rows: rows whose activations are held at once; divides both.
  """

  rows: int
  first_rows: int
  ramp_steps: int
  microbatch_rows: int

  def __post_init__(self):
    sizes = (self.rows, self.first_rows)
    if (
      self.microbatch_rows < 1
      or any(size < 1 or size % self.microbatch_rows for size in sizes)
      or self.first_rows > self.rows
    ):
      raise ValueError(
        f"first_rows={self.first_rows} and rows={self.rows} must be multiples"
        f" of microbatch_rows={self.microbatch_rows}, and the first not more"
        " than the second."
      )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What is measured on held-out rows.

  Attributes:
    every_steps: period; 0 measures after the last step only.
    batch_rows: rows scored at once.
    use_ema: whether to score the averaged weights.
    task: whose worked problems are scored, a key of the config's tasks; None
      for none.
    levels: their difficulties.
    problems_per_level: how many of each.
  """

  every_steps: int
  batch_rows: int
  use_ema: bool
  task: str | None
  levels: tuple[int, ...]
  problems_per_level: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that a run of this experiment depends on.

  Attributes:
    stage: name of the run on the console and in its summary.
    seed: of the weights, the data's order and its problems.
    steps: steps in all.
    init_from: folder of the run whose newest weights to start from; None
      starts from random ones.
    model: the model's sizes.
    tokenizer: "bytes", or a folder with a tokenizer.json.
    tasks: name -> section of a task, for sources of kind "task".
    data: what is trained on.
    batch: rows of a step.
    mesh: the devices, and what is divided among them.
    mtp_weight: lambda of V3 eq. 25, a number or a schedule.
    balance_weight: alpha of V3 eq. 17.
    bias_update_rate: gamma of V3 section 2.1.2, a number or a schedule.
    optimizer: AdamW or Muon.
    schedule: the learning rate.
    ema_decay: of the averaged weights; None for none.
    eval: what is measured.
    checkpoint_every_steps: period; the last step is always saved.
    keep_checkpoints: how many of the newest stay.
    keep_best: which one stays beside them, by what metric; None for none.
    on_nonfinite: "stop" with the batch saved, or "skip" the update.
    peak_flops: of all devices together, operations per second, for MFU; None
      takes the published one, or measures a matrix product where none is.
  """

  stage: str
  seed: int
  steps: int
  init_from: str | None
  model: ModelConfig
  tokenizer: str
  tasks: dict[str, Any]
  data: DataConfig
  batch: BatchConfig
  mesh: MeshConfig
  mtp_weight: float | ScheduleConfig
  balance_weight: float
  bias_update_rate: float | ScheduleConfig
  optimizer: OptimizerConfig
  schedule: ScheduleConfig
  ema_decay: float | None
  eval: EvalConfig
  checkpoint_every_steps: int
  keep_checkpoints: int
  keep_best: KeepBest | None
  on_nonfinite: Literal["stop", "skip"]
  peak_flops: float | None

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"steps={self.steps} must be at least 1.")
    if self.data.row_length > self.model.max_position_embeddings:
      raise ValueError(
        f"data.row_length={self.data.row_length} exceeds"
        f" model.max_position_embeddings={self.model.max_position_embeddings}."
        " Shorten the rows or widen the context."
      )
    for name, rows in (
      ("batch.microbatch_rows", self.batch.microbatch_rows),
      ("eval.batch_rows", self.eval.batch_rows),
    ):
      self.mesh.check_rows("mesh", name, rows)
    if self.data.row_length % self.mesh.context:
      raise ValueError(
        f"mesh.context={self.mesh.context} does not divide data.row_length="
        f"{self.data.row_length}. Make it a divisor."
      )
    if self.eval.use_ema and self.ema_decay is None:
      raise ValueError(
        "eval.use_ema needs averaged weights: set ema_decay, such as 0.99."
      )
    if self.eval.task is not None and self.eval.task not in self.tasks:
      raise ValueError(
        f"eval.task={self.eval.task!r} is not among the tasks"
        f" {', '.join(self.tasks) or '(none)'}."
      )
    if self.keep_best is not None:
      self._check_keep_best(self.keep_best.metric)

  def _check_keep_best(self, metric: str) -> None:
    """Raises ValueError where no save, or not each, has the metric."""
    measured = [f"heldout/{name}/bits_per_byte" for name in self.data.sources]
    if self.eval.task is not None:
      measured += [f"level/{n}/worked_accuracy" for n in self.eval.levels]
    if not metric.startswith(("heldout/", "level/")):
      return  # of every step, if there is such a one
    if metric not in measured:
      raise ValueError(
        f"keep_best.metric={metric!r} is not measured"
        + did_you_mean(metric, measured)
      )
    period = self.eval.every_steps
    if period == 0 or self.checkpoint_every_steps % period:
      raise ValueError(
        f"keep_best.metric={metric!r} is measured every eval.every_steps="
        f"{period} steps, and not at each save. Make checkpoint_every_steps="
        f"{self.checkpoint_every_steps} a multiple of it."
      )
