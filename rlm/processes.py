"""Several processes that work as one machine, joined by jax's own runtime.

A command alone starts nothing here and imports no jax. Where SLURM, Open MPI, a
TPU or Kubernetes started several, jax finds the others by itself; elsewhere
three flags say where they are (`experiments/launch.py`).

What is done once, such as writing files, is done by process 0, the primary. A
process that fails tells the others why and all end at once: jax alone would
wait for it in its shutdown for minutes, the others in a collective. One that is
killed cannot tell; the others miss its heartbeats and end with jax's message
within `HEARTBEAT_TIMEOUT_SECS`.
"""

import dataclasses
import glob
import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

# A dead process is noticed between half of this and all of it; jax has 100.
HEARTBEAT_TIMEOUT_SECS = 40
_FAILURES = "rlm/failures"  # folder of jax's store, one entry per process
_LOOK_EVERY_SECS = 0.5
# The end of process 0 cuts the others off before they could say anything.
_LINGER_SECS = 2.0

_SLURM = (  # those that jax asks for, that is, of a process under srun
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """How this process will find the others.

  Attributes:
    processes: how many; None where jax has to ask the cluster.
    address: host and port of process 0; None where jax finds it.
    process_id: of this one; None where jax finds it.
    one_per_host: whether a process has its host to itself, and so all GPUs.
  """

  processes: int | None = 1
  address: str | None = None
  process_id: int | None = None
  one_per_host: bool = False


def make_plan(
  address: str | None,
  num_processes: int | None,
  process_id: int | None,
  environ: Mapping[str, str] = os.environ,
) -> Plan:
  """What the flags say, or else the variables of a cluster.

  Args:
    address: host:port of process 0, the same on all.
    num_processes: how many.
    process_id: of this one, 0 to num_processes - 1.
    environ: the environment.

  Raises:
    ValueError: the flags are incomplete or contradict each other.
  """
  flags = {
    "coordinator_address": address,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [name for name, value in flags.items() if value is None]
  if len(missing) == len(flags):
    return _find_cluster(environ)
  if missing:
    raise ValueError(
      f"--{missing[0]} is missing: --coordinator_address, --num_processes and"
      " --process_id are given together, or none of them in a cluster that jax"
      " knows."
    )
  assert address is not None
  assert num_processes is not None and process_id is not None
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(
      f"--coordinator_address={address} must be host:port of process 0, such as"
      " node0:1234."
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"--process_id={process_id} must lie within 0 and"
      f" --num_processes={num_processes} less 1."
    )
  return Plan(num_processes, address, process_id)


def _find_cluster(environ: Mapping[str, str]) -> Plan:
  """The cluster that jax will find, in jax's order, without importing it."""
  if "OMPI_MCA_orte_hnp_uri" in environ:
    alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return Plan(int(environ["OMPI_COMM_WORLD_SIZE"]), one_per_host=alone)
  if all(name in environ for name in _SLURM):
    count = environ["SLURM_NTASKS"]
    nodes = environ.get("SLURM_STEP_NUM_NODES")
    return Plan(int(count), one_per_host=nodes == count)
  hosts = environ.get("TPU_PROCESS_ADDRESSES")
  hosts = hosts or environ.get("TPU_WORKER_HOSTNAMES")
  if hosts:
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    return Plan(len(hosts.split(",")) * slices)
  has_chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  if has_chips and importlib.util.find_spec("libtpu"):
    return Plan(None)
  in_job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environ)
  if in_job and importlib.util.find_spec("kubernetes"):
    return Plan(None)
  return Plan()


def join(plan: Plan) -> None:
  """Finds the other processes and returns when all are there.

  Call it before anything that asks jax for its devices. Nothing happens where
  this process is the only one.

  Args:
    plan: from `make_plan`.
  """
  if plan.processes == 1:
    return
  import jax

  found: dict[str, Any] = {}
  if plan.address is not None:
    found = dict(
      coordinator_address=plan.address,
      num_processes=plan.processes,
      process_id=plan.process_id,
      cluster_detection_method="deactivate",
    )
  try:
    jax.distributed.initialize(
      **found, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECS
    )
  except ValueError:
    if plan.processes is None:
      return  # chips or a pod, and no cluster
    raise
  if plan.one_per_host and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
    # Of SLURM and Open MPI jax takes one GPU a process, whatever is there.
    jax.config.update("jax_cuda_visible_devices", "all")
    jax.config.update("jax_rocm_visible_devices", "all")
  threading.Thread(target=_watch, daemon=True).start()


def joined() -> bool:
  """Whether `join` found other processes, and they have not parted."""
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized()


def is_primary() -> bool:
  """Whether this process writes: process 0, or the only one."""
  return not joined() or sys.modules["jax"].process_index() == 0


def on_primary(f: Callable[[], Any]) -> Any:
  """What process 0 makes of f(), on every process.

  All processes call it, in the same order as their other collectives.

  Args:
    f: called on process 0 alone; where there are others, its result is what
      JSON can hold.
  """
  if not joined():
    return f()
  import numpy as np
  from jax.experimental import multihost_utils

  data = json.dumps(f()).encode() if is_primary() else b""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  padded = np.zeros(size, np.uint8)
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))


def part() -> None:
  """Waits for all processes at the end of a run, and parts from them.

  One that leaves earlier would cut the others off after a while.
  """
  if not joined():
    return
  import jax
  from jax.experimental import multihost_utils

  multihost_utils.sync_global_devices("rlm: end of the run")
  jax.distributed.shutdown()


def abandon(reason: str, code: int) -> NoReturn:
  """Ends this process at once, and tells the others why they end as well.

  Args:
    reason: what happened, already printed here.
    code: exit code of all.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  process_id = 0
  try:
    client, process_id = _client()
    failure = json.dumps({"id": process_id, "reason": reason, "code": code})
    client.key_value_set(f"{_FAILURES}/{process_id}", failure)
  except Exception:  # its own end matters more than whether the others hear
    traceback.print_exc()
  if process_id == 0:
    time.sleep(_LINGER_SECS)
  os._exit(code)  # exit() would wait for the others, who wait for this one


def _watch() -> None:
  """Ends this process when another tells that it failed."""
  client, process_id = _client()
  while joined():
    try:
      failures = client.key_value_dir_get(_FAILURES)
    except Exception:
      return  # the run is over, or jax is about to end this process
    others = [json.loads(text) for _, text in failures]
    others = [other for other in others if other["id"] != process_id]
    if others:
      print(
        f"error: process {others[0]['id']} failed, which ends process"
        f" {process_id} as well: {others[0]['reason']}",
        file=sys.stderr,
        flush=True,
      )
      os._exit(others[0]["code"])
    time.sleep(_LOOK_EVERY_SECS)


def _client() -> tuple[Any, int]:
  """The store of keys and values of jax, and this process's id.

  Neither has a public name that starts no backend.
  """
  from jax._src import distributed

  state = distributed.global_state
  return state.client, state.process_id
