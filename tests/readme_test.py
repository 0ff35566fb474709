"""The README says what is true: its examples run, what it names exists."""

import doctest
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def block_with(text: str) -> str:
  blocks = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
  (block,) = [block for block in blocks if text in block]
  return block


def test_examples_print_what_the_readme_shows():
  failures, attempted = doctest.testfile(
    str(ROOT / "README.md"), module_relative=False
  )
  assert attempted > 3
  assert not failures


def test_the_two_commands_come_first():
  lines = README.splitlines()
  assert len(lines) <= 150
  top = "\n".join(lines[:30])
  for command in ("tools/quickstart", "tools/test"):
    assert f"\n{command}" in top
    assert (ROOT / command).stat().st_mode & 0o111, f"{command} cannot be run"


def test_the_tree_exists():
  folder, missing = "", []
  for line in block_with("notebooks/").splitlines():
    name = line.split()[0]
    path = name if not line.startswith("  ") else folder + name
    if not line.startswith("  "):
      folder = name
    if not (ROOT / path).exists():
      missing.append(path)
  assert not missing


def test_the_experiments_exist():
  named = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
  assert named
  missing = [
    name for name in named if not (ROOT / f"experiments/{name}.py").exists()
  ]
  assert not missing


def test_the_configs_exist():
  named = re.findall(r"--config=(\S+)", README)
  assert named
  assert all((ROOT / name).exists() for name in named)
