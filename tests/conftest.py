"""What every test runs under: 8 CPU devices, no silent broadcast, fixed seeds.

Devices come from jax.config and not from XLA_FLAGS, so that the child
processes of a test (runs that are killed and continued) see what a user sees.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# A [B] array that meets a [B, T] array is a bug here, never a convenience.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow; derandomised, so a failure repeats.
hypothesis.settings.register_profile("rlm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rlm")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Where tests run in several processes, those that share stay together."""
  for item in items:
    shared = {"recipes", "whole"} & set(item.fixturenames)
    group = "recipes" if shared else str(item.path)
    item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def environment_as_found():
  """Launching a run sets variables that the next test's children would see."""
  before = dict(os.environ)
  yield
  os.environ.clear()
  os.environ.update(before)
