r"""Rejection sampling: a run's own right answers, as data for fine-tuning.

  python -m experiments.reject --config=configs/reject/laptop.py \
    --config.init_from=runs/rl --workdir=runs/rejection

Training problems are sampled n times each by the final weights of `init_from`,
whose model and tokenizer are used.  Of each problem's right and well-formed
answers the shortest few different ones are kept.  The folder gets
messages.jsonl, which a source of kind "messages" reads, traces/STAGE.jsonl
(the same with verdicts), metrics.jsonl (counts, a line per chunk of problems)
and summary.json; the same command continues it, to the bit.
"""

import dataclasses
import pathlib
from typing import Any

from experiments import launch
from experiments.evaluate import make_sampler, model_of
from rlm.config import build
from rlm.data.chat import Chat
from rlm.data.chat_formats import load_chat
from rlm.models.config import ModelConfig
from rlm.parallel.config import MeshConfig
from rlm.rl.config import RejectionConfig
from rlm.sampling.config import SamplingConfig
from rlm.tasks.base import Problem, Task
from rlm.tasks.registry import make_task


@dataclasses.dataclass(frozen=True)
class Config:
  """The keys of configs/reject/*.py.

  Attributes:
    stage: name of the run in its traces.
    seed: of the problems and of the sampling.
    init_from: folder of the run whose final weights answer.
    task: see rlm/tasks/registry.py; training problems only.
    rejection: see RejectionConfig.
    sampling: see SamplingConfig.
    slots: completions decoded together.
    sampling_mesh: the devices among which the slots are divided.
    prompt_length: room for a prompt in tokens, chat markers included.
  """

  stage: str
  seed: int
  init_from: str
  task: dict
  rejection: RejectionConfig
  sampling: SamplingConfig
  slots: int
  sampling_mesh: MeshConfig
  prompt_length: int


# A run may go on with the weights at another place, but not with others.
MAY_CHANGE = ("init_from",)


def prepare(
  cfg: Config, tokenizer_name: str, model_cfg: ModelConfig
) -> tuple[Task, list[Problem], Chat, Any]:
  """What is asked, how, and what samples; nothing is compiled.

  Args:
    cfg: the config.
    tokenizer_name: of the run that answers.
    model_cfg: likewise.

  Returns:
    task, problems, Chat and Sampler.

  Raises:
    ValueError: what the config asks for cannot be had, or does not fit.
  """
  from rlm.rl.rejection import draw_problems

  task = make_task(cfg.task)
  problems = draw_problems(task, cfg.rejection, cfg.seed)
  chat = load_chat(tokenizer_name)
  sampler = make_sampler(cfg, task, problems, chat, model_cfg)
  return task, problems, chat, sampler


def run(c: Any, workdir: str, *, console: Any = None) -> dict[str, Any]:
  """Samples, or continues the run in `workdir`; returns its summary."""
  import jax
  import numpy as np

  from rlm import flops
  from rlm.checkpoint import initial
  from rlm.checkpoint.manager import restore_variables
  from rlm.data.chat import Trace, save_messages
  from rlm.eval.evaluate import trace_record
  from rlm.jsonl import JsonlWriter, read_jsonl
  from rlm.metrics import MetricsWriter
  from rlm.progress import Progress
  from rlm.rewards.registry import REWARDS, Scorer
  from rlm.rl import rejection
  from rlm.stopping import Stopped, catch_signals
  from rlm.workdir import open_workdir

  # --- Config, problems and model --------------------------------------------
  cfg = build(Config, c)
  tokenizer_name, model_cfg = model_of(cfg.init_from)
  task, problems, chat, sampler = prepare(cfg, tokenizer_name, model_cfg)
  scorer = Scorer(
    task,
    dict.fromkeys(REWARDS, 1.0),  # verdicts alone count
    answer_format=chat.answer_format,
  )
  folder = open_workdir(workdir, c, may_change=MAY_CHANGE)
  if folder.summary is not None:
    folder.say_finished(console)
    return folder.summary
  variables = restore_variables(pathlib.Path(cfg.init_from) / "checkpoints")
  folder.record_input("init_from", initial.digest(variables))
  key = jax.random.key(cfg.seed)

  # --- Chunk by chunk --------------------------------------------------------
  # A chunk counts as done once its line is in metrics.jsonl, which is written
  # after its traces are on the disk: whatever a kill left behind of a chunk
  # without that line is dropped when the writers open.
  metrics_path = folder.path / "metrics.jsonl"
  traces_path = folder.path / "traces" / f"{cfg.stage}.jsonl"
  chunks = range(0, len(problems), cfg.rejection.problems_per_chunk)
  start = len(read_jsonl(metrics_path)) if metrics_path.exists() else 0
  with (
    catch_signals() as stop,
    MetricsWriter(folder.path, next_step=start, on_nonfinite="stop") as log,
    JsonlWriter(traces_path, next_step=start) as traces,
    Progress(
      console,
      cfg.stage,
      len(problems),
      done=min(start * cfg.rejection.problems_per_chunk, len(problems)),
    ) as bar,
  ):
    for chunk, first in list(enumerate(chunks))[start:]:
      asked = problems[first : first + cfg.rejection.problems_per_chunk]
      samples = rejection.sample_chunk(
        sampler,
        variables,
        asked,
        first,
        chat,
        scorer,
        key,
        samples_per_problem=cfg.rejection.samples_per_problem,
      )
      for row in samples:
        for s in rejection.select(row, cfg.rejection):
          traces.write(
            trace_record(
              cfg.stage, chunk, s.problem, s.text, s.score, s.finished
            )
          )
      traces.flush()
      counts = rejection.count_chunk(samples, cfg.rejection)
      cost = flops.sampling_flops(
        model_cfg,
        np.array([row[0].prompt_length for row in samples]),
        np.array([[s.length for s in row] for row in samples]),
      )
      log.push(chunk, counts | {"flops": cost}, tokens=counts["tokens"])
      log.flush()
      bar.update(
        first + len(asked),
        accuracy=counts["correct"] / counts["sampled"],
        solved=counts["solved"] / counts["problems"],
      )
      if stop.requested and first + len(asked) < len(problems):
        raise Stopped(cfg.stage, chunk + 1)
    seconds = log.total_seconds

  # --- The set ---------------------------------------------------------------
  records = read_jsonl(metrics_path)
  totals = rejection.total_counts(records, cfg.rejection)
  if not totals["kept"]:
    raise ValueError(
      f"none of {totals['sampled']} samples of {cfg.init_from!r} was kept"
      f" ({totals['well_formed']} well formed, {totals['correct']} of them"
      f" correct, {totals['verified']} by right steps), so there is nothing to"
      " fine-tune on. Train that run longer, or ask easier levels."
    )
  save_messages(
    folder.path / "messages.jsonl",
    [
      Trace(chat.question(record["prompt"]), record["completion"])
      for record in read_jsonl(traces_path)
    ],
  )
  size = flops.count_parameters(model_cfg)
  return folder.finish(
    {
      "stage": cfg.stage,
      "seconds": seconds,
      **totals,
      "flops": sum(record["flops"] for record in records),
      "model": {"total": size.total, "activated": size.activated},
    }
  )


if __name__ == "__main__":
  launch.main(run, __doc__)
