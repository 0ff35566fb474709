"""Evaluates a run's final weights on held-out problems, by rule.

  CONFIG=configs/evaluate/laptop.py
  python -m experiments.evaluate --config=$CONFIG --workdir=runs/evaluated

Model and tokenizer are those of the run that `init_from` names.  The folder
gets summary.json (pass@1, pass@k, maj@k, accuracy given format, correctness of
the steps, each with a 95% interval over problems, overall and by level) and
traces/STAGE.jsonl.  A killed evaluation starts over and gives the same figures.
"""

import dataclasses
import pathlib
import time
from typing import Any

from experiments import launch
from rlm import files
from rlm.config import build
from rlm.data.chat import Chat
from rlm.data.chat_formats import load_chat
from rlm.eval.config import EvaluationConfig
from rlm.models.config import ModelConfig
from rlm.parallel.config import MeshConfig
from rlm.sampling.config import SamplingConfig
from rlm.tasks.base import Problem, Task
from rlm.tasks.registry import make_task
from rlm.tasks.room import check_room


@dataclasses.dataclass(frozen=True)
class Config:
  """The keys of configs/evaluate/*.py.

  Attributes:
    init_from: folder of the run whose final weights are evaluated.
    stage: its name in summary and traces.
    task: see rlm/tasks/registry.py; the heldout_fraction must be training's.
    evaluation: see EvaluationConfig.
    sampling: see SamplingConfig.
    slots: completions decoded together.
    sampling_mesh: the devices among which the slots are divided.
    prompt_length: room for a prompt in tokens, chat markers included.
  """

  init_from: str
  stage: str
  task: dict
  evaluation: EvaluationConfig
  sampling: SamplingConfig
  slots: int
  sampling_mesh: MeshConfig
  prompt_length: int


# The weights may be at another place, but not others.
MAY_CHANGE = ("init_from",)


def prepare(
  cfg: Config, tokenizer_name: str, model_cfg: ModelConfig
) -> tuple[Task, Chat, Any]:
  """What asks, how, and what samples; nothing is compiled.

  Args:
    cfg: the config.
    tokenizer_name: of the run that is evaluated.
    model_cfg: likewise.

  Returns:
    task, Chat and Sampler.

  Raises:
    ValueError: what the config asks for cannot be had, or does not fit.
  """
  from rlm.eval.evaluate import heldout_problems

  task = make_task(cfg.task)
  problems = heldout_problems(task, cfg.evaluation)
  chat = load_chat(tokenizer_name)
  return task, chat, make_sampler(cfg, task, problems, chat, model_cfg)


def make_sampler(
  cfg: Any,
  task: Task,
  problems: list[Problem],
  chat: Chat,
  model_cfg: ModelConfig,
) -> Any:
  """The Sampler of completions that are scored, once problems are seen to fit.

  Args:
    cfg: a config with the keys sampling, slots, sampling_mesh and
      prompt_length.
    task: the family.
    problems: what will be asked.
    chat: how the model is asked.
    model_cfg: the model.

  Raises:
    ValueError: sizes that do not fit, or stop tokens.
  """
  from rlm.models.transformer import Transformer
  from rlm.sampling.sampler import Sampler

  if cfg.sampling.stop_tokens:
    raise ValueError(
      f"config.sampling.stop_tokens={cfg.sampling.stop_tokens}: only the"
      " model's own EOS may end a completion that is scored. Leave it empty."
    )
  end, *others = chat.stop_tokens
  sampler = Sampler(
    Transformer(model_cfg),
    dataclasses.replace(cfg.sampling, stop_tokens=tuple(others)),
    slots=cfg.slots,
    prompt_length=cfg.prompt_length,
    mesh=cfg.sampling_mesh,
    eos_token=end,
    pad_token=chat.pad_id,
  )
  check_room(
    task,
    problems,
    chat,
    prompt_length=cfg.prompt_length,
    max_new_tokens=cfg.sampling.max_new_tokens,
  )
  return sampler


def run(c: Any, workdir: str, *, console: Any = None) -> dict[str, Any]:
  """Evaluates, unless `workdir` holds the result; returns the summary."""
  from rlm.checkpoint import initial
  from rlm.checkpoint.manager import restore_part
  from rlm.eval.evaluate import evaluate
  from rlm.jsonl import JsonlWriter
  from rlm.progress import Progress
  from rlm.rewards.registry import REWARDS, Scorer
  from rlm.stopping import Stopped, catch_signals
  from rlm.workdir import open_workdir

  # --- Config and model ------------------------------------------------------
  cfg = build(Config, c)
  task, chat, sampler = prepare(cfg, *model_of(cfg.init_from))
  folder = open_workdir(workdir, c, may_change=MAY_CHANGE)
  checkpoints = pathlib.Path(cfg.init_from) / "checkpoints"
  variables = restore_part(checkpoints, "variables")
  folder.record_input("init_from", initial.digest(variables))
  if folder.summary is not None:
    folder.say_finished(console)
    return folder.summary

  # --- Sample, score, sum up -------------------------------------------------
  began = time.monotonic()
  step = int(restore_part(checkpoints, "step"))
  levels = len(cfg.evaluation.levels)
  with (
    Progress(console, f"evaluate {cfg.stage}", levels) as bar,
    catch_signals() as stop,
  ):

    def on_level(done):
      bar.update(done)
      if stop.requested and done < levels:
        raise Stopped(f"the evaluation of {cfg.stage}", None)

    summary, records = evaluate(
      sampler,
      variables,
      task,
      chat,
      Scorer(
        task,
        dict.fromkeys(REWARDS, 1.0),
        answer_format=chat.answer_format,
      ),
      cfg.evaluation,
      sampler.model.cfg,
      stage=cfg.stage,
      step=step,
      on_level=on_level,
    )
  path = folder.path / "traces" / f"{cfg.stage}.jsonl"
  path.unlink(missing_ok=True)  # of an evaluation that was killed
  with JsonlWriter(path, next_step=0) as traces:
    for record in records:
      traces.write(record)
    traces.flush()
  seconds = time.monotonic() - began
  return folder.finish(summary | {"step": step, "seconds": seconds})


def model_of(run_folder: str) -> tuple[str, ModelConfig]:
  """Tokenizer and model that a run was configured with.

  Raises:
    ValueError: `run_folder` is no run of a model.
  """
  path = pathlib.Path(run_folder) / "config.json"
  if not path.is_file():
    raise ValueError(
      f"config.init_from={run_folder!r}: there is no {path}. Name the folder"
      " (--workdir) of a training run."
    )
  config = files.read_json(path)
  missing = [key for key in ("tokenizer", "model") if key not in config]
  if missing:
    raise ValueError(
      f"config.init_from={run_folder!r}: {path} has no"
      f" {' and no '.join(missing)}, so it is no training run. Name the folder"
      " of one."
    )
  return config["tokenizer"], build(ModelConfig, config["model"], "model")


if __name__ == "__main__":
  launch.main(run, __doc__)
