"""A small run that several processes share; a child of processes_test.py.

FAULT=KIND:PROCESS:STEP makes one process, at that step, once a checkpoint is
there if there should be one:
  kill     die of SIGKILL
  stop     hang, as a host that vanished: SIGSTOP
  raise    raise an error that nobody foresaw
  mistake  raise a ValueError
  exit     leave by sys.exit(3)
  term     get SIGTERM
  int      get SIGINT
"""

import dataclasses
import os
import pathlib
import sys
import time

from experiments import launch


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int
  steps: int
  save_every_steps: int
  mesh: dict


def fail_if_due(step, checkpoints):
  kind, process, at = os.environ.get("FAULT", "none:0:0").split(":")
  import jax

  if kind == "none" or (jax.process_index(), step) != (int(process), int(at)):
    return
  deadline = time.monotonic() + 20
  while not (checkpoints / "3").exists() and step > 3:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  print("failing at", time.time(), flush=True)
  signals = {"kill": 9, "stop": 19, "term": 15, "int": 2}
  if kind in signals:
    os.kill(os.getpid(), signals[kind])
  elif kind == "raise":
    raise RuntimeError("the disk of this host is on fire")
  elif kind == "mistake":
    raise ValueError("this host has no such file")
  elif kind == "exit":
    sys.exit(3)


def run(c, workdir, *, console=None):
  from rlm.config import build
  from rlm.stopping import Stopped, catch_signals
  from rlm.workdir import open_workdir

  cfg = build(Config, c)
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  from rlm import processes
  from rlm.checkpoint.manager import CheckpointManager
  from rlm.metrics import MetricsWriter, is_due
  from rlm.parallel.config import MeshConfig
  from rlm.parallel.mesh import make_mesh
  from rlm.progress import Progress

  mesh = make_mesh(build(MeshConfig, c.mesh.to_dict()), "mesh")
  folder = open_workdir(workdir, c)
  if folder.summary is not None:
    folder.say_finished(console)
    return folder.summary
  places = {
    "step": NamedSharding(mesh, P()),
    "w": NamedSharding(mesh, P(("data", "fsdp"))),
    "none": NamedSharding(mesh, P()),
  }

  def init():
    none = jnp.zeros((0, 4), jnp.bfloat16)
    return {"step": jnp.int32(0), "w": jnp.zeros((16, 30)), "none": none}

  @jax.jit
  def step_fn(state, key):
    noise = jax.random.normal(key, state["w"].shape)
    w = 0.9 * state["w"] + noise + state["w"].mean()
    w = jax.lax.with_sharding_constraint(w, places["w"])
    loss = jax.lax.with_sharding_constraint((w**2).mean(), places["step"])
    return {**state, "w": w, "step": state["step"] + 1}, {"loss": loss}

  template = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    jax.eval_shape(init),
    places,
  )
  key, start = jax.random.key(cfg.seed), 0
  checkpoints = pathlib.Path(workdir) / "checkpoints"
  with (
    CheckpointManager(checkpoints, keep=2, config=folder.identity) as manager,
    catch_signals() as stop,
  ):
    if (saved := manager.restore(template)) is not None:
      start, state, _ = saved
    else:
      state = jax.jit(init, out_shardings=places)()
    with (
      MetricsWriter(folder.path, next_step=start, on_nonfinite="stop") as log,
      Progress(console, "tiny", cfg.steps, done=start) as bar,
    ):
      for step in range(start, cfg.steps):
        fail_if_due(step, checkpoints)
        state, metrics = step_fn(state, jax.random.fold_in(key, step))
        log.push(step, metrics)
        bar.update(step + 1)
        # Signals take about a second to reach the others.
        time.sleep(float(os.environ.get("STEP_SECS", "0")))
        last, stopping = step + 1 == cfg.steps, stop.after(step)
        if is_due(step, cfg.save_every_steps) or last or stopping:
          log.flush()
          manager.save(step + 1, state)
        if stopping and not last:
          raise Stopped("tiny", step + 1)
  return processes.on_primary(lambda: folder.finish({"steps": cfg.steps}))


if __name__ == "__main__":
  launch.main(run, __doc__, several_processes=True)
