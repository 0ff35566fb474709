"""From the command line to `run(config, workdir)`, with errors said plainly.

Every experiment calls `launch.main(run, __doc__)` where it is the main module,
and imports what needs jax inside `run`, so that --help and every mistake in the
flags are answered within a second.  Exit codes: 0 done, or stopped on request
and saved; 1 the run failed; 2 a mistake in the command or its config; 130 a
second Ctrl-C.

The same command on several hosts makes one run where SLURM, Open MPI, a TPU or
Kubernetes started it; elsewhere three flags join the processes, see
docs/scaling.md.
"""

import ast
import difflib
import math
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from rlm import config as config_lib
from rlm import files, processes, stopping
from rlm.parallel.config import AXES

_HELP = ("-h", "-help", "--help", "--helpshort", "--helpfull")


class _Literal(flags.ArgumentParser):
  """A key that the file sets to None or a list: a Python literal, or text."""

  syntactic_help = "a Python literal, or text"

  def parse(self, argument):
    if not isinstance(argument, str):
      return argument
    try:
      return ast.literal_eval(argument)
    except (SyntaxError, ValueError):
      return argument


for _type in (type(None), list):
  config_flags.register_flag_parser_for_type(_type, _Literal())


class _UsageError(Exception):
  """The command is wrong; str() is the whole message."""


def main(
  run: Callable[[Any, str], Any],
  doc: str | None,
  argv: list[str] | None = None,
  *,
  several_processes: bool = False,
) -> None:
  """Runs an experiment with --config, --config.key=value and --workdir.

  Args:
    run: the experiment, `run(config, workdir)`.
    doc: its module's docstring, the text of --help.
    argv: the command; None is sys.argv.
    several_processes: whether several may share the run.
  """
  if argv is None and not _wants_help(sys.argv):
    use_huge_pages()
  argv = list(sys.argv if argv is None else argv)
  values = flags.FlagValues()
  flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; the same command continues it.",
    flag_values=values,
  )
  _define_processes(values)

  def body(values):
    if not values.workdir:
      raise _UsageError(
        "--workdir is missing: name the folder of this run, such as"
        " --workdir=runs/first."
      )
    plan = _plan_processes(values, several_processes)
    keep_compiled(values.workdir)
    offer_cpu_devices(values.config, plan.processes or 1)
    processes.join(plan)
    run(values.config, values.workdir)

  configured_command(body, doc, values, argv)


def keep_compiled(workdir: str) -> None:
  """Keeps compiled programs in the run's folder; call before jax is imported.

  A resumed run, or a later stage of the same shapes, need not compile again.
  """
  cache = pathlib.Path(workdir).absolute() / "compilation_cache"
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def offer_cpu_devices(config: Any, num_processes: int = 1) -> None:
  """Lets the CPU be at least as many devices as `config` asks for.

  Call before jax is imported.  Nothing happens where XLA's flag says how many.

  Args:
    config: of a run; `mesh` and `sampling_mesh` are looked for in all its
      sections.
    num_processes: that share the meshes.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  there = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
  wanted = [_mesh_size(mesh) // num_processes for mesh in _meshes(config)]
  if there.isdecimal() and max(wanted, default=1) > int(there):
    os.environ["JAX_NUM_CPU_DEVICES"] = str(max(wanted))


def use_huge_pages() -> None:
  """Starts this process anew with glibc told to ask for huge pages.

  XLA's CPU backend allocates its temporaries anew each step, and in pages of
  4 kB the system spends a good part of a small step on handing them out
  (CHANGELOG.md has figures).  glibc reads the setting at its own start alone.
  Nothing happens where RLM_HUGE_PAGES is set (to keep it from happening, or
  because it happened), nor in a notebook's or a debugger's process.
  """
  hosted = sys.gettrace() or {"IPython", "debugpy"} & sys.modules.keys()
  if sys.platform != "linux" or hosted or "RLM_HUGE_PAGES" in os.environ:
    return
  os.environ["RLM_HUGE_PAGES"] = "1"
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  settings = [*filter(None, [tunables]), "glibc.malloc.hugetlb=1"]
  os.environ["GLIBC_TUNABLES"] = ":".join(settings)
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def check_one_process() -> None:
  """Raises ValueError where several processes would do the same work."""
  import jax

  if jax.process_count() > 1:
    raise ValueError(_one_process_only(jax.process_count()))


def _one_process_only(found: int) -> str:
  return (
    f"this run has {found} processes, but this experiment does not divide its"
    " work among several; pretraining, SFT and distillation do. Start one."
  )


def _define_processes(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0, where no cluster tells jax of the processes.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "num_processes", None, "How many share the run.", flag_values=values
  )
  flags.DEFINE_integer(
    "process_id",
    None,
    "Of this process, 0 to num_processes - 1.",
    flag_values=values,
  )


def _plan_processes(
  values: flags.FlagValues, several_processes: bool
) -> processes.Plan:
  """How the run's processes find each other, from the flags or a cluster."""
  try:
    plan = processes.make_plan(
      values.coordinator_address, values.num_processes, values.process_id
    )
  except ValueError as error:
    raise _UsageError(str(error)) from error
  if several_processes:
    return plan
  if plan.processes is not None and plan.processes > 1:
    raise _UsageError(_one_process_only(plan.processes))
  return processes.Plan()  # its own check looks at what jax finds


def configured_command(
  body: Callable[[flags.FlagValues], Any],
  doc: str | None,
  values: flags.FlagValues,
  argv: list[str],
) -> None:
  """As `command`, with --config=FILE and --config.key=value.

  Args:
    body: the command; finds the config in `values.config`.
    doc: the text of --help.
    values: the other flags it defines.
    argv: the command.
  """
  if _wants_help(argv):
    flags.DEFINE_string(
      "config",
      None,
      "Config file; --config.key=value changes one of its keys.",
      flag_values=values,
    )
    command(lambda values: None, doc, values, argv)
    return

  def configured():
    config, rest = _split_config(argv)
    config_flags.DEFINE_config_dict(
      "config", config, "", flag_values=values, sys_argv=rest
    )
    command(body, doc, values, rest)

  _guard(configured, argv)


def command(
  body: Callable[[flags.FlagValues], Any],
  doc: str | None,
  values: flags.FlagValues,
  argv: list[str] | None = None,
) -> None:
  """Parses flags, answers --help, runs `body`, and says errors in one message.

  Args:
    body: the command; ValueErrors are its user's mistakes.
    doc: the text of --help.
    values: the flags it defines; --verbosity is added.
    argv: the command; None is sys.argv.
  """
  argv = list(sys.argv if argv is None else argv)
  flags.DEFINE_enum(
    "verbosity",
    "warning",
    ["debug", "info", "warning"],
    "debug shows where an error was raised.",
    short_name="v",
    flag_values=values,
  )
  if _wants_help(argv):
    print(_help(doc, values))
    return

  def parsed():
    try:
      rest = values(argv)
    except flags.Error as error:
      raise _UsageError(f"{error}\n--help lists the flags.") from error
    if rest[1:]:
      raise _UsageError(
        f"unexpected argument {rest[1]!r}: flags are written --name=value."
      )
    with stopping.catch_signals():
      body(values)

  _guard(parsed, argv)


def _guard(body: Callable[[], Any], argv: list[str]) -> None:
  """Runs `body`; turns what a user can act on into a message and a code."""
  try:
    message, code = _run_to_message(body, argv)
  except BaseException as error:  # which nobody foresaw
    if processes.joined():
      traceback.print_exc()
      reason = "".join(traceback.format_exception_only(error)).strip()
      processes.abandon(reason, 1)
    raise
  if not code:
    processes.part()
    return
  print(message, file=sys.stderr)
  if processes.joined():
    processes.abandon(message, code)
  sys.exit(code)


def _run_to_message(
  body: Callable[[], Any], argv: list[str]
) -> tuple[str, int]:
  """Runs `body`: an error that a user can act on, or "", and the exit code."""
  try:
    body()
  except stopping.Stopped as stopped:
    if not processes.joined() or processes.is_primary():
      print(stopped, flush=True)
  except KeyboardInterrupt:
    return (
      "interrupted at once: the same command continues from the last"
      " checkpoint.",
      130,
    )
  except (_UsageError, ValueError, OSError, FloatingPointError) as error:
    if _wants_traceback(argv):
      raise
    mistake = isinstance(error, (_UsageError, ValueError))
    if not mistake and not isinstance(
      error, (files.DiskFullError, FloatingPointError)
    ):
      raise  # an OSError or such that nobody foresaw
    text = error.strerror if isinstance(error, OSError) else str(error)
    message = f"error: {text}"
    if not isinstance(error, _UsageError):
      message += "\n(--verbosity=debug shows where.)"
    return message, 2 if mistake else 1
  return "", 0


def _wants_help(argv: list[str]) -> bool:
  return any(arg in _HELP for arg in argv[1:])


def _wants_traceback(argv: list[str]) -> bool:
  text = " ".join(argv[1:])
  return re.search(r"(^|\s)--?v(erbosity)?[= ]debug(\s|$)", text) is not None


def _help(doc: str | None, values: flags.FlagValues) -> str:
  lines = [(doc or "").strip(), "", "Flags:"]
  for name in sorted(values):
    flag = values[name]
    if name == flag.name:  # each flag once, not again under its short name
      lines.append(f"  --{name}: {flag.help}")
  return "\n".join(lines)


def _split_config(argv: list[str]) -> tuple[Any, list[str]]:
  """The loaded config, and the command without its --config."""
  path, rest, keys = None, argv[:1], []
  arguments = iter(argv[1:])
  for argument in arguments:
    if match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
      path = next(arguments, None) if match[1] is None else match[1]
      continue
    rest.append(argument)
    if match := re.match(r"--?(?:no)?config\.([^=]+)", argument):
      keys.append(match[1])
  if not path:
    raise _UsageError(
      "--config is missing: name a config file, such as"
      f" --config={_some_config()}."
    )
  name, *text = path.split(":", 1)  # FILE.py:text calls get_config(text)
  if not os.path.isfile(name):
    near = _near_files(name)
    raise _UsageError(
      f"--config={name}: there is no such file."
      + (f" Near it: {', '.join(near)}." if near else "")
    )
  config = _load(name, text)
  known = _dotted(config)
  for key in keys:
    # Entries of lists are written key[0], which only the flag library reads.
    if "[" not in key and key not in known:
      raise _UsageError(
        f"--config.{key}: {name} has no key {key!r}"
        + config_lib.did_you_mean(key, known)
      )
  return config, rest


def _load(path: str, text: list[str]) -> Any:
  """`get_config()` of a config file, executed in a namespace of its own."""
  namespace: dict[str, Any] = {"__name__": "config", "__file__": path}
  source = pathlib.Path(path).read_text()
  exec(compile(source, path, "exec"), namespace)
  return namespace["get_config"](*text)


def _dotted(config: Any, prefix: str = "") -> list[str]:
  """Every key of a config, sections too, as dotted paths."""
  keys = []
  for key, value in config.items():
    keys.append(f"{prefix}{key}")
    if isinstance(value, (ml_collections.ConfigDict, dict)):
      keys += _dotted(value, f"{prefix}{key}.")
  return keys


def _meshes(config: Any) -> Iterator[Any]:
  """The sections of meshes in a config and in its sections."""
  for name, value in config.items():
    if not isinstance(value, (ml_collections.ConfigDict, dict)):
      continue
    if name in ("mesh", "sampling_mesh"):
      yield value
    else:
      yield from _meshes(value)


def _mesh_size(mesh: Any) -> int:
  """Devices of a section that may still be wrong; then `build` says so."""
  sizes = [mesh.get(axis, 1) for axis in AXES]
  return math.prod(n for n in sizes if type(n) is int and n > 0)


def _near_files(name: str) -> list[str]:
  """Config files whose paths resemble `name`."""
  folder = pathlib.Path(name).parent
  there = [str(path) for path in folder.glob("*.py")]
  everywhere = [str(path) for path in pathlib.Path("configs").rglob("*.py")]
  names = [n for n in dict.fromkeys(there + everywhere) if "__init__" not in n]
  near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
  return near or sorted(names)[:3]


def _some_config() -> str:
  files_there = sorted(pathlib.Path("configs").rglob("*.py"))
  found = [str(f) for f in files_there if f.name != "__init__.py"]
  return found[0] if found else "configs/NAME.py"
