"""The families by name, and how a config section becomes a task."""

from typing import Any

from rlm.config import build, did_you_mean, plain
from rlm.tasks.base import Task
from rlm.tasks.chained_arithmetic import ChainedArithmetic
from rlm.tasks.column_addition import ColumnAddition
from rlm.tasks.column_multiplication import ColumnMultiplication
from rlm.tasks.countdown import Countdown
from rlm.tasks.jsonl import Jsonl

_FAMILIES: tuple[type[Task], ...] = (
  ColumnAddition,
  ColumnMultiplication,
  ChainedArithmetic,
  Countdown,
  Jsonl,
)
TASKS: dict[str, type[Task]] = {family.name: family for family in _FAMILIES}


def make_task(section: Any, where: str = "config.task") -> Task:
  """Builds a task from its config section.

  Args:
    section: a dict or ConfigDict with `name`, a key of TASKS, and the fields
      of that family's config class (`TASKS[name].config_class`).
    where: path of the section, for the messages.

  Raises:
    ValueError: an unknown family, a wrong key or value, or unreadable data.
  """
  values = plain(section)
  if not isinstance(values, dict) or "name" not in values:
    raise ValueError(
      f"{where}: expected a section with the key 'name', one of"
      f" {', '.join(TASKS)}."
    )
  name = values["name"]
  if name not in TASKS:
    raise ValueError(
      f"{where}.name: unknown task {name!r}{did_you_mean(name, TASKS)} The"
      f" tasks are {', '.join(TASKS)}."
    )
  family = TASKS[name]
  return family(build(family.config_class, values, where))
