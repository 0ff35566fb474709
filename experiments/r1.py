r"""The whole R1 recipe, from random weights to a reasoning model and a student.

  python -m experiments.r1 \
    --config=configs/r1/laptop.py --workdir=runs/quickstart

Runs the config's stages in order, each an experiment of its own in a folder of
its own under --workdir, and measures held-out accuracy after those that say so
(evaluate/STAGE). Ends with summary.json, report.html, the table of accuracy
and the command that chats with the model. The same command continues an
interrupted run, to the bit.
"""

import dataclasses
import importlib
import pathlib
import shlex
import sys
import time
from typing import Any

from experiments import launch, pretrain
from rlm import files
from rlm.config import build, did_you_mean, plain
from rlm.tasks.registry import make_task

EXPERIMENTS = ("pretrain", "sft", "rl", "reject", "distill")
# What a stage's section says to the recipe; the rest is the experiment's.
_RECIPE_KEYS = ("experiment", "model", "evaluate")
# In the summary of every stage; None of one that is not evaluated.
_MEASURES = ("pass_at_1", "pass_at_1_given_format", "maj_at_8", "pass_at_8")
# Of every stage: they change no result, so a recipe goes on with other values.
# Another init_from names another stage here, not another place.
_MAY_CHANGE = tuple(key for key in pretrain.MAY_CHANGE if key != "init_from")


@dataclasses.dataclass(frozen=True)
class Config:
  """The keys of configs/r1/*.py.

  A stage's section holds the keys of its experiment's Config, but for those
  that the recipe fills in: stage (its name), seed, tokenizer, task or tasks,
  and model. Beside them it says:
    experiment: one of EXPERIMENTS.
    model: which of `models` it trains; None where its `init_from` says.
    evaluate: whether to measure held-out accuracy after it.
  A text "stage:NAME" or "stage:NAME/FILE" anywhere in it becomes the path of
  that earlier stage's folder, or of a file there.

  Attributes:
    seed: of every stage.
    tokenizer: "bytes", or a folder with a tokenizer.json.
    task: the problems; see rlm/tasks/registry.py.
    models: name -> section of ModelConfig.
    order: names of the stages, in the order in which they run.
    stages: name -> section.
    evaluate: keys of configs/evaluate/*.py but for stage, task and init_from.
    rl_gain: two stages; by how much the second beats the first is the gain.
    distilled: two stages, the student before and after its traces; or None.
  """

  seed: int
  tokenizer: str
  task: dict
  models: dict[str, dict]
  order: tuple[str, ...]
  stages: dict[str, dict]
  evaluate: dict
  rl_gain: tuple[str, str]
  distilled: tuple[str, str] | None

  def __post_init__(self):
    make_task(self.task, "task")
    if sorted(self.order) != sorted(self.stages) or not self.order:
      raise ValueError(
        f"order={list(self.order)} must name each of the stages"
        f" {sorted(self.stages)} once."
      )
    for name, section in self.stages.items():
      if section.get("experiment") not in EXPERIMENTS:
        raise ValueError(
          f"stages.{name}.experiment={section.get('experiment')!r} must be one"
          f" of {', '.join(EXPERIMENTS)}."
        )
    evaluated = [n for n in self.order if self.stages[n].get("evaluate")]
    for name in (*self.rl_gain, *(self.distilled or ())):
      if name not in evaluated:
        raise ValueError(
          f"rl_gain and distilled compare evaluated stages, and {name!r} is"
          f" not among {', '.join(evaluated)}" + did_you_mean(name, evaluated)
        )


def stage_config(
  cfg: Config, name: str, workdir: pathlib.Path
) -> tuple[Any, dict[str, Any]]:
  """The experiment of a stage, and its whole config.

  Args:
    cfg: the recipe.
    name: of the stage.
    workdir: the recipe's folder.

  Returns:
    The experiment's module, and the config as its `run` takes it.

  Raises:
    ValueError: the section lacks a key, has one too many, or names a stage
      that does not run before it.
  """
  section, where = cfg.stages[name], f"config.stages.{name}"
  missing = [key for key in _RECIPE_KEYS if key not in section]
  if missing:
    raise ValueError(f"{where} lacks {', '.join(missing)}.")
  experiment = importlib.import_module(f"experiments.{section['experiment']}")
  earlier = cfg.order[: cfg.order.index(name)]

  def resolve(value):
    if isinstance(value, dict):
      return {key: resolve(item) for key, item in value.items()}
    if isinstance(value, str) and value.startswith("stage:"):
      source, _, file = value.removeprefix("stage:").partition("/")
      if source not in earlier:
        raise ValueError(
          f"{where} reads {value!r}, but {source!r} is not a stage before it:"
          f" {', '.join(earlier) or 'it is the first'}."
        )
      return str(workdir / source / file)
    return value

  filled: dict[str, Any] = {
    "stage": name,
    "seed": cfg.seed,
    "tokenizer": cfg.tokenizer,
    "task": cfg.task,
    "tasks": {cfg.task["name"]: cfg.task},
  }
  if section["model"] is not None:
    if section["model"] not in cfg.models:
      raise ValueError(
        f"{where}.model={section['model']!r} is not among the models"
        f" {', '.join(cfg.models)}{did_you_mean(section['model'], cfg.models)}"
      )
    filled["model"] = cfg.models[section["model"]]
  fields = {field.name for field in dataclasses.fields(experiment.Config)}
  own = {k: resolve(v) for k, v in section.items() if k not in _RECIPE_KEYS}
  config = {k: v for k, v in filled.items() if k in fields} | own
  build(experiment.Config, config, where)
  return experiment, config


def evaluation_config(
  cfg: Config, name: str, workdir: pathlib.Path
) -> dict[str, Any]:
  """The config of the evaluation after a stage."""
  return {
    **cfg.evaluate,
    "stage": name,
    "task": cfg.task,
    "init_from": str(workdir / name),
  }


def check_plan(
  cfg: Config, plan: dict[str, tuple[Any, dict[str, Any]]], root: pathlib.Path
) -> None:
  """Raises ValueError for what any stage would refuse once its turn comes.

  Data, levels, lengths and models are looked at; nothing is compiled.

  Args:
    cfg: the recipe.
    plan: stage -> `stage_config`, in order.
    root: the recipe's folder, in which later stages find earlier ones.
  """
  from experiments import evaluate
  from rlm.checkpoint.initial import check_same_model
  from rlm.models.config import ModelConfig

  folders = [root / name for name in cfg.order]
  models: dict[str, ModelConfig] = {}  # by the folder of their stage
  for name, (experiment, config) in plan.items():
    where = f"config.stages.{name}"
    typed = build(experiment.Config, config, where)
    source = models.get(config["init_from"])
    if source is None and config["init_from"] in map(str, folders):
      raise ValueError(
        f"{where}.init_from={cfg.stages[name]['init_from']!r} is a stage that"
        " trains no model. Name one that does."
      )
    if cfg.stages[name]["evaluate"] and "model" not in config:
      raise ValueError(
        f"{where}.evaluate=True, but the stage trains no model. Set it to"
        " False."
      )
    try:
      if "model" in config:
        if source is not None:
          saved = dataclasses.asdict(source)
          check_same_model(config["init_from"], saved, typed.model)
        models[str(root / name)] = typed.model
        experiment.check_inputs(typed, pending=root)
      else:
        tokenizer = cfg.tokenizer
        if source is None:
          tokenizer, source = evaluate.model_of(config["init_from"])
        experiment.prepare(typed, tokenizer, source)
    except ValueError as error:
      raise ValueError(f"stage {name!r}: {error}") from error
    if cfg.stages[name]["evaluate"]:
      asked = build(
        evaluate.Config, evaluation_config(cfg, name, root), "config.evaluate"
      )
      try:
        evaluate.prepare(asked, cfg.tokenizer, models[str(root / name)])
      except ValueError as error:
        raise ValueError(f"the evaluation of {name!r}: {error}") from error


def check_headline(cfg: Config) -> None:
  """Raises ValueError unless the headline is over the levels that RL draws."""
  after = cfg.rl_gain[1]
  if "curriculum" not in cfg.stages[after]:
    return  # no RL: the pair is of other stages
  drawn = cfg.stages[after]["curriculum"]["levels"]
  headline = cfg.evaluate["evaluation"]["levels_trained"]
  if set(drawn) != set(headline):
    raise ValueError(
      f"config.evaluate.evaluation.levels_trained={tuple(headline)}, but"
      f" stages.{after}.curriculum.levels={tuple(drawn)}: the headline is over"
      " the levels that RL draws. Make them the same."
    )


def run(c: Any, workdir: str, *, console: Any = None) -> dict[str, Any]:
  """Runs the recipe, or continues it; returns its summary."""
  import rich.console

  from experiments import evaluate
  from rlm.progress import clock_text
  from rlm.report.accuracy_table import accuracy_tables
  from rlm.report.html import write_report
  from rlm.report.run_folder import read_run
  from rlm.stopping import Stopped, catch_signals
  from rlm.workdir import open_workdir

  began = time.monotonic()

  # --- Every stage's config is checked before the first one runs. ------------
  cfg = build(Config, plain(c))
  root = pathlib.Path(workdir)
  plan = {name: stage_config(cfg, name, root) for name in cfg.order}
  check_plan(cfg, plan, root)
  check_headline(cfg)
  console = console or rich.console.Console()
  folder = open_workdir(
    root,
    c,
    may_change=tuple(
      f"stages.{name}.{key}" for name in cfg.order for key in _MAY_CHANGE
    ),
  )

  # --- Stages. ---------------------------------------------------------------
  summary = folder.summary
  if summary is None:
    results, evaluations = {}, {}
    with catch_signals() as stop:
      for name, (experiment, config) in plan.items():
        stage_began = time.monotonic()
        try:
          results[name] = experiment.run(
            config, str(root / name), console=console
          )
          if cfg.stages[name]["evaluate"]:
            evaluations[name] = evaluate.run(
              evaluation_config(cfg, name, root),
              str(root / "evaluate" / name),
              console=console,
            )
        except Stopped:
          _add_seconds(root, name, time.monotonic() - stage_began)
          raise
        seconds = _add_seconds(root, name, time.monotonic() - stage_began)
        if stop.requested and name != cfg.order[-1]:
          raise Stopped(f"the recipe, with {name} done,", None)
    summary = folder.finish(summarise(cfg, results, evaluations, seconds))
  else:
    folder.say_finished(console)

  # --- What a person takes away. ---------------------------------------------
  report = write_report(root)
  console.print(accuracy_tables(read_run(root)))
  took = time.monotonic() - began
  console.print(f"This start took {clock_text(took)}.")
  console.print(f"Report: {report}", soft_wrap=True, markup=False)
  model = cfg.stages[cfg.order[0]]["model"]
  last = [n for n in cfg.order if cfg.stages[n]["model"] == model][-1]
  console.print(
    "Chat with the model just trained:\n"
    f"  {_python()} -m experiments.sample"
    f" --workdir={shlex.quote(workdir)} --stage={last}",
    soft_wrap=True,
    markup=False,
  )
  return summary


def summarise(
  cfg: Config,
  results: dict[str, dict[str, Any]],
  evaluations: dict[str, dict[str, Any]],
  seconds: dict[str, float],
) -> dict[str, Any]:
  """The recipe's summary.json.

  Args:
    cfg: the recipe.
    results: summary of each stage.
    evaluations: summary of each evaluation.
    seconds: of each stage with its evaluation and compilation.

  Returns:
    stages (name, seconds, tokens, flops, what was measured after it, and under
    "evaluation" the cost of that, whose seconds the stage's include), seed,
    seconds_total, rl_gain_points (of pass@1, with those given format beside
    it), distill, model (total and activated parameters) and flops.
  """
  shared = {"stage", "complete", "seconds", "tokens", "flops"}
  stages = []
  for name in cfg.order:
    measured = evaluations.get(name, {})
    stages.append(
      {
        "name": name,
        "seconds": seconds.get(name),
        "tokens": results[name].get("tokens"),
        "flops": results[name].get("flops"),
      }
      | dict.fromkeys(_MEASURES)
      | {k: v for k, v in measured.items() if k not in shared}
    )
    if name in evaluations:
      stages[-1]["evaluation"] = {
        key: measured.get(key) for key in ("seconds", "tokens", "flops")
      }

  def points(measure, pair):
    before, after = (evaluations[name][measure]["mean"] for name in pair)
    return 100 * (after - before)

  distill = None
  if cfg.distilled is not None:
    before, after = cfg.distilled
    distill = {
      "before": evaluations[before]["pass_at_1"],
      "after": evaluations[after]["pass_at_1"],
      "gain_points": points("pass_at_1", cfg.distilled),
      "model": results[after]["model"],
    }
  flops = [stage["flops"] for stage in stages]
  flops += [measured.get("flops") for measured in evaluations.values()]
  return {
    "stages": stages,
    "seed": cfg.seed,
    "seconds_total": sum(seconds.values()),
    "rl_gain_points": points("pass_at_1", cfg.rl_gain),
    "rl_gain_points_given_format": points(
      "pass_at_1_given_format", cfg.rl_gain
    ),
    "distill": distill,
    "model": results[cfg.order[0]]["model"],
    "flops": sum(f for f in flops if f is not None),
  }


def _python() -> str:
  """This interpreter as a shell in this folder names it."""
  path = pathlib.Path(sys.executable)
  here = pathlib.Path.cwd()
  return shlex.quote(
    str(path.relative_to(here) if path.is_relative_to(here) else path)
  )


def _add_seconds(
  root: pathlib.Path, name: str, seconds: float
) -> dict[str, float]:
  """Adds to a stage's seconds, over all starts of the recipe; returns all.

  What a start spent in a stage in which it was killed is not in it.
  """
  path = root / "seconds.json"
  spent = files.read_json(path) if path.exists() else {}
  spent[name] = round(spent.get(name, 0.0) + seconds, 1)
  files.write_json(path, spent)
  return spent


if __name__ == "__main__":
  launch.main(run, __doc__)
