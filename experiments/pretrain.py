r"""Pretrains a language model on text, code and worked problems.

  python -m experiments.pretrain \
    --config=configs/pretrain/stdlib.py --workdir=runs/stdlib

Losses: next token, multi-token prediction and expert balance.  The folder gets
metrics.jsonl (held-out bits per byte among them), timing.jsonl, checkpoints and
summary.json; the same command continues it.
"""

import pathlib
from typing import Any

from experiments import launch
from experiments.from_checkpoint import fill_model
from experiments.pretrain_config import Config
from rlm import processes
from rlm.config import build
from rlm.data.chat import Chat
from rlm.data.chat_formats import load_model_chat
from rlm.data.sources import MessagesSource, check_sources
from rlm.tasks.base import Task
from rlm.tasks.registry import make_task

# A run may go on with other values of these, as they change no result; of
# `init_from` and of messages the place may change, not the content.
MAY_CHANGE = (
  "init_from",
  "checkpoint_every_steps",
  "keep_checkpoints",
  "keep_best",
  "on_nonfinite",  # equal while every step is finite
  "peak_flops",
)


def make_training(cfg: Config, devices: Any = None):
  """What a run computes, apart from data and files.

  Args:
    cfg: the run's config.
    devices: to lay it on; None is jax's.

  Returns:
    layout: the Transformer on its mesh.
    start: variables -> TrainState.
    step: (state, batch, key) -> (state, metrics), on batches of
      `split_microbatches` with the scalars of `make_rates`.  Both are pure; the
      caller jits them.
  """
  from rlm.losses import global_weights, make_pretrain_loss
  from rlm.models.layout import make_layout
  from rlm.models.transformer import Transformer
  from rlm.optim.optimizer import make_optimizer
  from rlm.train import init_state, make_train_step

  layout = make_layout(Transformer(cfg.model), cfg.mesh, "mesh", devices)
  tx = make_optimizer(cfg.optimizer)
  loss_fn = make_pretrain_loss(
    layout.model,
    train_mtp=cfg.mtp_weight != 0,
    balance_weight=cfg.balance_weight,
  )
  train_step = make_train_step(
    loss_fn,
    tx,
    num_microbatches=cfg.batch.rows // cfg.batch.microbatch_rows,
    ema_decay=cfg.ema_decay,
    skip_nonfinite=cfg.on_nonfinite == "skip",
    layout=layout,
  )

  def start(variables):
    return init_state(variables, tx, ema_decay=cfg.ema_decay)

  def step(state, batch, key):
    depth = cfg.model.num_nextn_predict_layers
    return train_step(state, global_weights(batch, mtp_depth=depth), key)

  return layout, start, step


def make_rates(cfg: Config):
  """A function of the step: what its schedules say, named as in a batch."""
  from rlm.optim.schedule import make_schedule

  schedules = {
    "learning_rate": make_schedule(cfg.schedule),
    "bias_update_rate": make_schedule(cfg.bias_update_rate),
    "mtp_weight": make_schedule(cfg.mtp_weight),
  }
  return lambda step: {name: at(step) for name, at in schedules.items()}


def prepare(cfg: Config) -> tuple[Chat, dict[str, Task]]:
  """The chat format and the tasks of a run, checked against its config.

  Raises:
    ValueError: they cannot be made, the model has another vocabulary, or the
      mesh fits neither the model nor the devices.
  """
  from rlm.models.layout import check_model_fits
  from rlm.parallel.mesh import make_mesh

  check_model_fits(cfg.model, cfg.mesh, "mesh")
  make_mesh(cfg.mesh, "mesh")  # or it raises
  chat = load_model_chat(cfg.tokenizer, cfg.model.n_vocab_used)
  return chat, {
    name: make_task(section, f"config.tasks.{name}")
    for name, section in cfg.tasks.items()
  }


def check_inputs(cfg: Config, pending: pathlib.Path) -> None:
  """Raises ValueError where `run` would once it reads its data; trains nothing.

  Args:
    cfg: the config.
    pending: a recipe's folder, whose files are yet to be written.
  """
  from rlm.eval.heldout import worked_problems

  chat, tasks = prepare(cfg)
  check_sources(cfg.data, chat, tasks, seed=cfg.seed, pending=pending)
  if cfg.eval.task is not None:
    worked_problems(
      tasks[cfg.eval.task],
      chat,
      levels=cfg.eval.levels,
      problems_per_level=cfg.eval.problems_per_level,
      seed=cfg.seed,
      batch_size=cfg.eval.batch_rows,
      row_length=cfg.data.row_length,
    )


def run(c: Any, workdir: str, *, console: Any = None) -> dict[str, Any]:
  """Trains, or continues the run in `workdir`; returns its summary."""
  c = fill_model(c, workdir)
  return train(build(Config, c), c, workdir, console)


def train(cfg: Config, c: Any, workdir: str, console: Any) -> dict[str, Any]:
  """The loop of pretraining, SFT and distillation.

  Args:
    cfg: the config, checked.
    c: the config as it was given, for the run's record.
    workdir: the run's folder.
    console: a rich console; None is the standard output.

  Returns:
    The summary.
  """
  import contextlib

  import jax

  from rlm import cost, flops
  from rlm.checkpoint import initial
  from rlm.checkpoint.manager import CheckpointManager
  from rlm.data import pipeline
  from rlm.eval import heldout as heldout_lib
  from rlm.jsonl import read_jsonl
  from rlm.metrics import MetricsWriter, is_due
  from rlm.optim.schedule import batch_rows
  from rlm.parallel.rows import own_rows, place_rows
  from rlm.progress import Progress
  from rlm.stopping import Stopped, catch_signals
  from rlm.train import split_microbatches
  from rlm.workdir import open_workdir

  chat, tasks = prepare(cfg)
  messages = (
    f"data.sources.{name}.path"
    for name, source in cfg.data.sources.items()
    if isinstance(source, MessagesSource)
  )
  folder = open_workdir(workdir, c, may_change=(*MAY_CHANGE, *messages))
  if folder.summary is not None:
    folder.say_finished(console)
    return folder.summary

  # --- Data: the batch of every step, and what is held out. ------------------
  layout, start_state, step_fn = make_training(cfg)
  b = cfg.batch
  microbatches = b.rows // b.microbatch_rows
  own = own_rows(layout.mesh, b.microbatch_rows)
  row_counts = [
    batch_rows(
      step,
      first_rows=b.first_rows,
      last_rows=b.rows,
      ramp_steps=b.ramp_steps,
      multiple=b.microbatch_rows,
    )
    for step in range(cfg.steps)
  ]
  stream = pipeline.make_stream(cfg.data, chat, seed=cfg.seed, tasks=tasks)
  folder.record_input("data", stream.record)
  batches = pipeline.make_batches(
    stream,
    batch_size=b.rows,
    row_counts=row_counts,
    positions=[
      first + row
      for first in range(0, b.rows, b.microbatch_rows)
      for row in own.tolist()
    ],
  )
  heldout = pipeline.load_heldout(
    cfg.data,
    chat,
    seed=cfg.seed,
    tasks=tasks,
    batch_size=cfg.eval.batch_rows,
  )
  worked = None
  if cfg.eval.task is not None:
    worked = heldout_lib.worked_problems(
      tasks[cfg.eval.task],
      chat,
      levels=cfg.eval.levels,
      problems_per_level=cfg.eval.problems_per_level,
      seed=cfg.seed,
      batch_size=cfg.eval.batch_rows,
      row_length=cfg.data.row_length,
    )

  # --- The step, and what is measured of it. ---------------------------------
  step_fn = jax.jit(step_fn, donate_argnums=0)
  rates = make_rates(cfg)
  score_rows = heldout_lib.make_score_rows(layout)
  flops_per_token = flops.train_flops_per_token(
    cfg.model, cfg.data.row_length, mtp=cfg.mtp_weight != 0
  )
  ledger = cost.open_ledger(cfg.mesh.devices, cfg.model.dtype, cfg.peak_flops)

  def spent(tokens, seconds):
    return ledger.record(tokens * flops_per_token, seconds)

  def evaluate(state):
    variables = state.variables
    if cfg.eval.use_ema:
      averaged = jax.tree.map(
        lambda e, p: e.astype(p.dtype), state.ema, variables["params"]
      )
      variables = {**variables, "params": averaged}
    metrics = heldout_lib.bits_per_byte(score_rows, variables, heldout)
    if worked is not None:
      metrics |= heldout_lib.worked_accuracy(score_rows, variables, worked)
    return metrics

  # --- State, and the loop. --------------------------------------------------
  init_key, key = jax.random.split(jax.random.key(cfg.seed))
  with (
    CheckpointManager(
      folder.path / "checkpoints",
      keep=cfg.keep_checkpoints,
      keep_best=cfg.keep_best,
      config=folder.identity,
    ) as manager,
    catch_signals() as stop,
  ):
    template = layout.abstract(start_state, initial.shapes(layout.whole))
    if (saved := manager.restore(template)) is not None:
      start, state, _ = saved
    else:
      variables = initial.initial_variables(layout, cfg.init_from, init_key)
      if cfg.init_from is not None:
        folder.record_input("init_from", initial.digest(variables))
      start, state = 0, layout.jit(start_state)(variables)
    with (
      MetricsWriter(
        folder.path, next_step=start, on_nonfinite=cfg.on_nonfinite
      ) as log,
      Progress(console, cfg.stage, cfg.steps, done=start) as bar,
      contextlib.closing(
        pipeline.iterate_batches(batches, start, prefetch=2)
      ) as batch_of_step,
    ):
      for step in range(start, cfg.steps):
        rows = next(batch_of_step)
        live = row_counts[step] // b.microbatch_rows * len(own)
        batch = split_microbatches(
          {name: x[:live] for name, x in rows.items()},
          microbatch_rows=len(own),
          num_microbatches=microbatches,
        )
        batch = place_rows(
          layout.mesh, batch, own, rows=b.microbatch_rows, leading=1
        )
        batch |= rates(step)
        state, metrics = step_fn(state, batch, jax.random.fold_in(key, step))
        log.push(
          step,
          metrics,
          tokens=metrics["tokens"],
          ledger=spent,
          batch=batch,
        )
        bar.update(step + 1, **log.figures("loss", "grad_norm"))
        last, stopping = step + 1 == cfg.steps, stop.after(step)
        if is_due(step, cfg.eval.every_steps) or last:
          with log.paused():
            log.push(step, evaluate(state))
        if is_due(step, cfg.checkpoint_every_steps) or last or stopping:
          with log.paused():
            log.flush()  # finite, or it raises: a bad step is never saved
            manager.save(step + 1, state, metrics=log.record)
        if stopping and not last:
          raise Stopped(cfg.stage, step + 1)
      seconds = log.total_seconds

  def summarize():
    records = read_jsonl(folder.path / "metrics.jsonl")
    tokens = sum(record["tokens"] for record in records)
    counts = flops.count_parameters(cfg.model)
    summary = {
      "stage": cfg.stage,
      "steps": cfg.steps,
      "seconds": seconds,
      "tokens": tokens,
      "flops": tokens * flops_per_token,
      "ledger": spent(tokens, seconds),
      "model": {"total": counts.total, "activated": counts.activated},
      "loss": records[-1]["loss/next_token"],
      "heldout": {
        name: {
          "bits_per_byte": records[-1][f"heldout/{name}/bits_per_byte"],
          "unigram_bits_per_byte": rows.unigram_bits_per_byte,
          "bigram_bits_per_byte": rows.bigram_bits_per_byte,
        }
        for name, rows in heldout.items()
      },
      "worked_accuracy": {
        name.split("/")[1]: value
        for name, value in records[-1].items()
        if name.endswith("/worked_accuracy")
      },
    }
    if cfg.keep_best is not None and manager.best is not None:
      step, value = manager.best
      summary["best"] = {"checkpoint": step, cfg.keep_best.metric: value}
    return folder.finish(summary)

  return processes.on_primary(summarize)


if __name__ == "__main__":
  launch.main(run, __doc__, several_processes=True)
