"""What every family of problems shares: Problem, Solution, Task, the split.

Held-out problems are told by a hash of their content, not by seed or index:
whatever stage draws, with whatever seed, `split="train"` never gives one.
"""

import abc
import dataclasses
import hashlib
import math
from collections.abc import Iterable
from typing import ClassVar

from rlm.tasks.draws import Draws, RandomSource

SPLITS = ("train", "heldout")
_BUCKETS = 10_000  # resolution of heldout_fraction
# A split that holds a share s of the problems is missed n times in a row with
# probability (1 - s)^n; after 40 / s draws that is below e^-40, so a split not
# met by then is empty at this level.
_PATIENCE = 40


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
  """One problem and its reference answer.

  Attributes:
    task: name of the family.
    prompt: what the model is asked, without chat markers.
    answer: one right answer; `Task.verify` may accept others.
    level: difficulty, one of the task's levels.
    identity: canonical content. Problems of equal identity are the same
      problem differently dressed and fall in the same split.
    metadata: what the family needs to solve and check it; JSON values only.
  """

  task: str
  prompt: str
  answer: str
  level: int
  identity: str
  metadata: dict = dataclasses.field(hash=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Solution:
  """A written solution: what stands between the markers."""

  thinking: str
  answer: str


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """The config section of a family; families add their own fields.

  Attributes:
    name: the family, a key of `rlm.tasks.registry.TASKS`.
    heldout_fraction: share of the problems that no training may draw, in
      [0, 1), in steps of 0.0001.
  """

  name: str
  heldout_fraction: float

  def __post_init__(self):
    fraction = self.heldout_fraction
    if not 0 <= fraction < 1:
      raise ValueError(
        f"heldout_fraction is {fraction}, but must be at least 0 and"
        " below 1: the share of problems kept for evaluation, such as 0.1."
      )
    if 0 < fraction < 1 / _BUCKETS:
      raise ValueError(
        f"heldout_fraction is {fraction}, finer than the split's"
        f" resolution of {1 / _BUCKETS}. Use 0 or at least {1 / _BUCKETS}."
      )


def check_share(name: str, value: float) -> None:
  """Raises ValueError unless `value` is a probability."""
  if not 0 <= value <= 1:
    raise ValueError(
      f"{name} is {value}, but is a share and must lie in [0, 1]."
    )


def is_heldout(task: str, identity: str, heldout_fraction: float) -> bool:
  """Whether a problem is kept from training, by hash of its content.

  SHA-256 of family and identity, modulo 10,000, against the fraction: the
  same in every process and version, unlike Python's own hash().

  Args:
    task: name of the family.
    identity: `Problem.identity`.
    heldout_fraction: share held out, in [0, 1).
  """
  digest = hashlib.sha256(f"{task}\n{identity}".encode()).digest()
  bucket = int.from_bytes(digest, "big") % _BUCKETS
  return bucket < round(heldout_fraction * _BUCKETS)


def draw_slip(rng: RandomSource, slip: float) -> int:
  """What a careless author is off by in one step: mostly 0, else -1 or 1.

  Args:
    rng: source of the draw.
    slip: probability of being off.
  """
  if rng.random() >= slip:
    return 0
  return 1 if rng.random() < 0.5 else -1


class Task(abc.ABC):
  """A family of problems, drawn reproducibly and verified by rule.

  Attributes:
    name: the family's name, also the first part of every split hash.
    config_class: the dataclass of its config section.
    has_worked_solutions: whether `worked_solution` and `check_steps` mean
      anything; False for problems that come with an answer only.
    levels: difficulty levels, ascending.
  """

  name: ClassVar[str]
  config_class: ClassVar[type[TaskConfig]]
  has_worked_solutions: ClassVar[bool] = True
  levels: tuple[int, ...]

  def __init__(self, cfg: TaskConfig):
    self.heldout_fraction = cfg.heldout_fraction

  @abc.abstractmethod
  def draw(self, draws: Draws, level: int) -> Problem:
    """Draws one problem of either split; `problem` picks by split."""

  @abc.abstractmethod
  def worked_solution(self, problem: Problem) -> Solution:
    """The right solution, step by step."""

  @abc.abstractmethod
  def authored_solution(self, problem: Problem, rng: RandomSource) -> Solution:
    """The solution as one of the config's noisy authors would write it.

    Text that people write errs; these authors do too, each in his own
    habit, by the shares in the config. All shares zero: `worked_solution`.

    Args:
      problem: a problem of this family.
      rng: chooses the author and his slips; advanced.
    """

  @abc.abstractmethod
  def verify(self, problem: Problem, answer: str) -> bool:
    """Whether `answer` is right. Any text is allowed; nothing is executed."""

  @abc.abstractmethod
  def check_steps(self, problem: Problem, thinking: str) -> bool:
    """Whether every step of `thinking` is right and they lead to the end."""

  def problem_of(self, prompt: str) -> Problem | None:
    """The problem that a prompt states, so that any prompt can be checked.

    Args:
      prompt: any text, such as a person types.

    Returns:
      The problem as this family would have drawn it, or None where the prompt
      states none. Where a prompt does not tell an answer (countdown),
      `Problem.answer` is "" and `verify` alone works on it.
    """
    del prompt
    return None

  def problem(self, seed: int, index: int, level: int, split: str) -> Problem:
    """Problem `index` of a stream: a pure function of the four arguments.

    Problems of the other split are drawn again, deterministically.

    Args:
      seed: names the stream.
      index: place in the stream.
      level: one of `levels`.
      split: "train" or "heldout".

    Raises:
      ValueError: unknown level or split, or a split without problems.
    """
    self.check_levels((level,), "problem()")
    share = self._share(split)
    draws = Draws(self.name, seed, index, level, split)
    limit = math.ceil(_PATIENCE / share)
    for _ in range(limit):
      problem = self.draw(draws, level)
      if self.is_heldout(problem) == (split == "heldout"):
        return problem
    raise ValueError(
      f"{limit} draws of {self.name} at level {level} met no problem of the"
      f" {split!r} split: the level has too few problems for"
      f" heldout_fraction={self.heldout_fraction}. Drop the level or move"
      " the fraction towards 0.5."
    )

  def examples(self, level: int, split: str, count: int) -> list[Problem]:
    """Problems that show what a level is like; some may be equal.

    Args:
      level: one of `levels`.
      split: "train" or "heldout".
      count: how many; a family that holds a list of problems gives them all.

    Raises:
      ValueError: as `problem`.
    """
    return [self.problem(0, index, level, split) for index in range(count)]

  def distinct_problems(
    self, seed: int, count: int, level: int, split: str
  ) -> list[Problem]:
    """The first `count` problems of a stream that differ in identity.

    Evaluation wants these: at easy levels the held-out problems are few, and
    an interval over repeated problems would be narrower than the evidence.

    Raises:
      ValueError: as `problem`, or the split has fewer than `count`.
    """
    found: dict[str, Problem] = {}
    index = misses = 0
    while len(found) < count:
      problem = self.problem(seed, index, level, split)
      index += 1
      if found.setdefault(problem.identity, problem) is problem:
        misses = 0
        continue
      misses += 1
      if misses > _PATIENCE * (len(found) + 1):
        raise ValueError(
          f"{count} distinct problems were asked of {self.name} at level"
          f" {level}, but its {split!r} split seems to hold"
          f" {len(found)}. Ask for fewer, or use harder levels."
        )
    return list(found.values())

  def is_heldout(self, problem: Problem) -> bool:
    """Whether training must not see `problem`."""
    return is_heldout(problem.task, problem.identity, self.heldout_fraction)

  def check_levels(self, levels: Iterable[int], where: str) -> None:
    """Raises ValueError if this family lacks one of `levels`.

    Args:
      levels: what a config asks for.
      where: the config key it asks in, for the message.
    """
    for level in levels:
      if level not in self.levels:
        raise ValueError(
          f"{where} asks {self.name} for level {level}, but it has levels"
          f" {', '.join(map(str, self.levels))}."
        )

  def _share(self, split: str) -> float:
    """The share of all problems that `split` holds; never zero."""
    if split not in SPLITS:
      raise ValueError(f"split is {split!r}, but must be one of {SPLITS}.")
    if split == "train":
      return 1 - self.heldout_fraction
    if self.heldout_fraction == 0:
      raise ValueError(
        f"held-out problems were asked of {self.name}, but its"
        " heldout_fraction is 0. Set it above 0, for example to 0.1."
      )
    return self.heldout_fraction
