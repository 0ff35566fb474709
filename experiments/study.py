r"""Several seeds of a recipe against controls: do R1's findings hold here?

  python -m experiments.study \
    --config=configs/r1/study.py --workdir=runs/study

Each seed runs the whole recipe in seed_K/ (a recipe's folder like any other,
with its report) and three controls beside its stages there:

  sft_control   the cold start's fine-tuning, continued from the cold start with
                as many FLOPs as RL used, sampling included
  sft_verified  the same on worked solutions without an error: what a teacher
                who is always right would give
  student_rl    RL as in the recipe on the small model that distillation used,
                from that model's pretraining

Then comparison.json and comparison.html hold every stage of every seed, and
R1's findings (RL raises accuracy, more than SFT of equal compute; responses
lengthen; distillation beats RL on the small model) each with its verdict,
whichever way it falls.  The same command continues it, to the bit.
"""

import copy
import dataclasses
import math
import pathlib
import runpy
from typing import Any

from experiments import evaluate, launch, r1
from rlm import files
from rlm.config import build, did_you_mean, plain
from rlm.stopping import Stop, Stopped, catch_signals

SFT_CONTROLS = ("sft_control", "sft_verified")
STUDENT_RL = "student_rl"


@dataclasses.dataclass(frozen=True)
class Config:
  """The keys of configs/r1/study.py.

  Attributes:
    recipe: the recipe's config file; its rl_gain and distilled name the stages
      that are compared.
    recipe_changes: keys of the recipe with other values here, nested as there.
    seeds: of the whole recipe, one run each.
    sft_control: keys of the stage that RL started from with other values in
      the control; its steps and schedules follow from the compute.
    sft_verified: likewise, in the control on solutions without an error.
    student_rl: keys of the RL stage with other values in its control.
    confidence: of the intervals over seeds, such as 0.95.
  """

  recipe: str
  recipe_changes: dict
  seeds: tuple[int, ...]
  sft_control: dict
  sft_verified: dict
  student_rl: dict
  confidence: float

  def __post_init__(self):
    if not self.seeds or len(set(self.seeds)) != len(self.seeds):
      raise ValueError(
        f"seeds={self.seeds} must name one or more seeds, each once."
      )
    if not 0 < self.confidence < 1:
      raise ValueError(
        f"confidence={self.confidence} must lie between 0 and 1, such as 0.95."
      )


def run(c: Any, workdir: str, *, console: Any = None) -> dict[str, Any]:
  """Runs the study, or continues it; returns its summary."""
  import rich.console

  from rlm.eval.comparison import compare, r1_claims
  from rlm.report.comparison import comparison_tables, write_comparison
  from rlm.workdir import open_workdir

  # --- Every config is checked before the first stage runs. ------------------
  cfg = build(Config, plain(c))
  recipes = {seed: load_recipe(cfg, seed) for seed in cfg.seeds}
  launch.offer_cpu_devices(recipes[cfg.seeds[0]])  # jax is not yet imported
  root = pathlib.Path(workdir)
  first = cfg.seeds[0]
  check_recipe(
    add_controls(cfg, recipes[first], control_steps=1), root / f"seed_{first}"
  )
  console = console or rich.console.Console()
  folder = open_workdir(root, plain(c) | {"recipe": recipes[first]})
  page = folder.path / "comparison.html"
  if folder.summary is not None:
    folder.say_finished(console)
    console.print(comparison_tables(files.read_json(page.with_suffix(".json"))))
    return folder.summary

  # --- Seed by seed: the recipe, then its controls. --------------------------
  evaluations, summaries = {}, {}
  with catch_signals() as stop:
    for seed, recipe in recipes.items():
      console.print(f"Seed {seed} of {list(cfg.seeds)}", highlight=False)
      evaluations[seed], summaries[seed] = run_seed(
        cfg, recipe, root / f"seed_{seed}", console, stop
      )
      if stop.requested and seed != cfg.seeds[-1]:
        raise Stopped(f"the study, with seed {seed} done,", None)

  # --- What it says. ---------------------------------------------------------
  recipe = recipes[first]
  claims = r1_claims(
    cold_start=recipe["rl_gain"][0],
    rl=recipe["rl_gain"][1],
    sft_control="sft_control",
    sft_verified="sft_verified",
    distill=recipe["distilled"][1],
    student_rl=STUDENT_RL,
  )
  comparison = files.to_json(
    {
      "title": folder.path.resolve().name,
      **compare(evaluations, claims, confidence=cfg.confidence),
      "costs": {
        stage: {
          key: {seed: summaries[seed][stage][key] for seed in cfg.seeds}
          for key in ("flops", "tokens")
        }
        for stage in summaries[first]
      },
    }
  )
  files.write_json(page.with_suffix(".json"), comparison)
  write_comparison(page, comparison)
  console.print(comparison_tables(comparison))
  console.print(f"Comparison: {page}", soft_wrap=True)
  return folder.finish(
    {
      "seeds": list(cfg.seeds),
      "claims": comparison["claims"],
      "seconds": sum(
        summary["seconds"]
        for stages in summaries.values()
        for summary in stages.values()
      ),
    }
  )


def run_seed(
  cfg: Config,
  recipe: dict[str, Any],
  home: pathlib.Path,
  console: Any,
  stop: Stop,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The recipe and its controls, whatever of them is not finished.

  Args:
    cfg: the study.
    recipe: of this seed.
    home: its folder.
    console: a rich console.
    stop: whether a signal asked to stop.

  Returns:
    The summaries of the evaluations and those of the stages, by stage.

  Raises:
    Stopped: `stop` was requested; what ran is saved.
  """
  from rlm.report.html import write_report

  r1.run(recipe, str(home), console=console)
  steps = control_steps(recipe, home)
  typed = build(r1.Config, add_controls(cfg, recipe, control_steps=steps))
  for name in (*SFT_CONTROLS, STUDENT_RL):
    if stop.requested:
      raise Stopped(f"the study, before {name} of {home.name},", None)
    experiment, config = r1.stage_config(typed, name, home)
    experiment.run(config, str(home / name), console=console)
    evaluate.run(
      r1.evaluation_config(typed, name, home),
      str(home / "evaluate" / name),
      console=console,
    )
  write_report(home)  # once more, with the controls
  evaluated = [n for n in typed.order if typed.stages[n]["evaluate"]]
  return (
    {
      n: files.read_json(home / "evaluate" / n / "summary.json")
      for n in evaluated
    },
    {n: files.read_json(home / n / "summary.json") for n in typed.order},
  )


def load_recipe(cfg: Config, seed: int) -> dict[str, Any]:
  """The recipe's config with the study's changes, for one seed.

  Raises:
    ValueError: there is no such file, a change names a key that the recipe
      lacks, or the recipe trains no student to compare.
  """
  path = pathlib.Path(cfg.recipe)
  if not path.is_file():
    raise ValueError(
      f"config.recipe={cfg.recipe!r}: there is no such file. Name the config of"
      " a recipe, such as configs/r1/laptop.py."
    )
  recipe = plain(runpy.run_path(str(path))["get_config"]())
  recipe = merge(recipe, cfg.recipe_changes, "config.recipe_changes")
  if not recipe["distilled"]:
    raise ValueError(
      f"{cfg.recipe} sets distilled=None, and a study compares distillation"
      " with RL on the student. Name a recipe that distils."
    )
  return recipe | {"seed": seed}


def merge(section: Any, changes: Any, where: str) -> Any:
  """A section with other values for some of its keys.

  Args:
    section: nested dicts; left as they are.
    changes: the same keys, or fewer; a dict in it changes the section there.
    where: path of the changes, for the message.

  Raises:
    ValueError: a changed key is not in the section.
  """
  if not (isinstance(section, dict) and isinstance(changes, dict)):
    return copy.deepcopy(changes)
  merged = dict(section)
  for key, value in changes.items():
    if key not in section:
      raise ValueError(
        f"{where}.{key} changes a key that is not there"
        + did_you_mean(key, section)
      )
    merged[key] = merge(section[key], value, f"{where}.{key}")
  return merged


def add_controls(
  cfg: Config, recipe: dict[str, Any], *, control_steps: int
) -> dict[str, Any]:
  """The recipe with its controls as the last stages.

  Args:
    cfg: the study.
    recipe: of one seed.
    control_steps: steps of the SFT controls.

  Raises:
    ValueError: a change of a control names a key that its stage lacks.
  """
  start, rl = recipe["rl_gain"]
  student, _ = recipe["distilled"]
  stages = recipe["stages"]
  controls = {}
  for name in SFT_CONTROLS:
    sft = merge(stages[start], getattr(cfg, name), f"config.{name}")
    sft = lengthen(sft, control_steps) | {"init_from": f"stage:{start}"}
    controls[name] = sft
  controls[STUDENT_RL] = merge(
    stages[rl], cfg.student_rl, "config.student_rl"
  ) | {
    "model": stages[student]["model"],
    "init_from": f"stage:{student}",
  }
  return recipe | {
    "order": (*recipe["order"], *controls),
    "stages": stages | controls,
  }


def lengthen(section: dict[str, Any], steps: int) -> dict[str, Any]:
  """A supervised stage over another number of steps, its schedules stretched.

  Args:
    section: of the stage; whatever in it has `phases` is a schedule.
    steps: its steps afterwards.
  """
  factor = steps / section["steps"]

  def stretched(value):
    if not (isinstance(value, dict) and "phases" in value):
      return value
    phases = [
      phase | {"steps": max(1, round(factor * phase["steps"]))}
      for phase in value["phases"]
    ]
    return value | {"phases": tuple(phases)}

  return {k: stretched(v) for k, v in section.items()} | {"steps": steps}


def control_steps(recipe: dict[str, Any], home: pathlib.Path) -> int:
  """Steps of an SFT control that cost as many FLOPs as RL did.

  FLOPs and not tokens, because a token that RL samples costs a third of one
  that it trains on; by formula and not by the clock, because the clock would
  not repeat.

  Args:
    recipe: of this seed.
    home: its finished run.
  """
  start, rl = (
    files.read_json(home / name / "summary.json") for name in recipe["rl_gain"]
  )
  return max(1, math.ceil(rl["flops"] / (start["flops"] / start["steps"])))


def check_recipe(recipe: dict[str, Any], home: pathlib.Path) -> None:
  """Raises ValueError for what any stage of a recipe would refuse later."""
  typed = build(r1.Config, recipe, "recipe")
  plan = {name: r1.stage_config(typed, name, home) for name in typed.order}
  r1.check_plan(typed, plan, home)


if __name__ == "__main__":
  launch.main(run, __doc__)
