"""Who may import whom: what lets any folder of rlm lift out on its own."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# From the bottom up. A folder or file imports itself and the rows below it.
# Rows that the design draws as one are split where one member uses another.
LAYERS = (
  {"processes"},
  {"config", "files", "hardware", "stopping"},
  {"events", "jsonl"},
  {"kernels"},
  {"parallel"},
  {"models"},
  {"data", "flops", "losses", "metrics", "optim", "progress", "workdir"},
  {"checkpoint", "cost", "train"},
  {"rewards.answers"},  # text only; tasks with written answers compare by it
  {"tasks"},
  {"rewards", "sampling"},
  {"eval", "report", "rl"},
)
RANK = {unit: rank for rank, row in enumerate(LAYERS) for unit in row}

# What must start within a second, or run where jax is not wanted.
WITHOUT_JAX = (
  "rlm/__init__.py",
  "rlm/checkpoint/config.py",
  "rlm/checkpoint/fp8.py",
  "rlm/checkpoint/tensor_files.py",
  "rlm/checkpoint/tensor_writer.py",
  "rlm/config.py",
  "rlm/data/chat_template.py",
  "rlm/data/documents.py",
  "rlm/data/model_tokenizer.py",
  "rlm/data/packing.py",
  "rlm/data/template_sandbox.py",
  "rlm/data/thinking.py",
  "rlm/data/tokenizer.py",
  "rlm/files.py",
  "rlm/hardware.py",
  "rlm/jsonl.py",
  "rlm/parallel/config.py",
  "rlm/parallel/placement.py",
  "rlm/processes.py",
  "rlm/stopping.py",
  "rlm/eval/pass_at_k.py",
  "rlm/progress.py",
  "rlm/report",
  "rlm/rewards",
  "rlm/tasks",
  "rlm/workdir.py",
  "configs",
  "experiments",
)

FLAG_READERS = ("absl.app", "absl.flags", "argparse", "ml_collections.config_")
SKIPPED_FOLDERS = {"build", "dist", "node_modules", "runs"}
MAX_LINES = 500


def python_files(*folders: str) -> list[pathlib.Path]:
  """Every Python file of the folders, relative to the repository."""
  files = []
  for folder in folders:
    path = ROOT / folder
    files += [path] if path.is_file() else sorted(path.rglob("*.py"))
  return [file.relative_to(ROOT) for file in files]


def module_of(file: pathlib.Path) -> str:
  parts = file.with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: pathlib.Path) -> list[tuple[int, str]]:
  """(line, dotted name) of each import, those inside functions included."""
  names = []
  for node in ast.walk(ast.parse((ROOT / file).read_text())):
    if isinstance(node, ast.Import):
      names += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{file}:{node.lineno}: relative import"
      names += [
        (node.lineno, f"{node.module}.{alias.name}") for alias in node.names
      ]
  return names


def rlm_unit(dotted: str) -> str | None:
  """The row's entry that `dotted` belongs to; None outside rlm."""
  parts = dotted.split(".")
  if parts[0] != "rlm" or len(parts) < 2:
    return None
  narrow = ".".join(parts[1:3])
  return narrow if narrow in RANK else parts[1]


def layer_errors(file: pathlib.Path, imports: list[tuple[int, str]]):
  own = rlm_unit(module_of(file))
  for line, name in imports:
    unit = rlm_unit(name)
    if own is None or unit is None or unit == own or unit.startswith("__"):
      continue
    for one in (own, unit):
      if one not in RANK:
        yield f"{file}:{line}: rlm.{one} has no row in LAYERS"
        return
    if RANK[unit] >= RANK[own]:
      yield f"{file}:{line}: imports {name}, which is not below rlm.{own}"


def test_imports_point_down():
  errors = []
  for file in python_files("rlm"):
    errors += layer_errors(file, imports_of(file))
  assert not errors, "\n".join(errors)


def test_the_layer_rule_sees_an_upward_import():
  file = pathlib.Path("rlm/models/mla.py")
  assert not list(layer_errors(file, [(1, "rlm.kernels.grouped_matmul.f")]))
  assert not list(layer_errors(file, [(1, "rlm.models.rope"), (2, "jax")]))
  assert list(layer_errors(file, [(3, "rlm.rl.advantages")]))
  assert list(layer_errors(pathlib.Path("rlm/losses.py"), [(1, "rlm.optim")]))
  assert list(layer_errors(pathlib.Path("rlm/new.py"), [(1, "rlm.config")]))


def test_rlm_knows_neither_experiments_nor_flags():
  errors = [
    f"{file}:{line}: imports {name}"
    for file in python_files("rlm")
    for line, name in imports_of(file)
    if name.startswith(("experiments", "configs", "tests", "tools"))
    or name.startswith(FLAG_READERS)
  ]
  assert not errors, "\n".join(errors)


def test_configs_import_only_ml_collections():
  errors = [
    f"{file}:{line}: imports {name}"
    for file in python_files("configs")
    for line, name in imports_of(file)
    if name.split(".")[0] != "ml_collections"
  ]
  assert not errors, "\n".join(errors)


def run_python(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_modules_promised_without_jax_do_not_import_it():
  modules = [module_of(file) for file in python_files(*WITHOUT_JAX)]
  done = run_python(
    "-c",
    "import importlib, sys\n"
    "for name in sys.argv[1:]:\n"
    "  importlib.import_module(name)\n"
    "  if 'jax' in sys.modules: sys.exit(f'importing {name} imports jax')",
    *modules,
  )
  assert done.returncode == 0, done.stderr


def experiment_names() -> list[str]:
  """Modules of experiments/ that are commands."""
  main = '\nif __name__ == "__main__":'
  files = python_files("experiments")
  return [f.stem for f in files if main in (ROOT / f).read_text()]


@pytest.mark.parametrize("experiment", experiment_names())
def test_help_imports_no_jax(experiment):
  done = run_python("-X", "importtime", "-m", f"experiments.{experiment}", "-h")
  lines = done.stderr.splitlines()
  imported = {line.rsplit("|")[-1].strip() for line in lines}
  assert "--workdir" in done.stdout, done.stderr[-2000:]
  assert "ml_collections" in imported  # importtime did list the imports
  assert not imported & {"jax", "flax", "optax", "grain"}


def source_files() -> list[pathlib.Path]:
  """Every text file of the repository, whether or not git knows it yet."""
  suffixes = {".py", ".md", ".cfg", ".toml", ".yml", ".yaml", ".ipynb", ".sh"}
  files = []
  for folder, folders, names in os.walk(ROOT):
    folders[:] = [
      name
      for name in folders
      if name not in SKIPPED_FOLDERS
      and (not name.startswith(".") or name in (".ci", ".github"))
    ]
    commands = pathlib.Path(folder).name in ("tools", ".ci")
    files += [
      pathlib.Path(folder, name)
      for name in names
      if pathlib.Path(name).suffix in suffixes or (commands and "." not in name)
    ]
  return files


def test_files_hold_no_paths_of_one_machine():
  homes = ["/" + name + "/" for name in ("work", "root", "farm", "Users")]
  errors = [
    f"{path.relative_to(ROOT)}: {home}"
    for path in source_files()
    for home in homes
    if home in path.read_text().replace("http://", "").replace("https://", "")
  ]
  assert not errors, "\n".join(errors)


def test_files_hold_one_idea():
  long = {
    str(path.relative_to(ROOT)): lines
    for path in source_files()
    if path.suffix == ".py"
    and (lines := path.read_text().count("\n")) >= MAX_LINES
  }
  assert not long, f"split these files: {long}"
