"""What each stage started from and saw, as the configs in the folder say."""

from collections.abc import Collection
from pathlib import PurePath

from rlm.report.run_folder import Record, Run, recipe_order
from rlm.report.series import series


def started_from(run: Run) -> dict[str, str]:
  """Stage -> the stage whose weights it began with; no entry for random ones.

  An evaluation's or a stage's own config says so in `init_from`, a path.
  """
  found = {}
  for stage in run.stages:
    source = stage.config.get("init_from")
    if isinstance(source, str) and source:
      found[stage.name] = PurePath(source).name
  return found


def descent(run: Run, name: str) -> list[str]:
  """The stages whose weights `name` descends from, then `name` itself."""
  origin = started_from(run)
  line = [name]
  while (source := origin.get(line[0])) is not None and source not in line:
    line.insert(0, source)
  return line


def levels_seen(run: Run) -> dict[str, frozenset[int]]:
  """Stage -> levels that it drew for training; no entry where unknown.

  Read from the curriculum of RL, the sources of supervised stages and the
  problems of rejection sampling. A stage fed by another's answers, such as
  SFT on them, saw what that one drew. Levels above the highest that a
  curriculum logged were never reached; a source of no weight is not trained on.
  """
  found: dict[str, frozenset[int]] = {}
  for stage in run.stages:
    sections = [stage.config.get(key) for key in ("curriculum", "rejection")]
    data = stage.config.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if isinstance(sources, dict):
      sections += sources.values()
    levels: set[int] = set()
    for section in sections:
      if isinstance(section, dict) and section.get("weight") != 0:
        levels |= _levels(section)
        path = section.get("path")
        if isinstance(path, str):
          levels |= found.get(PurePath(path).parent.name, frozenset())
    reached = series(stage.metrics, "curriculum/level").values
    if len(reached):
      levels = {level for level in levels if level <= reached.max()}
    if levels:
      found[stage.name] = frozenset(levels)
  return found


def drawn_by_rl(run: Run, name: str | None = None) -> frozenset[int]:
  """Levels that the RL stages drew; of `name`'s descent only, if given."""
  seen = levels_seen(run)
  names = list(seen) if name is None else descent(run, name)
  rl = {stage.name for stage in run.stages if "curriculum" in stage.config}
  return frozenset().union(*(seen.get(n, ()) for n in names if n in rl))


def _levels(section: Record) -> set[int]:
  levels = section.get("levels")
  return {
    level
    for level in (levels if isinstance(levels, list) else [])
    if isinstance(level, int)
  }


def level_note(level: int, run: Run, name: str | None = None) -> str:
  """Which training saw a level that RL did not draw.

  Args:
    level: of the problems.
    run: whose stages' configs say what they drew.
    name: only the stages that this one descends from; None for all.

  Returns:
    "never seen by any stage", "seen in pretraining only" (by stages that began
    with random weights) or "seen in training, not drawn by RL"; "" for a level
    that RL drew, or where there was no RL, or no config says.
  """
  seen, origin = levels_seen(run), started_from(run)
  names = list(seen) if name is None else descent(run, name)
  if not any(n in seen for n in names):
    return ""
  saw = [n for n in names if level in seen.get(n, ())]
  if not saw:
    return "never seen by any stage"
  if level in drawn_by_rl(run, name):
    return ""
  if not any(n in origin for n in saw):
    return "seen in pretraining only"
  return "seen in training, not drawn by RL" if drawn_by_rl(run, name) else ""


def rl_pair(run: Run, names: Collection[str]) -> tuple[str, str] | None:
  """What RL started from, and RL, as the recipe's config names them.

  Args:
    run: whose `rl_gain` to read.
    names: of the stages at hand; None unless both are among them.
  """
  return _pair(run.config.get("rl_gain"), names)


def distilled_pair(run: Run, names: Collection[str]) -> tuple[str, str] | None:
  """The student before and after its teacher's traces, as `rl_pair`."""
  return _pair(run.config.get("distilled"), names)


def _pair(configured: object, names: Collection[str]) -> tuple[str, str] | None:
  if not isinstance(configured, list) or len(configured) != 2:
    return None
  before, after = map(str, configured)
  return (before, after) if before in names and after in names else None


def last_of_model(run: Run, names: Collection[str]) -> str | None:
  """The last stage among `names` that trained the recipe's first model."""
  stages = run.config.get("stages")
  if not isinstance(stages, dict):
    return None
  order = recipe_order(run.config)

  def model(name: str) -> object:
    section = stages.get(name)
    return section.get("model") if isinstance(section, dict) else None

  same = [n for n in order if n in names and model(n) == model(order[0])]
  return same[-1] if same else None
