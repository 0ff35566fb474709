"""Reinforcement learning with verifiable rewards: the R1 loop.

  python -m experiments.rl --config=configs/rl/laptop.py --workdir=runs/rl

A step draws problems at the levels of the curriculum, samples a group of
completions of each, scores them by rule, turns rewards into group advantages
and updates the policy, once or in several minibatches.  `init_from` names the
folder of the run whose final weights it starts from: a cold start for R1, a
base model for R1-Zero, None for random weights.

The folder then holds metrics.jsonl, traces/STAGE.jsonl and checkpoints; the
same command continues it, to the bit.
"""

import dataclasses
import functools
import pathlib
import time
import zlib
from typing import Any, Literal

from experiments import launch
from experiments.evaluate import make_sampler
from experiments.from_checkpoint import fill_model
from rlm.checkpoint.config import KeepBest
from rlm.config import build
from rlm.data.chat import Chat
from rlm.data.chat_formats import load_model_chat
from rlm.models.config import ModelConfig
from rlm.optim.config import OptimizerConfig, ScheduleConfig
from rlm.parallel.config import MeshConfig
from rlm.rl.config import ObjectiveConfig, SelectionConfig
from rlm.rl.curriculum import CurriculumConfig
from rlm.sampling.config import SamplingConfig
from rlm.tasks.base import Task
from rlm.tasks.registry import make_task


@dataclasses.dataclass(frozen=True)
class Config:
  """The keys of configs/rl/*.py.

  Attributes:
    stage: name of the run in its traces.
    seed: with `stage`, of problems, sampling and (without init_from) weights.
    steps: rollouts.
    init_from: folder of a run, or None.
    tokenizer: "bytes", or a folder with tokenizer.json.
    model: see ModelConfig; must be that of init_from.
    task: see rlm/tasks/registry.py.
    curriculum: see CurriculumConfig.
    prompts_per_step: P.
    group_size: G, completions per prompt.
    rewards: name -> weight; see rlm/rewards/registry.py.
    sampling: see SamplingConfig; without filters, so that log-probs are those
      of the whole distribution.
    slots: completions decoded together.
    sampling_mesh: the devices among which the slots are divided.
    prompt_length: room for a prompt in tokens, chat markers included.
    replay_routes: train along the sampler's expert routes.
    objective: see ObjectiveConfig.
    selection: see SelectionConfig.
    mesh: the devices of the updates.
    optimizer: see OptimizerConfig.
    schedule: see ScheduleConfig; over updates, not rollouts.
    bias_update_rate: of the expert bias; 0 freezes it.
    reference_every_steps: rollouts after which the policy becomes the KL's
      reference; 0 never.
    monitor_kl: hold the reference and log `kl` at the diagnostics steps even
      where kl_weight is 0.
    diagnostics_every_steps: steps between measurements of mtp_acceptance (and
      see monitor_kl), which cost forward passes; 0 never.
    traces_every_steps: steps between recorded completions; 0 never.
    traces_per_step: how many of them, each of another prompt.
    checkpoint_every_steps: steps between checkpoints.
    keep_checkpoints: the newest so many are kept.
    keep_best: which one stays beside them, by what metric; None for none.
    on_nonfinite: "stop" (and save the batch) or "skip" the update.
  """

  stage: str
  seed: int
  steps: int
  init_from: str | None
  tokenizer: str
  model: ModelConfig
  task: dict
  curriculum: CurriculumConfig
  prompts_per_step: int
  group_size: int
  rewards: dict[str, float]
  sampling: SamplingConfig
  slots: int
  sampling_mesh: MeshConfig
  prompt_length: int
  replay_routes: bool
  objective: ObjectiveConfig
  selection: SelectionConfig
  mesh: MeshConfig
  optimizer: OptimizerConfig
  schedule: ScheduleConfig
  bias_update_rate: float
  reference_every_steps: int
  monitor_kl: bool
  diagnostics_every_steps: int
  traces_every_steps: int
  traces_per_step: int
  checkpoint_every_steps: int
  keep_checkpoints: int
  keep_best: KeepBest | None
  on_nonfinite: Literal["stop", "skip"]

  def __post_init__(self):
    for name in ("steps", "prompts_per_step"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
    if not 0 <= self.traces_per_step <= self.prompts_per_step:
      raise ValueError(
        f"traces_per_step={self.traces_per_step} must lie within 0 and"
        f" prompts_per_step={self.prompts_per_step}."
      )
    self.selection.check(self.prompts_per_step, self.group_size)
    self.selection.check_mesh(self.mesh)
    self.sampling_mesh.check_decodes("sampling_mesh")


# A run may go on with other values of these, as they change no result; of
# `init_from` the place may change, not the weights.
MAY_CHANGE = (
  "init_from",
  "checkpoint_every_steps",
  "keep_checkpoints",
  "keep_best",
  "on_nonfinite",  # equal while every step is finite
)


def prepare(cfg: Config) -> tuple[Task, Any, Chat, Any]:
  """What asks, judges, how, and what samples; nothing is compiled.

  Returns:
    task, Scorer, Chat and Sampler.

  Raises:
    ValueError: what the config asks for cannot be had, does not fit, or could
      never be rewarded.
  """
  from rlm.models.layout import check_model_fits
  from rlm.parallel.mesh import make_mesh
  from rlm.rewards.registry import Scorer

  check_sampling(cfg.sampling)
  check_model_fits(cfg.model, cfg.mesh, "mesh")
  make_mesh(cfg.mesh, "mesh")  # or it raises
  task = make_task(cfg.task)
  levels = cfg.curriculum.levels
  task.check_levels(levels, "config.curriculum.levels")
  chat = load_model_chat(cfg.tokenizer, cfg.model.n_vocab_used)
  scorer = Scorer(task, cfg.rewards, answer_format=chat.answer_format)
  problems = [p for level in levels for p in task.examples(level, "train", 50)]
  sampler = make_sampler(cfg, task, problems, chat, cfg.model)
  return task, scorer, chat, sampler


def check_inputs(cfg: Config, pending: pathlib.Path) -> None:
  """Raises ValueError where `run` would before it samples; compiles nothing.

  Args:
    cfg: the config.
    pending: a recipe's folder, whose files are yet to be written.
  """
  del pending  # nothing but `init_from` is read
  prepare(cfg)


def run(c: Any, workdir: str, *, console: Any = None) -> dict[str, Any]:
  """Trains, or continues the run in `workdir`; returns its summary."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from rlm import cost, flops
  from rlm.checkpoint import initial
  from rlm.checkpoint.manager import CheckpointManager
  from rlm.eval.evaluate import trace_record
  from rlm.jsonl import JsonlWriter, read_jsonl
  from rlm.metrics import MetricsWriter, is_due
  from rlm.models.layout import make_layout
  from rlm.optim.optimizer import make_optimizer
  from rlm.optim.schedule import make_schedule
  from rlm.progress import Progress
  from rlm.rl import curriculum as curricula
  from rlm.rl.advantages import advantages_of, tied_groups
  from rlm.rl.cost import step_flops
  from rlm.rl.learner import Learner
  from rlm.rl.loss import freeze
  from rlm.rl.metrics import level_success, rollout_metrics
  from rlm.rl.objectives import make_objective
  from rlm.rl.rollout import collect
  from rlm.rl.selection import make_minibatch, split_rows
  from rlm.rl.state import RLState, copy_variables
  from rlm.stopping import Stopped, catch_signals
  from rlm.train import init_state
  from rlm.workdir import open_workdir

  # --- Config: every mistake is met here, before anything is compiled. -------
  c = fill_model(c, workdir)
  cfg = build(Config, c)
  launch.check_one_process()
  task, scorer, chat, sampler = prepare(cfg)
  model, sampling = sampler.model, cfg.sampling
  folder = open_workdir(workdir, c, may_change=MAY_CHANGE)
  if folder.summary is not None:
    folder.say_finished(console)
    return folder.summary

  # --- State: the policy, and the reference where something needs it. --------
  # By stage too: the final RL of a recipe draws other problems than the first.
  seed = zlib.crc32(f"{cfg.stage} {cfg.seed}".encode())
  init_key, rl_key = jax.random.split(jax.random.key(seed))
  objective = make_objective(cfg.objective)
  tx = freeze(make_optimizer(cfg.optimizer))
  layout = make_layout(model, cfg.mesh, "mesh")
  learner = Learner(
    layout,
    objective,
    cfg.selection,
    tx=tx,
    schedule=make_schedule(cfg.schedule),
    temperature=sampling.temperature,
    replay_routes=cfg.replay_routes,
    bias_update_rate=cfg.bias_update_rate,
    skip_nonfinite=cfg.on_nonfinite == "skip",
  )

  # Rollout and update take turns on the same devices.
  ledger = cost.open_ledger(
    max(cfg.mesh.devices, cfg.sampling_mesh.devices), model.cfg.dtype
  )

  def spent(work, tokens, seconds):
    del tokens  # sampled, scored and trained on cost differently
    return ledger.record(work, seconds)

  def start_state(variables):
    needed = objective.kl_weight > 0 or cfg.monitor_kl
    reference = copy_variables(variables) if needed else None
    return RLState.of(init_state(variables, tx, ema_decay=None), reference)

  def minibatch(rollout, advantages, rows):
    return make_minibatch(
      rollout,
      advantages,
      rows,
      objective,
      num_rows=cfg.selection.rows_per_minibatch,
      max_new_tokens=sampling.max_new_tokens,
    )

  def first_rows(rollout):
    """To measure on; nothing is learned from them."""
    rows = np.arange(cfg.selection.rows_per_minibatch)
    return minibatch(rollout, jnp.zeros(len(rollout.tokens)), rows)

  # --- The loop --------------------------------------------------------------
  with (
    CheckpointManager(
      folder.path / "checkpoints",
      keep=cfg.keep_checkpoints,
      keep_best=cfg.keep_best,
      config=folder.identity,
    ) as manager,
    catch_signals() as stop,
  ):
    template = layout.abstract(start_state, initial.shapes(model))
    if (saved := manager.restore(template)) is not None:
      start, state, extra = saved
      curriculum = extra["curriculum"]
    else:
      variables = initial.initial_variables(layout, cfg.init_from, init_key)
      if cfg.init_from is not None:
        folder.record_input("init_from", initial.digest(variables))
      start, state = 0, layout.jit(start_state)(variables)
      curriculum = curricula.initial_state(cfg.curriculum)
    policy, reference = state.policy, state.reference
    with (
      MetricsWriter(
        folder.path, next_step=start, on_nonfinite=cfg.on_nonfinite
      ) as log,
      JsonlWriter(
        folder.path / "traces" / f"{cfg.stage}.jsonl", next_step=start
      ) as traces,
      Progress(console, cfg.stage, cfg.steps, done=start) as bar,
    ):
      for step in range(start, cfg.steps):
        began = time.monotonic()
        sample_key, split_key, train_key = jax.random.split(
          jax.random.fold_in(rl_key, step), 3
        )
        levels = curricula.levels_for_step(
          cfg.curriculum, curriculum, seed, step, cfg.prompts_per_step
        )
        first = step * cfg.prompts_per_step
        problems = [
          task.problem(seed, first + i, level, "train")
          for i, level in enumerate(levels)
        ]

        # Generate and reward.
        rollout = collect(
          sampler,
          policy.variables,
          problems,
          chat,
          scorer,
          sample_key,
          group_size=cfg.group_size,
          row_length=sampler.capacity,
          weight_version=int(policy.step),
        )
        generated = time.monotonic()
        metrics: dict[str, Any] = {"curriculum/level": curriculum["top_level"]}
        if is_due(step, cfg.diagnostics_every_steps):
          metrics |= learner.diagnose(
            policy.variables, reference, first_rows(rollout)
          )

        # Advantages.
        rewards = jnp.asarray(rollout.rewards)
        tied = np.asarray(tied_groups(rewards, cfg.group_size))
        advantages = advantages_of(
          objective.advantage,
          rewards,
          cfg.group_size,
          eps=cfg.objective.advantage_eps,
        )
        batches = [
          minibatch(rollout, advantages, rows)
          for rows in split_rows(cfg.selection, tied, cfg.group_size, split_key)
        ]

        # Update. Without any signal, still hold the trainer to the sampler.
        if not batches:
          metrics |= learner.compare(policy.variables, first_rows(rollout))
        policy, reported = learner.update(policy, reference, batches, train_key)
        metrics |= rollout_metrics(rollout, tied) | reported
        metrics["trained_tokens"] = sum(
          int(batch["segment_ids"].sum()) for batch in batches
        )
        measurings = int(not batches)
        if is_due(step, cfg.diagnostics_every_steps):
          measurings += bool(cfg.model.num_nextn_predict_layers)
          if reference is not None and objective.kl_weight == 0:
            measurings += 2  # policy and reference
        metrics["flops"] = step_flops(
          cfg.model,
          rollout,
          group_size=cfg.group_size,
          row_length=sampler.capacity,
          trained_tokens=metrics["trained_tokens"],
          scorings=(cfg.selection.num_minibatches > 1)
          + (objective.kl_weight > 0),
          measured_rows=cfg.selection.rows_per_minibatch,
          measurings=measurings,
        )
        curriculum = curricula.update(
          cfg.curriculum, curriculum, level_success(rollout)
        )
        if reference is not None and is_due(step, cfg.reference_every_steps):
          reference = copy_variables(policy.variables)

        log.push(
          step,
          metrics,
          tokens=metrics["tokens"],
          ledger=functools.partial(spent, metrics["flops"]),
          timing={
            "generate_seconds": generated - began,
            "update_seconds": time.monotonic() - generated,
          },
          batch=batches,
        )
        bar.update(
          step + 1, **log.figures("reward/mean", "accuracy", "curriculum/level")
        )
        if is_due(step, cfg.traces_every_steps):
          for i in range(cfg.traces_per_step):
            row = i * cfg.group_size
            traces.write(
              trace_record(
                cfg.stage,
                step,
                rollout.problems[row],
                rollout.texts[row],
                rollout.scores[row],
                rollout.finished[row],
              )
            )
        last, stopping = step + 1 == cfg.steps, stop.after(step)
        if is_due(step, cfg.checkpoint_every_steps) or last or stopping:
          with log.paused():
            log.flush()  # finite, or it raises: a bad step is never saved
            traces.flush()
            manager.save(
              step + 1,
              RLState.of(policy, reference),
              {"curriculum": curriculum},
              metrics=log.record,
            )
        if stopping and not last:
          raise Stopped(cfg.stage, step + 1)
      seconds = log.total_seconds

  records = read_jsonl(folder.path / "metrics.jsonl")
  tokens = sum(record["tokens"] for record in records)
  trained = sum(record["trained_tokens"] for record in records)
  counts = flops.count_parameters(cfg.model)
  work = sum(record["flops"] for record in records)
  return folder.finish(
    {
      "stage": cfg.stage,
      "steps": cfg.steps,
      "seconds": seconds,
      "tokens": tokens,
      "trained_tokens": trained,
      "updates": int(policy.step),
      "flops": work,
      "ledger": ledger.record(work, seconds),
      "model": {"total": counts.total, "activated": counts.activated},
      "curriculum": curriculum,
    }
  )


def check_sampling(sampling: SamplingConfig) -> None:
  """Raises ValueError unless the trainer can reproduce the distribution."""
  if sampling.temperature == 0 or sampling.top_k or sampling.top_p < 1:
    raise ValueError(
      "config.sampling: RL needs temperature > 0, top_k=0 and top_p=1, got"
      f" temperature={sampling.temperature}, top_k={sampling.top_k} and"
      f" top_p={sampling.top_p}: the trainer's log-probs are of the whole"
      " distribution."
    )


if __name__ == "__main__":
  launch.main(run, __doc__)
