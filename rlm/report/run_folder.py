"""Reads what a run left in its folder, whatever of it is there.

A folder is one run (`metrics.jsonl` beside `config.json`) or a whole recipe: a
sub-folder per stage, each a run of its own, `evaluate/<stage>/summary.json`
for the held-out accuracy after a stage, and a top-level `summary.json`. A
report is most wanted when a run broke, so nothing here insists: a missing
file is empty, an unreadable line is counted and passed over.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# The recipe's stages in the order in which they run, and what to call them.
STAGES = {
  "pretrain": "Pretraining",
  "cold_start": "Cold start",
  "rl": "RL",
  "rejection": "Rejection sampling",
  "sft": "SFT",
  "rl_final": "Final RL",
  "student_pretrain": "Student base",
  "distill": "Distilled student",
}
# What a study adds to a recipe's folder.
CONTROLS = {
  "sft_control": "SFT control",
  "sft_verified": "SFT on verified",
  "student_rl": "Student RL",
}
_COST = ("seconds", "tokens", "flops")
_NOT_STAGES = {"evaluate", "traces", "tensorboard", "checkpoints"}

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One run's records.

  Attributes:
    name: its folder's name, a key of `STAGES` if the recipe made it.
    path: its folder.
    metrics: the lines of metrics.jsonl, one dict a step.
    timing: the lines of timing.jsonl.
    summary: summary.json; empty while the stage runs.
    config: config.json, as resolved.
    run: run.json: versions, commit, devices, command.
    unreadable: lines of the two .jsonl files that are not JSON objects.
  """

  name: str
  path: Path
  metrics: list[Record]
  timing: list[Record]
  summary: Record
  config: Record
  run: Record
  unreadable: int

  @property
  def label(self) -> str:
    return stage_label(self.name)


@dataclasses.dataclass(frozen=True)
class Run:
  """A folder's contents.

  Attributes:
    path: the folder.
    is_recipe: stages in sub-folders; otherwise `stages` holds one run.
    stages: in the order in which they ran.
    evaluations: stage name -> its held-out evaluation's summary.json.
    summary: the top-level summary.json.
    config: the top-level config.json.
    run: the top-level run.json.
    missing: stages of the recipe that left nothing.
  """

  path: Path
  is_recipe: bool
  stages: list[Stage]
  evaluations: dict[str, Record]
  summary: Record
  config: Record
  run: Record
  missing: list[str]


def stage_label(name: str) -> str:
  """A stage's name for readers: cold_start -> Cold start."""
  return (STAGES | CONTROLS).get(name, name.replace("_", " "))


def inline_label(label: str) -> str:
  """A label inside a sentence: Cold start -> cold start, but RL stays RL."""
  return label if label[:2].isupper() else label[:1].lower() + label[1:]


def recipe_order(config: Record) -> list[str]:
  """The stages of a recipe as its config orders them, else as `STAGES`."""
  order = config.get("order")
  return [str(n) for n in order] if isinstance(order, list) else list(STAGES)


def read_jsonl(path: Path) -> tuple[list[Record], int]:
  """The JSON objects of a file, one a line, and how many lines are not one.

  The last line of a run that was killed may be torn. NaN is read as a float.
  A file that is not there gives ([], 0).
  """
  records: list[Record] = []
  unreadable = 0
  for record in _lines(path):
    if record is None:
      unreadable += 1
    else:
      records.append(record)
  return records, unreadable


def _lines(path: Path) -> Iterator[Record | None]:
  if not path.is_file():
    return
  with path.open(encoding="utf-8", errors="replace") as file:
    for line in file:
      if line.strip():
        yield _parse(line)


def read_json(path: Path) -> Record:
  """The JSON object in a file; {} when there is none or it is unreadable."""
  if not path.is_file():
    return {}
  return _parse(path.read_text(encoding="utf-8", errors="replace")) or {}


def _parse(text: str) -> Record | None:
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) else None


def read_traces(path: Path) -> list[Record]:
  """Every trace of a run: traces/*.jsonl in the order of their names."""
  files = sorted(
    (path / "traces").glob("*.jsonl"), key=lambda p: natural(p.name)
  )
  return [record for file in files for record in read_jsonl(file)[0]]


def natural(name: str) -> list[tuple[int, str]]:
  """Sort key by the numbers in a name: step_9 before step_10."""
  parts = re.split(r"(\d+)", name)
  return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]


def read_stage(path: Path, name: str | None = None) -> Stage:
  """The records of one run; `name` is the folder's unless given."""
  metrics, bad_metrics = read_jsonl(path / "metrics.jsonl")
  timing, bad_timing = read_jsonl(path / "timing.jsonl")
  return Stage(
    name=path.resolve().name if name is None else name,
    path=path,
    metrics=metrics,
    timing=timing,
    summary=read_json(path / "summary.json"),
    config=read_json(path / "config.json"),
    run=read_json(path / "run.json"),
    unreadable=bad_metrics + bad_timing,
  )


def _is_run(path: Path) -> bool:
  return any(
    (path / name).exists()
    for name in ("metrics.jsonl", "run.json", "summary.json", "traces")
  )


def read_run(workdir: Path | str) -> Run:
  """Reads the folder of a recipe or of a single run.

  Raises:
    ValueError: nothing in `workdir` was written by a run.
  """
  path = Path(workdir)
  if not path.is_dir():
    raise ValueError(f"No such folder: {path}. Give the run's --workdir.")
  summary = read_json(path / "summary.json")
  config = read_json(path / "config.json")
  order = recipe_order(config)

  def place(name: str) -> tuple[int, str]:  # then unknown stages, by name
    return (order.index(name) if name in order else len(order), name)

  folders = sorted(
    (
      p
      for p in path.iterdir()
      if p.is_dir() and p.name not in _NOT_STAGES and _is_run(p)
    ),
    key=lambda p: place(p.name),
  )
  evaluations = {
    p.parent.name: read_json(p) for p in path.glob("evaluate/*/summary.json")
  }
  is_recipe = bool(folders or evaluations or "stages" in summary)
  if is_recipe:
    # A recipe's summary repeats the essentials: they stand in for an
    # evaluation folder that was not copied along.
    for entry in summary_stages(summary):
      if entry.get("pass_at_1"):
        cost = entry.get("evaluation")  # the entry's own is the stage's
        kept = {k: v for k, v in entry.items() if k not in _COST}
        kept |= cost if isinstance(cost, dict) else {}
        evaluations.setdefault(str(entry["name"]), kept)
    names = sorted(evaluations, key=place)
    evaluations = {name: evaluations[name] for name in names}
    stages = [read_stage(p) for p in folders]
  elif _is_run(path):
    stages = [read_stage(path)]
    if "pass_at_1" in summary:
      name = str(summary["stage"]) if "stage" in summary else stages[0].name
      evaluations = {name: summary}
  else:
    raise ValueError(
      f"{path} holds no run: neither metrics.jsonl nor a stage's folder"
      f" ({', '.join(STAGES)}). Give the run's --workdir."
    )
  present = {stage.name for stage in stages}
  return Run(
    path=path,
    is_recipe=is_recipe,
    stages=stages,
    evaluations=evaluations,
    summary=summary,
    config=config,
    run=read_json(path / "run.json"),
    missing=[n for n in order if n not in present] if is_recipe else [],
  )


def summary_stages(summary: Record) -> list[Record]:
  """The named entries of a recipe summary's `stages`; [] without any."""
  entries = summary["stages"] if "stages" in summary else []
  if not isinstance(entries, list):
    return []
  return [e for e in entries if isinstance(e, dict) and "name" in e]


def flat(value: object, prefix: str = "") -> list[tuple[str, object]]:
  """Nested dicts -> [("model.hidden_size", 64), ...], in order."""
  if not isinstance(value, Mapping) or not value:
    return [(prefix, value)] if prefix else []
  return [
    pair
    for key, inner in value.items()
    for pair in flat(inner, f"{prefix}.{key}" if prefix else str(key))
  ]
