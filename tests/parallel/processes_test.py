"""Several processes are one machine: same data, same run, one end.

Each process is a child on this host with 4 of the 8 CPU devices.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest

from experiments import pretrain
from rlm import processes
from rlm.checkpoint import initial
from rlm.checkpoint.manager import CheckpointManager
from rlm.config import build
from rlm.jsonl import read_jsonl
from tests.parallel import processes_config
from tests.parallel.run_pretrain import parts

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
TINY_CONFIG = """
import ml_collections

def get_config():
  c = ml_collections.ConfigDict()
  c.seed, c.steps, c.save_every_steps = 0, 8, 3
  c.mesh = dict(data=2, fsdp=4, expert=1, context=1, tensor=1)
  return c
"""


class Run:
  """The processes of a run: their exit codes and what they printed."""

  def __init__(self, command, num_processes, env):
    with socket.socket() as free:
      free.bind(("localhost", 0))
      address = f"localhost:{free.getsockname()[1]}"
    flags = [f"--coordinator_address={address}"]
    flags += [f"--num_processes={num_processes}"]
    several = num_processes > 1
    self.files = [tempfile.TemporaryFile("w+") for _ in range(num_processes)]
    self.children = [
      subprocess.Popen(
        [sys.executable, *(part.format(process=i) for part in command)]
        + ([*flags, f"--process_id={i}"] if several else []),
        env={
          **os.environ,
          "PYTHONPATH": str(ROOT),
          "RLM_HUGE_PAGES": "1",
          **env,
        },
        stdout=file,
        stderr=subprocess.STDOUT,
      )
      for i, file in enumerate(self.files)
    ]

  def wait(self, secs=120):
    """Waits for all; those that outlive `secs` are killed."""
    deadline = time.monotonic() + secs
    try:
      for child in self.children:
        child.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
      for child in self.children:
        child.kill()
    self.codes = [child.wait() for child in self.children]
    self.out = []
    for file in self.files:
      with file:
        file.seek(0)
        self.out.append(file.read())
    return self


def start_tiny(folder, name, num_processes=2, **env):
  """Starts tiny_loop.py in folder / name."""
  config = folder / "tiny.py"
  if not config.exists():
    config.write_text(TINY_CONFIG)
  command = [
    str(HERE / "tiny_loop.py"),
    f"--config={config}",
    f"--workdir={folder / name}",
  ]
  return Run(command, num_processes, env)


@pytest.fixture
def tiny(tmp_path):
  """Starts tiny_loop.py in tmp_path / "run"."""

  def start(**env):
    return start_tiny(tmp_path, "run", **env)

  return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Folder of a tiny run to which nothing happened."""
  folder = tmp_path_factory.mktemp("tiny")
  run = start_tiny(folder, "whole").wait()
  assert run.codes == [0, 0], run.out
  return folder / "whole"


def assert_equal_runs(folder, whole):
  for name in ("metrics.jsonl", "summary.json"):
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


# --- Pretraining. ------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Pretrained by two processes in two/, by one in one/."""
  folder = tmp_path_factory.mktemp("pretrain")
  env = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles sooner
  for name, num_processes in (("two", 2), ("one", 1)):
    command = [
      str(HERE / "run_pretrain.py"),
      f"--config={HERE / 'processes_config.py'}",
      f"--workdir={folder / name}",
    ]
    run = Run(command, num_processes, env).wait(240)
    assert run.codes == [0] * num_processes, "\n".join(run.out)
    for out in run.out[1:]:
      assert "pretrain" not in out  # one console is enough
  return folder


def digests(folder):
  """What all processes of a run noted, joined."""
  noted = [read_lines(path) for path in sorted(folder.glob("digests.*"))]
  return [
    {key: value for line in lines for key, value in line.items()}
    | {
      "batch": {
        k: v for line in lines for k, v in line.get("batch", {}).items()
      }
    }
    | {
      "params": {
        k: v for line in lines for k, v in line.get("params", {}).items()
      }
    }
    for lines in zip(*noted, strict=True)
  ]


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.full
def test_batches_are_the_same_by_one_process_and_by_two(folder):
  one, two = digests(folder / "one"), digests(folder / "two")
  batches = [line["batch"] for line in one if line["batch"]]
  assert len(batches) == 6
  assert batches == [line["batch"] for line in two if line["batch"]]
  # Each read its own half of the rows, and they differ.
  halves = [read_lines(folder / f"two/digests.{p}.jsonl")[0] for p in (0, 1)]
  assert not halves[0]["batch"].keys() & halves[1]["batch"].keys()


@pytest.mark.full
def test_metrics_are_the_same_by_one_process_and_by_two(folder):
  one, two = (
    read_jsonl(folder / name / "metrics.jsonl") for name in ("one", "two")
  )
  assert len(one) == len(two) == 6
  for a, b in zip(one, two, strict=True):
    assert list(a) == list(b)
    for name, value in a.items():
      np.testing.assert_allclose(b[name], value, rtol=1e-6, err_msg=name)
  timing = read_jsonl(folder / "two" / "timing.jsonl")
  assert all(record["tokens_per_second"] > 0 for record in timing)
  run = json.loads((folder / "two" / "run.json").read_text())
  assert (run["processes"], run["devices"]) == (2, 8)
  summary = json.loads((folder / "two" / "summary.json").read_text())
  best = summary["best"]["heldout/stdlib/bits_per_byte"]
  assert best == min(
    r["heldout/stdlib/bits_per_byte"]
    for r in two
    if "heldout/stdlib/bits_per_byte" in r
  )


@pytest.mark.full
@pytest.mark.parametrize(
  "mesh",
  [
    dict(data=2, fsdp=2, expert=2, context=1, tensor=1),
    dict(data=1, fsdp=2, expert=1, context=2, tensor=1),
    dict(data=1, fsdp=1, expert=4, context=1, tensor=2),
  ],
  ids=["same mesh", "4 devices", "8 others"],
)
def test_what_two_processes_saved_one_restores_to_the_bit(
  folder, tmp_path, mesh
):
  (saved,) = (d for d in digests(folder / "two") if d.get("saved") == 6)
  c = processes_config.get_config()
  c.mesh = mesh
  layout, start, _ = pretrain.make_training(build(pretrain.Config, c))
  template = layout.abstract(start, initial.shapes(layout.whole))
  shutil.copytree(folder / "two" / "checkpoints", tmp_path / "checkpoints")
  with CheckpointManager(tmp_path / "checkpoints", keep=2) as manager:
    step, state, _ = manager.restore(template)
  assert step == 6
  params = state.variables["params"]
  for leaf, wanted in zip(
    jax.tree.leaves(state), jax.tree.leaves(template), strict=True
  ):
    assert leaf.sharding == wanted.sharding
  # The parts that the two processes held, cut from what was restored.
  host = {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  assert len(saved["params"]) > 2 * len(host)
  for part, checksum in saved["params"].items():
    name, _, index = part.partition("[")
    bounds = json.loads(f"[{index}".replace("(", "[").replace(")", "]"))
    cut = host[name][tuple(slice(*pair) for pair in bounds)]
    assert parts({"x": jax.numpy.asarray(cut)}).popitem()[1] == checksum, part


# --- How runs end. -----------------------------------------------------------


def failed_at(out):
  return float(re.search(r"failing at ([\d.]+)", out)[1])


def test_the_death_of_process_0_ends_the_other_and_the_run_continues(
  tmp_path, tiny, whole
):
  run = tiny(FAULT="kill:0:5").wait()
  ended = time.time() - failed_at(run.out[0])
  assert run.codes[0] == -signal.SIGKILL and run.codes[1] != 0
  assert ended < 30
  assert "another task died" in run.out[1]
  again = tiny().wait()
  assert again.codes == [0, 0], again.out
  assert read_jsonl(tmp_path / "run" / "timing.jsonl")[-1]["step"] == 7
  starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
  assert len(starts) == 2
  assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.full
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_the_death_of_another_process_is_noticed_in_a_minute(
  tmp_path, tiny, whole, fault
):
  run = tiny(FAULT=f"{fault}:1:5")
  assert run.children[0].wait(100) != 0
  ended = time.time()
  run.children[1].kill()
  run.wait()
  assert ended - failed_at(run.out[1]) < 60
  assert re.search(
    r"unhealthy \(stopped sending heartbeats\):\s+1\b", run.out[0]
  )
  assert tiny().wait().codes == [0, 0]
  assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize(
  "fault, code, reason",
  [
    ("raise:0:5", 1, "RuntimeError: the disk of this host is on fire"),
    pytest.param(
      "mistake:1:5", 2, "this host has no such file", marks=pytest.mark.full
    ),
    pytest.param("exit:1:5", 1, "SystemExit: 3", marks=pytest.mark.full),
    pytest.param("raise:1:0", 1, "RuntimeError: ", marks=pytest.mark.full),
  ],
)
def test_an_error_in_one_ends_both_with_its_reason(tiny, fault, code, reason):
  run = tiny(FAULT=fault).wait()
  failed = int(fault.split(":")[1])
  assert run.codes == [code, code], run.out
  assert time.time() - failed_at(run.out[failed]) < 15
  assert reason in run.out[failed]
  other = run.out[1 - failed]
  assert f"process {failed} failed, which ends process {1 - failed}" in other
  assert reason in other and "Traceback" not in other


@pytest.mark.parametrize(
  "fault",
  [
    "term:1:2",
    pytest.param("term:0:2", marks=pytest.mark.full),
    pytest.param("int:1:2", marks=pytest.mark.full),
  ],
)
def test_a_signal_to_one_stops_both_after_the_same_step(
  tmp_path, tiny, whole, fault
):
  run = tiny(FAULT=fault, STEP_SECS="0.5").wait()
  assert run.codes == [0, 0], run.out
  (step,) = re.findall(r"tiny stopped after step (\d) and is sav", run.out[0])
  assert "stopped after" not in run.out[1]
  assert 3 <= int(step) < 8
  assert (tmp_path / "run" / "checkpoints" / step).is_dir()
  assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == int(step)
  assert tiny().wait().codes == [0, 0]
  assert_equal_runs(tmp_path / "run", whole)


def test_a_mistake_of_all_is_told_and_ends_all(tmp_path, whole):
  shutil.copytree(whole, tmp_path / "run")
  other = TINY_CONFIG.replace("= 0, 8, 3", "= 1, 8, 3")
  (tmp_path / "tiny.py").write_text(other)
  run = start_tiny(tmp_path, "run").wait()
  assert run.codes == [2, 2], run.out
  assert "seed: 0 -> 1" in run.out[0] and "seed: 0 -> 1" in run.out[1]


def test_a_finished_run_is_left_alone(tmp_path, whole):
  shutil.copytree(whole, tmp_path / "run")
  run = start_tiny(tmp_path, "run").wait()
  assert run.codes == [0, 0], run.out
  assert "is finished" in run.out[0] and "is finished" not in run.out[1]


@pytest.mark.full
def test_each_process_must_see_the_same_folder(tmp_path):
  """As hosts that share no file system; half a minute is given to see it."""
  run = start_tiny(tmp_path, "process_{process}").wait()
  assert run.codes == [2, 2], run.out
  assert "is another folder here than on process 0" in run.out[1]
  assert "process 1 failed, which ends process 0" in run.out[0]


# --- How processes find each other. ------------------------------------------


def plan(**environ):
  return processes.make_plan(None, None, None, environ)


SLURM = dict(
  SLURM_JOB_ID="7",
  SLURM_STEP_NODELIST="node[0-7]",
  SLURM_NTASKS="8",
  SLURM_PROCID="3",
  SLURM_LOCALID="0",
  SLURM_STEP_NUM_NODES="8",
)
OMPI = dict(
  OMPI_MCA_orte_hnp_uri="4096.0;tcp://10.0.0.1:34911",
  OMPI_COMM_WORLD_SIZE="16",
  OMPI_COMM_WORLD_LOCAL_SIZE="8",
)


def test_clusters_are_found_by_their_variables():
  assert plan() == plan(SLURM_JOB_ID="7", SLURM_NTASKS="8")  # under no srun
  assert plan().processes == 1
  assert plan(**SLURM) == processes.Plan(8, one_per_host=True)
  assert plan(**{**SLURM, "SLURM_STEP_NUM_NODES": "1"}) == processes.Plan(8)
  assert plan(**OMPI) == processes.Plan(16)
  assert plan(**{**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}).one_per_host
  hosts = dict(TPU_WORKER_HOSTNAMES="a,b,c,d")
  assert plan(**hosts).processes == 4
  assert plan(**hosts, MEGASCALE_NUM_SLICES="2").processes == 8
  given = processes.make_plan("a:1", 2, 1, SLURM)
  assert given == processes.Plan(2, "a:1", 1)


@pytest.mark.parametrize(
  "flags, text",
  [
    (("a:1", 2, None), "--process_id is missing: --coordinator_address, --num"),
    ((None, 2, 0), "--coordinator_address is missing"),
    (("node0", 2, 0), "=node0 must be host:port of process 0, such as node0:"),
    (("node0:x", 2, 0), "=node0:x must be host:port"),
    (("a:1", 2, 2), "--process_id=2 must lie within 0 and --num_processes=2"),
    (("a:1", 0, 0), "--process_id=0 must lie within"),
  ],
)
def test_wrong_flags_are_refused(flags, text):
  with pytest.raises(ValueError, match=re.escape(text)):
    processes.make_plan(*flags, {})


def test_slurm_with_one_process_a_host_keeps_all_gpus():
  """As srun would start it, on this host; jax itself would take GPU 0."""
  code = (
    "import jax; from rlm import processes as p\n"
    "p.join(p.make_plan(None, None, None))\n"
    "from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES as gpus\n"
    "print(gpus.value, p.joined())\n"
    "p.part()"
  )
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  children = [
    subprocess.Popen(
      [sys.executable, "-c", code],
      env={
        **os.environ,
        **SLURM,
        "PYTHONPATH": str(ROOT),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_PROCID": str(i),
        "JAX_COORDINATOR_PORT": port,
      },
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for child in children:
    assert "all True" in child.communicate(timeout=100)[0].splitlines()
    assert child.returncode == 0


def test_alone_nothing_starts():
  processes.join(processes.Plan())
  assert not processes.joined() and processes.is_primary()
  assert processes.on_primary(lambda: {1: 2}) == {1: 2}
  processes.part()
