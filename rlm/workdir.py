"""A run is a folder, and the same command continues it.

workdir/
  config.json     the config it runs, resolved: another one is refused
  run.json        versions, commit, devices, threads, and every start
  metrics.jsonl   deterministic values only, timing.jsonl beside it
  checkpoints/    Orbax (rlm/checkpoint/manager.py)
  summary.json    written last: its presence means finished
"""

import datetime
import errno
import fcntl
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import time
import uuid
import warnings
from typing import Any

from rlm import files, processes
from rlm.config import plain

_PACKAGES = (
  "rlm",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "tensorstore",
  "grain",
  "numpy",
)
# What must be the same for a resumed run to repeat to the bit.
_BIT_EXACT = ("versions", "platform", "device_kind", "devices", "threads")
_SHARED_WITHIN_SECS = 30  # in which a network's file system shows a new file
_CONTENTS = ("checkpoints", "metrics.jsonl", "run.json", "summary.json")


class Workdir:
  """An opened run folder; this process owns it until it ends.

  Attributes:
    path: the folder.
    config: the config as plain data.
    identity: the config without the keys that may change; what a checkpoint of
      this run is checked against.
    resumed: whether an earlier process worked here.
    summary: what `finish` wrote earlier, or None: the run is not finished.
  """

  def __init__(
    self,
    path: pathlib.Path,
    config: dict[str, Any],
    identity: dict[str, Any],
    *,
    resumed: bool,
    summary: dict[str, Any] | None,
    lock: int | None,
  ):
    self.path = path
    self.config = config
    self.identity = identity
    self.resumed = resumed
    self.summary = summary
    self._lock = lock

  def record_input(self, name: str, value: Any) -> None:
    """Records what the run reads, such as the hashes of its data files.

    Args:
      name: what it is.
      value: JSON data that identifies it.

    Raises:
      ValueError: the run began with another input of this name.
    """
    if not processes.is_primary():
      return
    run = files.read_json(self.path / "run.json")
    value = files.to_json(value)
    before = run["inputs"].setdefault(name, value)
    if before != value:
      raise ValueError(
        f"{self.path} began with another input {name!r}:\n"
        f"{differences({name: before}, {name: value})}\n"
        "Bring the recorded data back, or choose another --workdir."
      )
    files.write_json(self.path / "run.json", run)

  def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
    """Writes summary.json, which makes the run a finished one.

    Args:
      summary: the results, JSON data.

    Returns:
      The summary as a later start reads it.
    """
    summary = files.to_json(summary)
    if processes.is_primary():
      files.write_json(self.path / "summary.json", summary)
    self.summary = summary
    return summary

  def say_finished(self, console: Any = None) -> None:
    """Tells that there is nothing left to do.

    Args:
      console: a rich console; None prints.
    """
    if not processes.is_primary():
      return
    text = (
      f"{self.path} is finished: its results are in summary.json. To run it"
      " again, choose another --workdir or remove this one."
    )
    if console is None:
      print(text)
    else:
      console.print(text, soft_wrap=True, markup=False, highlight=False)

  def close(self) -> None:
    """Lets another process open the folder."""
    if self._lock is not None:
      os.close(self._lock)
      self._lock = None


def open_workdir(
  path: files.Path, config: Any, *, may_change: tuple[str, ...] = ()
) -> Workdir:
  """Creates a run's folder, or opens it to continue the run.

  Call it once the config is checked and, on several processes, after they
  joined, on each; only process 0 writes.

  Args:
    path: the folder.
    config: ConfigDict or dict of the run.
    may_change: dotted keys, sections included, that may differ from those the
      run began with, because they change no result.

  Returns:
    The opened folder.

  Raises:
    ValueError: the folder holds another config's run, no run's files, is being
      used by another process, or is not the same on all processes.
    DiskFullError: no space left.

  Warns:
    UserWarning: versions, devices or threads changed, so the run continues but
      will not repeat to the bit.
  """
  path = pathlib.Path(path)
  config = _storable(plain(config))
  identity = _without(config, may_change)
  if path.exists() and not path.is_dir():
    raise ValueError(f"--workdir={path} is a file; a run needs a folder.")
  if not processes.joined():
    return _open(path, config, identity, may_change)
  opened = (
    _open(path, config, identity, may_change)
    if (processes.is_primary())
    else Workdir(path, config, identity, resumed=False, summary=None, lock=None)
  )
  _check_shared(path)
  opened.resumed, opened.summary = processes.on_primary(
    lambda: (opened.resumed, opened.summary)
  )
  return opened


def _open(
  path: pathlib.Path,
  config: dict[str, Any],
  identity: dict[str, Any],
  may_change: tuple[str, ...],
) -> Workdir:
  """`open_workdir` for the process that writes."""
  with files.clear_disk_errors(path):
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
  try:
    resumed = (path / "config.json").exists()
    if resumed:
      _check_config(path, config, may_change)
    else:
      found = [name for name in _CONTENTS if (path / name).exists()]
      if found:
        raise ValueError(
          f"{path} holds {', '.join(found)} but no config.json, so nothing"
          " tells which run they are of. Choose another --workdir."
        )
    summary_path = path / "summary.json"
    summary = files.read_json(summary_path) if summary_path.exists() else None
    if summary is None:
      # First: whatever else is found here belongs to this config.
      files.write_json(path / "config.json", config)
      _record_start(path)
  except BaseException:
    os.close(lock)
    raise
  return Workdir(
    path, config, identity, resumed=resumed, summary=summary, lock=lock
  )


def _check_shared(path: pathlib.Path) -> None:
  """Raises ValueError where another process sees another folder."""
  mark = path / ".shared"

  def write():
    text = uuid.uuid4().hex
    files.write_bytes(mark, text.encode())
    return text

  text = processes.on_primary(write)
  deadline = time.monotonic() + _SHARED_WITHIN_SECS
  while not (mark.exists() and mark.read_text() == text):
    if time.monotonic() > deadline:
      raise ValueError(
        f"--workdir={path} is another folder here than on process 0. Name one"
        " on a file system that all processes share."
      )
    time.sleep(0.1)


def differences(old: Any, new: Any, limit: int = 20) -> str:
  """Lists the fields in which two nested dicts differ.

  Args:
    old: plain data.
    new: plain data.
    limit: how many fields to name.

  Returns:
    Lines such as "  model.hidden_size: 64 -> 128"; empty where they are equal.
  """
  a, b = _flat(files.to_json(old)), _flat(files.to_json(new))
  absent = object()

  def show(value):
    text = "(absent)" if value is absent else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

  lines = [
    f"  {key}: {show(a.get(key, absent))} -> {show(b.get(key, absent))}"
    for key in [*a, *(key for key in b if key not in a)]
    if a.get(key, absent) != b.get(key, absent)
  ]
  more = len(lines) - limit
  return "\n".join(lines[:limit] + [f"  ... and {more} more"] * (more > 0))


def environment() -> dict[str, Any]:
  """What a result depends on beside the config; imports jax.

  Returns:
    JSON data: versions, commit, platform, device_kind, devices, processes,
    threads, host_cpus, xla_flags and command.
  """
  import jax

  devices = jax.devices()
  cpus = (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count()
  )
  return {
    "versions": {
      "python": platform.python_version(),
      **{name: _version(name) for name in _PACKAGES},
    },
    "commit": _commit(),
    "platform": devices[0].platform,
    "device_kind": devices[0].device_kind,
    "devices": len(devices),
    "processes": jax.process_count(),
    # XLA's thread pool on the CPU: NPROC if set, else the CPUs it may use.
    "threads": int(os.environ.get("NPROC") or cpus or 1),
    "host_cpus": os.cpu_count(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "command": [sys.executable, *sys.argv],
  }


def _check_config(
  path: pathlib.Path, config: dict, may_change: tuple[str, ...]
) -> None:
  before = files.read_json(path / "config.json")
  changed = differences(
    _without(before, may_change), _without(config, may_change)
  )
  if changed:
    raise ValueError(
      f"{path} holds a run of another config; recorded -> given:\n{changed}\n"
      "Choose another --workdir for this config, or give the recorded values"
      " to continue that run."
    )


def _record_start(path: pathlib.Path) -> None:
  """Adds this process to run.json; warns of what broke bit-exactness."""
  now = environment()
  run_path = path / "run.json"
  before = files.read_json(run_path) if run_path.exists() else None
  start = {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": now["commit"],
    "command": now["command"],
  }
  starts, inputs = [start], {}
  if before is not None:
    changed = differences(
      {key: before[key] for key in _BIT_EXACT},
      {key: now[key] for key in _BIT_EXACT},
    )
    if changed:
      start["changed"] = changed
      warnings.warn(
        f"{path} continues on other versions, devices or threads, so it will"
        f" not repeat the interrupted run to the bit:\n{changed}",
        stacklevel=3,
      )
    starts, inputs = [*before["starts"], start], before["inputs"]
  files.write_json(run_path, {**now, "inputs": inputs, "starts": starts})


def _lock(path: pathlib.Path) -> int:
  """Takes the folder for this process; the system releases it at its death."""
  lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    owner = os.read(lock, 20).decode() or "(unknown)"
    os.close(lock)
    if error.errno not in (errno.EACCES, errno.EAGAIN):
      raise
    raise ValueError(
      f"{path} is being used by process {owner}. Wait for it to end, or choose"
      " another --workdir."
    ) from error
  os.ftruncate(lock, 0)
  os.pwrite(lock, str(os.getpid()).encode(), 0)
  return lock


def _storable(value: Any) -> Any:
  """Config data as JSON, where infinity must not become null."""
  if isinstance(value, dict):
    return {str(key): _storable(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_storable(item) for item in value]
  if isinstance(value, float) and value in (float("inf"), float("-inf")):
    return str(value)
  return files.to_json(value)


def _without(config: dict, keys: tuple[str, ...], prefix: str = "") -> dict:
  """`config` less the dotted `keys`."""
  return {
    name: _without(value, keys, f"{prefix}{name}.")
    if isinstance(value, dict)
    else value
    for name, value in config.items()
    if f"{prefix}{name}" not in keys
  }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
  """Nested dicts as one, with dotted keys."""
  if not isinstance(value, dict) or (prefix and not value):
    return {prefix: value}
  return {
    key: leaf
    for name, item in value.items()
    for key, leaf in _flat(item, f"{prefix}.{name}" if prefix else name).items()
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """The commit of this code, "-dirty" where it differs, None outside git."""
  here = pathlib.Path(__file__).resolve()

  def git(*args):
    return subprocess.run(
      ["git", "-C", str(here.parent), *args],
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    ).stdout.strip()

  try:
    git("ls-files", "--error-unmatch", here.name)  # not some other repository
    return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
  except (OSError, subprocess.SubprocessError):
    return None
