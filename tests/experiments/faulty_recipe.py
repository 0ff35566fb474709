"""The recipe as a command that is killed, stopped or robbed of a file.

  FAULTS="kill@push:pretrain#90 tear@push:rl#4 none" python faulty_recipe.py \
    --config=... --workdir=...

Each fault is a process of its own, forked from this one before jax has started
anything, which runs the command of experiments/r1.py; the next one continues
what it left.  (Forked, since importing takes longer than a tiny stage.)  The
exit code of each is printed.

ACTION@EVENT#N acts at the N-th event of a kind in its process:
  kill   SIGKILL
  term   SIGTERM
  tear   a file of the stage's second checkpoint loses a byte; SIGKILL
  fill   the disk is full from now on, until the next process starts
"none" runs to the end.

Events, PATH being within the workdir, "*" any of them:
  push:STAGE      a step's metrics; before they are taken
  generate:STAGE  a call of the sampler, STAGE also evaluate/STAGE
  line:PATH       a line of a .jsonl file; a kill leaves half of it
  rename:PATH, fsync:PATH, rmtree:PATH
                  before it; of a rename PATH is the new name
"""

import collections
import contextlib
import os
import pathlib
import shutil
import signal
import sys
import time

from experiments import launch, r1
from tests.experiments import shrunk_laptop

BALLAST = "ballast"


class Faults:
  """Counts this process's events and acts at the chosen one.

  Attributes:
    counts: event -> how often it came, over the whole run.
  """

  def __init__(self, fault, workdir):
    self.action, _, event = fault.partition("@")
    self.event, _, n = event.partition("#")
    self.left = int(n or 0)
    self.workdir = pathlib.Path(workdir).absolute()
    self.counts = collections.Counter()
    self.stage = ""

  def name(self, path):
    path = pathlib.Path(path).absolute()
    inside = path.is_relative_to(self.workdir)
    return str(path.relative_to(self.workdir)) if inside else str(path)

  def due(self, kind, where):
    event = f"{kind}:{where}"
    self.counts[event] += 1
    if self.event in (event, "*"):
      self.left -= 1
      return self.left == 0
    return False

  def act(self):
    if self.action == "fill":
      fill_disk(self.workdir)
      return
    if self.action == "tear":
      tear(self.workdir / self.stage / "checkpoints")
    term = self.action == "term"
    os.kill(os.getpid(), signal.SIGTERM if term else signal.SIGKILL)

  def meet(self, kind, where):
    if self.due(kind, where):
      self.act()


def tear(checkpoints):
  """Cuts the last byte off the second checkpoint's largest file.

  Checkpoints are written in the background: it may have to be waited for.
  """
  deadline = time.monotonic() + 60
  while True:
    steps = [p for p in checkpoints.iterdir() if p.name.isdecimal()]
    if len(steps) > 1:
      break
    assert time.monotonic() < deadline, f"{checkpoints} holds one checkpoint"
    time.sleep(0.05)
  newest = max(steps, key=lambda path: int(path.name))
  files = [path for path in newest.rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  os.truncate(largest, largest.stat().st_size - 1)


def fill_disk(workdir):
  """Leaves no byte free, as another program might."""
  total = shutil.disk_usage(workdir).total
  assert total < 1 << 30, f"{workdir} is not on a small disk of its own"
  with open(workdir / BALLAST, "wb", buffering=0) as file:
    for size in (1 << 20, 1 << 12, 1):
      with contextlib.suppress(OSError):
        while True:
          file.write(bytes(size))


def install(faults):
  """Puts the events into whatever writes and samples."""
  from rlm import jsonl, metrics, workdir
  from rlm.sampling import sampler

  def before(owner, attribute, kind, where):
    function = getattr(owner, attribute)

    def wrapped(*args, **kwargs):
      faults.meet(kind, where(*args))
      return function(*args, **kwargs)

    setattr(owner, attribute, wrapped)

  def opened_file(descriptor):
    return faults.name(os.readlink(f"/proc/self/fd/{descriptor}"))

  before(os, "rename", "rename", lambda old, new: faults.name(new))
  before(os, "replace", "rename", lambda old, new: faults.name(new))
  before(os, "fsync", "fsync", opened_file)
  before(shutil, "rmtree", "rmtree", lambda path, *_: faults.name(path))
  before(
    metrics.MetricsWriter,
    "push",
    "push",
    lambda log, *_: faults.name(log.folder),
  )
  before(sampler.Sampler, "generate", "generate", lambda *_: faults.stage)

  open_workdir = workdir.open_workdir

  def noted_open_workdir(path, *args, **kwargs):
    faults.stage = faults.name(path)
    return open_workdir(path, *args, **kwargs)

  workdir.open_workdir = noted_open_workdir

  class TearingFile:
    def __init__(self, file, name):
      self.file, self.name = file, name

    def write(self, data):
      if faults.due("line", self.name):
        self.file.write(data[: len(data) // 2])
        faults.act()
      return self.file.write(data)

    def __getattr__(self, name):
      return getattr(self.file, name)

  opened = jsonl.JsonlWriter.__init__

  def tearing_init(self, *args, **kwargs):
    opened(self, *args, **kwargs)
    self._file = TearingFile(self._file, faults.name(self.path))

  jsonl.JsonlWriter.__init__ = tearing_init


def import_all():
  """What the stages import when they run, but for starting jax."""
  from experiments import distill, evaluate, pretrain, reject, rl, sft  # noqa: F401
  from rlm.checkpoint import initial  # noqa: F401
  from rlm.data import pipeline  # noqa: F401
  from rlm.eval import heldout  # noqa: F401
  from rlm.report import html  # noqa: F401
  from rlm.rl import learner, rejection  # noqa: F401
  from rlm.sampling import sampler  # noqa: F401


def main():
  workdir = next(
    arg.partition("=")[2] for arg in sys.argv if arg.startswith("--workdir=")
  )
  # As launch.main would, but before import_all imports jax.
  launch.keep_compiled(workdir)
  launch.offer_cpu_devices(shrunk_laptop.get_config())
  import_all()
  for fault in os.environ["FAULTS"].split():
    pathlib.Path(workdir, BALLAST).unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if not child:
      faults = Faults(fault, workdir)
      install(faults)
      try:
        launch.main(r1.run, r1.__doc__, ["experiments.r1", *sys.argv[1:]])
      finally:
        print(f"{faults.counts.total()} events", flush=True)
      return
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"{fault} ended with code {code}", flush=True)
  sys.exit(code)


if __name__ == "__main__":
  main()
