"""What every test runs under: 8 CPU devices, no silent broadcast, fixed seeds.

Devices come from jax.config and not from XLA_FLAGS, so that the child
processes of a test (runs that are killed and continued) see a user's devices.
"""

import itertools
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import jax
import pytest
from xdist import scheduler

jax.config.update("jax_num_cpu_devices", 8)
# A [B] array that meets a [B, T] array is a bug here, never a convenience.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow; derandomised, so a failure repeats.
hypothesis.settings.register_profile("rlm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rlm")


def pytest_configure(config):
  """In every run, programs of XLA's plainer emitters; --full, a user's.

  Compiling is most of the time, and these take a third off it. XLA of another
  version may not know the flag, and then ends the process.
  """
  if "not full" in config.option.markexpr and jax.__version__ == "0.10.2":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


class _ByFile(scheduler.LoadFileScheduling):
  """A file's tests in one process, which compiles what they share once."""

  def _split_scope(self, nodeid):
    file = super()._split_scope(nodeid)
    # These share a recipe that takes a minute and a half to run.
    shared = ("experiments/r1_test.py", "experiments/recipe_kill_test.py")
    return "recipe" if file.endswith(shared) else file


def pytest_xdist_make_scheduler(config, log):
  return _ByFile(config, log)


def _memory_maps() -> int:
  try:
    return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
  except OSError:  # no Linux
    return 0


_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def fewer_programs_than_maps():
  """A compiled program takes memory maps, of which a process has 65,530.

  Without one left, XLA ends in a segmentation fault as it compiles the next.
  Counting many takes 20 ms, hence not after every test.
  """
  yield
  if next(_tests_run) % 8 == 0 and _memory_maps() > 30_000:
    jax.clear_caches()


@pytest.fixture(autouse=True)
def environment_as_found():
  """Launching a run sets variables that the next test's children would see."""
  before = dict(os.environ)
  yield
  os.environ.clear()
  os.environ.update(before)
