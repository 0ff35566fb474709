"""Who wrote the worked examples: whether they were made to err, and how much.

A recipe may have its corpus written by authors who err, so that RL has
something to teach. Whoever reads RL's gain has to know it; the figures come
from the stages' configs and from drawing such examples anew.
"""

import dataclasses

from rlm.report.lineage import descent
from rlm.report.run_folder import Record, Run, Stage, inline_label
from rlm.report.text import is_number
from rlm.tasks.base import Task
from rlm.tasks.draws import Draws
from rlm.tasks.registry import make_task

# Fields of the task sections that make authors err, in words.
_NOISE = {
  "forget_carry": "{:.3g}% of the authors never carry",
  "misread_minus": "{:.3g}% of the authors read every minus as a plus",
  "settle": "{:.3g}% of the authors give up on a wrong answer",
  "slip": "each step slips with a chance of {:.3g}%",
}
_DRAWN = 4000  # per level; a share is then known to about a point


@dataclasses.dataclass(frozen=True)
class Authors:
  """The noisy authors of one task.

  Attributes:
    task: its name.
    stages: labels of the stages that learned from them.
    noise: how they err, in words.
    wrong: level -> share of their solutions whose answer is wrong; empty
      where they could not be drawn.
  """

  task: str
  stages: tuple[str, ...]
  noise: tuple[str, ...]
  wrong: dict[int, float]

  @property
  def sentence(self) -> str:
    """What a reader of RL's gain has to know, without the full stop."""
    stages = " and ".join(inline_label(label) for label in self.stages)
    text = (
      f"It started from examples that err by design: the worked problems of"
      f" {self.task.replace('_', ' ')} in {stages} are by simulated authors who"
      f" make mistakes ({'; '.join(self.noise)})"
    )
    if not self.wrong:
      return text
    shares = ", ".join(
      f"about {100 * share:.0f}% at level {level}"
      for level, share in self.wrong.items()
    )
    return f"{text}, so that the answer is wrong in {shares}"


def noisy_authors(run: Run, name: str) -> list[Authors]:
  """The noisy authors that a stage's weights learned from, task by task.

  Args:
    run: with the stages' configs.
    name: the stage; its own sources count, and those of all it descends from.

  Returns:
    [] where no source says author="noisy", or the noise is zero.
  """
  line = descent(run, name)
  found: dict[str, tuple[Record, list[str], set[int]]] = {}
  for stage in run.stages:
    if stage.name in line:
      for task, section, levels in _sources(stage):
        _, stages, seen = found.setdefault(task, (section, [], set()))
        if stage.label not in stages:
          stages.append(stage.label)
        seen |= levels
  return [
    Authors(task, tuple(stages), noise, _wrong(section, sorted(levels)))
    for task, (section, stages, levels) in found.items()
    if (noise := _noise(section))
  ]


def _sources(stage: Stage) -> list[tuple[str, Record, set[int]]]:
  """(task, its section, levels) of each noisy source that is trained on."""
  data, tasks = stage.config.get("data"), stage.config.get("tasks")
  sources = data.get("sources") if isinstance(data, dict) else None
  if not isinstance(sources, dict) or not isinstance(tasks, dict):
    return []
  found = []
  for source in sources.values():
    if not isinstance(source, dict) or source.get("author") != "noisy":
      continue
    section, levels = tasks.get(source.get("task")), source.get("levels")
    if source.get("weight") != 0 and isinstance(section, dict):
      drawn = levels if isinstance(levels, list) else []
      found.append((str(source["task"]), section, set(drawn)))
  return found


def _noise(section: Record) -> tuple[str, ...]:
  return tuple(
    words.format(100 * section[key])
    for key, words in _NOISE.items()
    if is_number(section.get(key)) and section[key] > 0
  )


def _wrong(section: Record, levels: list[int]) -> dict[int, float]:
  """Level -> share of wrong answers among `_DRAWN` authored solutions."""
  try:
    task = make_task(section)
  except ValueError:  # a config of another version
    return {}
  return {
    level: _wrong_share(task, level) for level in levels if level in task.levels
  }


def _wrong_share(task: Task, level: int) -> float:
  wrong = 0
  for i in range(_DRAWN):
    problem = task.problem(0, i, level, "train")
    solution = task.authored_solution(problem, Draws("authors", level, i))
    wrong += not task.verify(problem, solution.answer)
  return wrong / _DRAWN
