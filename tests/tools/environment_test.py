"""tools/quickstart and tools/test, with a Python that only notes its calls."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Makes environments that hold itself, and logs everything but probes (-c).
FAKE_PYTHON = """#!/bin/bash
if [ "$1" = --version ]; then echo "Python $FAKE_VERSION"; exit; fi
if [ "$1" = -c ]; then [ "$FAKE_VERSION" != 3.10.2 ]; exit; fi
echo "$*" >>"$LOG"
if [ "$2" = venv ]; then
  rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python
  : >.venv/pyvenv.cfg
fi
if [ "$2" = pip ]; then exit "$FAKE_PIP"; fi
if [ "$2" = experiments.r1 ]; then pwd >>"$LOG"; fi
"""


class Clone:
  """A copy of what the commands need, and a PATH with the fake alone."""

  def __init__(self, folder: pathlib.Path):
    self.root = folder / "a clone"  # paths may hold blanks
    self.bin = folder / "bin"
    self.log = folder / "log"
    self.root.mkdir()
    self.bin.mkdir()
    shutil.copytree(ROOT / "tools", self.root / "tools")
    for name in ("setup.cfg", "pyproject.toml"):
      shutil.copy(ROOT / name, self.root)
    needed = "bash basename cat chmod cksum cp dirname env mkdir rm"
    for command in needed.split():
      (self.bin / command).symlink_to(shutil.which(command))
    (self.bin / "python3").write_text(FAKE_PYTHON)
    (self.bin / "python3").chmod(0o755)

  def __call__(self, command: str, *arguments: str, pip=0, version="3.11.9"):
    """Exit status, output, and the calls of Python, one a line."""
    self.log.write_text("")
    done = subprocess.run(
      [self.root / command, *arguments],
      cwd="/",
      env={
        "PATH": str(self.bin),
        "LOG": str(self.log),
        "FAKE_PIP": str(pip),
        "FAKE_VERSION": version,
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=60,
    )
    return done.returncode, done.stdout, self.log.read_text().splitlines()


@pytest.fixture
def clone(tmp_path):
  if os.name != "posix":
    pytest.skip("the commands are shell scripts")
  return Clone(tmp_path)


BASE = "-m pip install --no-compile --editable ."
TEST = "-m pip install --no-compile --editable .[test]"
VENV = "-m venv --clear .venv"
TESTS = "-m pytest -n auto --maxprocesses 8 --dist loadfile"
R1 = "-m experiments.r1 --config=configs/r1/laptop.py --workdir=runs/quickstart"


def test_quickstart_installs_once_and_passes_flags_on(clone):
  status, output, calls = clone("tools/quickstart", "--config.seed=3")
  assert status == 0, output
  assert calls == [VENV, BASE, f"{R1} --config.seed=3", str(clone.root)]
  _, output, calls = clone("tools/quickstart")
  assert calls == [R1, str(clone.root)]
  assert output == ""


def test_tests_need_their_extra_and_take_pytest_arguments(clone):
  clone("tools/quickstart")
  _, _, calls = clone("tools/test", "-k", "a b", "--full")
  assert calls == [TEST, f"{TESTS} -k a b -m not gpu and not tpu"]
  assert clone("tools/test")[2] == [TESTS]
  assert clone("tools/quickstart")[2][0] == R1  # the base list still stands


def test_other_requirements_install_again(clone):
  clone("tools/test")
  with (clone.root / "setup.cfg").open("a") as file:
    file.write("# one more\n")
  assert clone("tools/test")[2] == [TEST, TESTS]


def test_a_moved_clone_installs_again(clone, tmp_path):
  clone("tools/test")
  clone.root = clone.root.rename(tmp_path / "elsewhere")
  assert clone("tools/test")[2] == [TEST, TESTS]


def test_a_failed_install_begins_from_nothing(clone):
  status, _, calls = clone("tools/test", pip=1)
  assert status != 0
  assert calls == [VENV, TEST]  # and no pytest
  assert clone("tools/test")[2] == [VENV, TEST, TESTS]


def test_an_environment_of_someone_else_is_not_cleared(clone):
  (clone.root / ".venv").mkdir()
  (clone.root / ".venv" / "pyvenv.cfg").write_text("")
  status, output, calls = clone("tools/test")
  assert status == 1
  assert ".venv was not made by this script" in output
  assert not calls


def test_an_old_python_is_named(clone):
  status, output, calls = clone("tools/quickstart", version="3.10.2")
  assert status == 1
  assert "needs Python 3.11 or newer" in output
  assert "python3 is Python 3.10.2" in output
  assert not calls


def test_no_python_is_said(clone):
  (clone.bin / "python3").unlink()
  status, output, _ = clone("tools/quickstart")
  assert status == 1
  assert "there is no python3" in output
