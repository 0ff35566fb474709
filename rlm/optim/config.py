"""The sections of a config that say how parameters are updated; jax-free."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Phase:
  """One stretch of a schedule.

  Attributes:
    shape: "linear" and "cosine" go from the factor of the phase before (0
      before the first) to `factor`; "constant" holds `factor` throughout.
    steps: its length.
    factor: times the schedule's peak.
  """

  shape: Literal["linear", "cosine", "constant"]
  steps: int
  factor: float

  def __post_init__(self):
    if self.steps < 1 or self.factor < 0:
      raise ValueError(
        f"a phase needs steps >= 1 and factor >= 0, got {self.steps=},"
        f" {self.factor=}. Leave out a phase of no steps."
      )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """A number over steps: a learning rate, or a loss weight that changes.

  Attributes:
    peak: the value at a factor of 1.
    phases: one after the other; the last factor holds for ever after.
  """

  peak: float
  phases: tuple[Phase, ...]

  def __post_init__(self):
    if not self.phases or self.peak < 0:
      raise ValueError(
        "a schedule needs at least one phase and a peak >= 0, got"
        f" {len(self.phases)} phases and {self.peak=}. For a constant value"
        " give one phase, dict(shape='constant', steps=1, factor=1.0)."
      )


@dataclasses.dataclass(frozen=True)
class MuonConfig:
  """Muon for hidden matrices (`optimizer.MATRICES`), AdamW for the rest.

  Attributes:
    momentum: decay of the averaged gradient, Nesterov form.
    ns_steps: Newton-Schulz steps; 5 is usual.
    update_rms: None scales an update by sqrt(max(1, out / in)) (Jordan); a
      number by sqrt(max(in, out)) times it, so that the update's root mean
      square is that number whatever the shape (Moonlight, 0.2).
    adam_factor: learning rate of the AdamW parameters over that of Muon.
  """

  momentum: float
  ns_steps: int
  update_rms: float | None
  adam_factor: float

  def __post_init__(self):
    if self.ns_steps < 1:
      raise ValueError(f"{self.ns_steps=} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Every number of an update but the learning rate.

  Attributes:
    clip_norm: largest global norm of the gradient.
    b1: decay of Adam's first moment.
    b2: decay of Adam's second moment.
    eps: Adam's, in units of gradient; unpublished for V3.
    weight_decay: decoupled, times the learning rate.  Matrices, router and
      head decay; norms and the embedding do not (a row of the embedding that
      is rarely read would only shrink).
    moment_dtype: type in which moments are stored; V3 keeps bfloat16.
    muon: None for AdamW throughout.
  """

  clip_norm: float
  b1: float
  b2: float
  eps: float
  weight_decay: float
  moment_dtype: Literal["float32", "bfloat16"]
  muon: MuonConfig | None

  def __post_init__(self):
    if self.clip_norm <= 0:
      raise ValueError(
        f"{self.clip_norm=} must be above 0; a large number never clips."
      )
    if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
      raise ValueError(f"{self.b1=} and {self.b2=} must be in [0, 1).")
