"""A tiny run that kills itself where FAULT says; the child of resume_test.py.

FAULT=KIND:N kills at the N-th event of a kind, counted from 1:
  line     a line of a .jsonl file: its first half is written
  io       a rename, replace or fsync: before it
  rename   a rename: before it (the third of a save is Orbax's commit)
  save     a checkpoint: between the flush of the metrics and the save
  prune    the removal of an old checkpoint: half its files are gone
  step     a step: before its metrics are pushed
  term     a step: SIGTERM, not a kill
  nan      a step: its loss is not a number
"""

import dataclasses
import os
import pathlib
import shutil
import signal

from experiments import launch


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int
  steps: int
  save_every_steps: int
  on_nonfinite: str


class Fault:
  """Counts events and kills this process at the chosen one."""

  def __init__(self):
    kind, _, n = os.environ.get("FAULT", "none:0").partition(":")
    self.kind, self.left = kind, int(n)

  def due(self, kind):
    if kind == self.kind:
      self.left -= 1
    return kind == self.kind and self.left == 0

  def kill_if_due(self, kind):
    if self.due(kind):
      kill()


def kill():
  os.kill(os.getpid(), signal.SIGKILL)


def install(fault):
  """Puts the fault into the functions that write."""
  from rlm import jsonl

  def killing(name, function):
    def wrapped(*args, **kwargs):
      fault.kill_if_due("io")
      fault.kill_if_due(name)
      return function(*args, **kwargs)

    return wrapped

  rmtree = shutil.rmtree

  def killing_rmtree(path, *args, **kwargs):
    if fault.due("prune"):
      for i, file in enumerate(sorted(pathlib.Path(path).rglob("*"))):
        if i % 2 and file.is_file():
          file.unlink()
      kill()
    return rmtree(path, *args, **kwargs)

  class TearingFile:
    def __init__(self, file):
      self.file = file

    def write(self, data):
      if fault.due("line"):
        self.file.write(data[: len(data) // 2])
        kill()
      return self.file.write(data)

    def __getattr__(self, name):
      return getattr(self.file, name)

  opened = jsonl.JsonlWriter.__init__

  def tearing_init(self, *args, **kwargs):
    opened(self, *args, **kwargs)
    self._file = TearingFile(self._file)

  for name in ("rename", "replace", "fsync"):
    setattr(os, name, killing(name, getattr(os, name)))
  shutil.rmtree = killing_rmtree
  jsonl.JsonlWriter.__init__ = tearing_init


def run(c, workdir, *, console=None):
  from rlm.config import build
  from rlm.progress import Progress
  from rlm.stopping import Stopped, catch_signals
  from rlm.workdir import open_workdir

  cfg = build(Config, c)
  folder = open_workdir(workdir, c)
  if folder.summary is not None:
    folder.say_finished(console)
    return folder.summary

  import jax
  import jax.numpy as jnp

  from rlm.checkpoint.manager import CheckpointManager
  from rlm.metrics import MetricsWriter, is_due

  fault = Fault()
  install(fault)
  key = jax.random.key(cfg.seed)

  @jax.jit
  def step_fn(state, key):
    w = 0.9 * state["w"] + jax.random.normal(key, state["w"].shape)
    metrics = {"loss": jnp.mean(w**2), "load": w[:3], "nonfinite": 0}
    return {**state, "w": w, "step": state["step"] + 1}, metrics

  state = {"step": jnp.int32(0), "w": jnp.zeros(300), "router": {}, "ema": None}
  start, extra = 0, {"seen": []}
  with (
    CheckpointManager(
      folder.path / "checkpoints", keep=2, config=folder.identity
    ) as manager,
    catch_signals() as stop,
  ):
    if (saved := manager.restore(state)) is not None:
      start, state, extra = saved
    with (
      MetricsWriter(
        folder.path, next_step=start, on_nonfinite=cfg.on_nonfinite
      ) as log,
      Progress(console, "tiny", cfg.steps, done=start) as bar,
    ):
      for step in range(start, cfg.steps):
        state, metrics = step_fn(state, jax.random.fold_in(key, step))
        fault.kill_if_due("step")
        if fault.due("nan"):
          metrics = {**metrics, "loss": jnp.nan, "nonfinite": 1}
        log.push(step, metrics, batch={"step": jnp.int32(step)})
        bar.update(step + 1, **log.figures("loss"))
        extra["seen"].append(step)
        if fault.due("term"):
          os.kill(os.getpid(), signal.SIGTERM)
        last = step + 1 == cfg.steps
        if is_due(step, cfg.save_every_steps) or last or stop.requested:
          with log.paused():
            log.flush()
            fault.kill_if_due("save")
            manager.save(step + 1, state, extra)
        if stop.requested and not last:
          raise Stopped("tiny", step + 1)
  return folder.finish({"steps": cfg.steps, "seen": extra["seen"]})


if __name__ == "__main__":
  launch.main(run, __doc__)
