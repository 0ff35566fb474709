"""What each stage started from and saw, as the configs in the folder say."""

from collections.abc import Collection
from pathlib import PurePath

from rlm.report.run_folder import Record, Run


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


def levels_seen(run: Run) -> dict[str, frozenset[int]]:
  """Stage -> levels that it drew for training; no entry where unknown.

  Read from the curriculum of RL, the sources of supervised stages and the
  problems of rejection sampling. A stage fed by another's answers, such as
  SFT on them, saw what that one drew.
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
      if isinstance(section, dict):
        levels |= _levels(section)
        path = section.get("path")
        if isinstance(path, str):
          levels |= found.get(PurePath(path).parent.name, frozenset())
    if levels:
      found[stage.name] = frozenset(levels)
  return found


def _levels(section: Record) -> set[int]:
  levels = section.get("levels")
  return {
    level
    for level in (levels if isinstance(levels, list) else [])
    if isinstance(level, int)
  }


def beyond_note(level: int, run: Run) -> str:
  """How far beyond training a level lies: "never seen", "not in RL"."""
  seen = levels_seen(run)
  if not seen:
    return "beyond training"
  if not any(level in levels for levels in seen.values()):
    return "never seen"
  in_rl = [
    stage.name
    for stage in run.stages
    if "curriculum" in stage.config and level in seen.get(stage.name, ())
  ]
  return "beyond training" if in_rl else "not in RL"


def rl_pair(run: Run, names: Collection[str]) -> tuple[str, str] | None:
  """What RL started from, and RL, both among `names`; None without such."""
  origin = started_from(run)
  after = [name for name in ("rl", "rl_final") if name in names]
  return _first_pair(
    run.config.get("rl_gain"),
    [
      *((origin[name], name) for name in after if name in origin),
      *(
        (start, name) for name in after for start in ("cold_start", "pretrain")
      ),
    ],
    names,
  )


def distilled_pair(run: Run, names: Collection[str]) -> tuple[str, str] | None:
  """The student before and after its teacher's traces, as `rl_pair`."""
  return _first_pair(
    run.config.get("distilled"), [("student_pretrain", "distill")], names
  )


def _first_pair(
  configured: object,
  guesses: list[tuple[str, str]],
  names: Collection[str],
) -> tuple[str, str] | None:
  if isinstance(configured, list) and len(configured) == 2:
    guesses = [(str(configured[0]), str(configured[1])), *guesses]
  return next((p for p in guesses if p[0] in names and p[1] in names), None)
