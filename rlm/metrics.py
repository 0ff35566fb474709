"""Metrics of a run: written one step late, checked before every save.

  with MetricsWriter(workdir, next_step=start, on_nonfinite="stop") as log:
    for step in range(start, steps):
      state, metrics = step_fn(state, batch, jax.random.fold_in(key, step))
      log.push(step, metrics, tokens=tokens_per_step, batch=batch)
      bar.update(step + 1, **log.figures("loss"))
      if is_due(step, checkpoint_every_steps) or stop.after(step):
        with log.paused():
          log.flush()  # on the disk and finite: a bad step is never saved
          manager.save(step + 1, state, {"data": batches.get_state()})

`push` starts the copy of this step's arrays to the host and writes the previous
step's, so the device never waits for the log.  metrics.jsonl holds values that
a repeated run repeats to the bit; whatever a clock says goes to timing.jsonl.
"""

import contextlib
import io
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlm import files, jsonl, processes
from rlm.events import EventsWriter


class NonFiniteError(FloatingPointError):
  """A metric was nan or infinite; nothing was saved after it.

  Attributes:
    step: the step, counted from 0.
    metric: its name.
  """

  def __init__(self, step: int, metric: str, message: str):
    self.step = step
    self.metric = metric
    super().__init__(message)


def is_due(step: int, every: int) -> bool:
  """Whether something done every `every` steps is due after this step.

  Args:
    step: the step just done, counted from 0.
    every: period in steps; 0 means never.

  Returns:
    True after steps every - 1, 2 * every - 1, ...
  """
  return every > 0 and (step + 1) % every == 0


class MetricsWriter:
  """Writes metrics.jsonl, timing.jsonl and TensorBoard events of one run.

  A value is a jax or numpy array (a scalar becomes a number, [L] a list, [L, E]
  nested lists), a Python number, or None: not measured at this step.  Several
  `push`es of one step make one record.  On several processes all convert and
  check, process 0 writes: values are the same on all.
  """

  def __init__(self, folder: files.Path, *, next_step: int, on_nonfinite: str):
    """Opens the files, dropping records of `next_step` and later.

    Args:
      folder: the run's folder.
      next_step: the first step that will be pushed, i.e. the restored one.
      on_nonfinite: "stop": a step that was not finite raises; "skip": one whose
        update the step function masked, saying so by metrics["nonfinite"] > 0,
        is recorded and the run goes on.

    Raises:
      ValueError: another `on_nonfinite`.
      DiskFullError: no space left.
    """
    if on_nonfinite not in ("stop", "skip"):
      raise ValueError(
        f"on_nonfinite must be 'stop' or 'skip', got {on_nonfinite!r}."
      )
    self.folder = pathlib.Path(folder)
    self._on_nonfinite = on_nonfinite
    self._next_step = next_step
    self._pending: _Record | None = None
    self._latest: dict[str, Any] = {}
    self._primary = processes.is_primary()
    self._seconds_before = 0.0
    if self._primary:
      timing_path = self.folder / "timing.jsonl"
      self._metrics = jsonl.JsonlWriter(
        self.folder / "metrics.jsonl", next_step=next_step
      )
      self._timing = jsonl.JsonlWriter(timing_path, next_step=next_step)
      self._seconds_before = sum(
        record["seconds"] + record.get("paused_seconds", 0.0)
        for record in jsonl.read_jsonl(timing_path)
      )
      self._events = EventsWriter(
        self.folder / "tensorboard", next_step=next_step
      )
    self._opened = self._last_push = time.monotonic()
    self._paused = 0.0

  def push(
    self,
    step: int,
    metrics: dict[str, Any],
    *,
    tokens: Any = None,
    ledger: Callable[[float, float], dict[str, float]] | None = None,
    timing: dict[str, float] | None = None,
    batch: Any = None,
  ) -> None:
    """Takes the metrics of a step and writes those of the step before.

    Args:
      step: the step they belong to, counted from 0.
      metrics: name -> value, on the device or not; never donated later.
      tokens: tokens of the step, on the device or not, for tokens per second.
      ledger: (tokens, seconds) -> what they cost, such as
        `rlm.cost.RunLedger.record`; needs `tokens`.
      timing: further figures for timing.jsonl; names end in their unit.
      batch: the step's batch, a pytree of arrays, kept until the step is known
        to be finite and saved if it is not.

    Raises:
      NonFiniteError: the step before was not finite.
      ValueError: the step goes back, or names a metric twice.
      DiskFullError: no space left.
    """
    for value in metrics.values():
      if isinstance(value, jax.Array):
        value.copy_to_host_async()
    if self._pending is None or step != self._pending.step:
      last = (
        self._next_step - 1 if self._pending is None else self._pending.step
      )
      if step <= last:
        raise ValueError(f"metrics of step {step} came after step {last}.")
      now = time.monotonic()
      timing_record = {"seconds": now - self._last_push - self._paused}
      if self._paused:
        timing_record["paused_seconds"] = self._paused
      self._last_push, self._paused = now, 0.0
      previous, self._pending = self._pending, _Record(step, timing_record)
      if previous is not None:
        self._write(previous)
    twice = self._pending.metrics.keys() & metrics.keys()
    if twice or "step" in metrics:
      raise ValueError(
        f"step {step}: metric {min(twice or {'step'})!r} was pushed twice."
      )
    self._pending.metrics.update(metrics)
    self._pending.timing.update(timing or {})
    if tokens is not None:
      self._pending.tokens, self._pending.ledger = tokens, ledger
    if batch is not None:
      self._pending.batch = batch

  def figures(self, *names: str) -> dict[str, float]:
    """The newest host-side values of some scalars, one step late.

    Args:
      *names: metrics.

    Returns:
      Those of them that the last written record holds.
    """
    return {
      name: self._latest[name]
      for name in names
      if isinstance(self._latest.get(name), (int, float))
    }

  @property
  def record(self) -> dict[str, Any]:
    """Values of the last written record; after `flush`, of the last step."""
    return self._latest

  def flush(self) -> None:
    """Writes everything pushed, and returns when it is on the disk.

    Raises:
      NonFiniteError: the last step was not finite.
      DiskFullError: no space left.
    """
    if self._pending is not None:
      record, self._pending = self._pending, None
      self._next_step = record.step + 1
      self._write(record)
    if self._primary:
      self._metrics.flush()
      self._timing.flush()
      self._events.flush()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Keeps the block (evaluation, a save) out of the steps' seconds."""
    began = time.monotonic()
    try:
      yield
    finally:
      self._paused += time.monotonic() - began

  @property
  def total_seconds(self) -> float:
    """Seconds of the run up to now, those of earlier processes included.

    Time that a kill made worthless (steps done again) is not counted.
    """
    return self._seconds_before + time.monotonic() - self._opened

  def close(self) -> None:
    """Closes the files; what was not flushed may be lost."""
    if self._primary:
      self._metrics.close()
      self._timing.close()
      self._events.close()

  def __enter__(self):
    return self

  def __exit__(self, exc_type, exc, traceback):
    try:
      if exc_type is None:
        self.flush()
    finally:
      self.close()

  def _write(self, record: "_Record") -> None:
    """Converts, checks and writes the record of a step that was pushed."""
    values = _to_host(record.metrics)
    self._check(record, values)
    self._latest = files.to_json(values)
    if not self._primary:
      return
    record.count_tokens()
    names = sorted(self._latest)
    self._metrics.write(
      {"step": record.step, **{name: self._latest[name] for name in names}}
    )
    self._timing.write({"step": record.step, **record.timing})
    timing = {f"timing/{name}": x for name, x in record.timing.items()}
    self._events.add(record.step, _scalars(self._latest | timing))

  def _check(self, record: "_Record", values: dict[str, Any]) -> None:
    """Raises NonFiniteError unless the record is finite or may be skipped."""
    masked = bool(np.any(values.get("nonfinite", 0)))
    bad = [
      name
      for name, value in sorted(values.items())
      if value is not None and not np.all(np.isfinite(value))
    ]
    if not (bad or masked) or (masked and self._on_nonfinite == "skip"):
      return
    metric = bad[0] if bad else "nonfinite"
    path = self.folder / f"nonfinite_step_{record.step:06d}.npz"
    if record.batch is not None:
      batch = _whole(record.batch)  # by all, since each has a part
      if self._primary:
        _save_batch(path, batch)
    self._pending = None  # the step after a bad one is never written
    raise NonFiniteError(
      record.step,
      metric,
      f"step {record.step}: {metric} = {values[metric]}."
      + (
        " The update was masked: the weights are those before it."
        " on_nonfinite='skip' would go on."
        if masked
        else " The step did not mask it (its metric `nonfinite` is not set)."
      )
      + (f" The batch is in {path}." if record.batch is not None else "")
      + " Checkpoints are from before. Look at the batch, or start again with a"
      " lower learning rate or a smaller clip_norm.",
    )


class _Record:
  """What was pushed for one step."""

  def __init__(self, step: int, timing: dict[str, float]):
    self.step = step
    self.timing = timing
    self.metrics: dict[str, Any] = {}
    self.tokens: Any = None
    self.ledger: Callable[[float, float], dict[str, float]] | None = None
    self.batch: Any = None

  def count_tokens(self) -> None:
    """Adds to `timing` what follows from tokens and seconds."""
    if self.tokens is None:
      return
    seconds = max(self.timing["seconds"], 1e-9)
    tokens = float(self.tokens)
    self.timing["tokens_per_second"] = tokens / seconds
    if self.ledger is not None:
      self.timing.update(self.ledger(tokens, seconds))


def _to_host(metrics: dict[str, Any]) -> dict[str, Any]:
  """Numpy arrays, bfloat16 and other narrow floats as float32; None stays."""
  arrays = jax.device_get(metrics)  # None is an empty pytree: it stays None
  for name, value in arrays.items():
    if value is None:
      continue
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":  # ml_dtypes: bfloat16, float8
      array = array.astype(np.float32)
    arrays[name] = array
  return arrays


def _whole(batch: Any) -> Any:
  """A batch as numpy arrays, where several processes hold it as well."""

  def gather(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(gather, batch)


def _save_batch(path: pathlib.Path, batch: Any) -> None:
  leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
  arrays: dict[str, Any] = {
    jax.tree_util.keystr(key, simple=True, separator="."): np.asarray(leaf)
    for key, leaf in leaves
  }
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  files.write_bytes(path, buffer.getvalue())


def _scalars(values: dict[str, Any]) -> dict[str, float]:
  """Numbers, and the entries of flat lists; nested lists stay in the JSON."""
  scalars: dict[str, float] = {}
  for name, value in values.items():
    entries = {name: value}
    if isinstance(value, list):
      entries = {f"{name}/{i}": item for i, item in enumerate(value)}
    scalars |= {k: x for k, x in entries.items() if isinstance(x, (int, float))}
  return scalars
