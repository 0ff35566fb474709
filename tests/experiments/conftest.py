"""Recipes as commands, and one that nothing disturbed, shared by the tests."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest


class Recipes:
  """Starts the shrunk laptop recipe in folders beside each other.

  Attributes:
    root: of the repository.
    folder: holds the runs' folders.
    env: of every command; compiled programs are shared, and compiled without
      care, since most of a tiny run's time goes there.
  """

  root = pathlib.Path(__file__).resolve().parents[2]

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    flags = os.environ.get("XLA_FLAGS", "")
    self.env = {
      **os.environ,
      "PYTHONPATH": str(self.root),
      "JAX_COMPILATION_CACHE_DIR": str(folder / "compilation_cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
    }

  def start(self, name: str, *faults: str, flags=(), prefix=()):
    """Runs the command once for each fault; see faulty_recipe.py.

    Args:
      name: of the run's folder, or its absolute path.
      *faults: one for each process.
      flags: of the command.
      prefix: a command that runs the command.

    Returns:
      The finished process; its output has a line "FAULT ended with code N" at
      the end of each.
    """
    return self.run(
      *prefix,
      sys.executable,
      "tests/experiments/faulty_recipe.py",
      "--config=tests/experiments/shrunk_laptop.py",
      f"--workdir={self.folder / name}",
      *flags,
      FAULTS=" ".join(faults),
    )

  def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
    """Runs a command in the root of the repository; returns it finished."""
    return subprocess.run(
      command,
      cwd=self.root,
      env=self.env | env,
      capture_output=True,
      text=True,
      timeout=1800,
    )


@pytest.fixture(scope="module")
def quick_compilation():
  """Half the time to compile, for files where all that runs is tiny."""
  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
  return Recipes(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="session")
def whole(recipes):
  """(folder, process) of a recipe run to its end and then started again."""
  done = recipes.start("whole", "none", "none")
  assert done.returncode == 0, done.stdout + done.stderr
  return recipes.folder / "whole", done
