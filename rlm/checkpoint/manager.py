"""Checkpoints of a run: whole or invisible, and verified when read.

Everything that a bit-exact continuation needs is in one Orbax step folder:

  checkpoints/600/state/         the pytree of arrays, by Orbax's StandardSave,
                                 in chunks that a reader can hold
  checkpoints/600/record/        JSON: the run's config, the loop's `extra`, and
                                 each array's path, shape and dtype
  checkpoints/600/manifest.json  every file's size and CRC-32

It is written aside, while the run goes on, and appears by one rename when all
of it is on the disk, so a kill or a power cut leaves the whole checkpoint or
nothing.  Of several processes each writes and reads what its devices hold; the
record, the manifest and the rename are process 0's.  Any mesh and any number
of processes reads what any other wrote.

The loop that loses nothing; `Config` and the rest are the experiment's:

  def run(c, workdir, *, console=None):
    cfg = build(Config, c)
    folder = open_workdir(workdir, c)
    if folder.summary is not None:
      folder.say_finished(console)
      return folder.summary
    ...  # mesh, data, model
    state, start = init_state(init_key), 0
    with (
      CheckpointManager(
        folder.path / "checkpoints", keep=2, config=folder.identity
      ) as manager,
      catch_signals() as stop,
    ):
      if (saved := manager.restore(state)) is not None:
        start, state, extra = saved
        batches.set_state(extra["batches"])
      with (
        MetricsWriter(
          folder.path, next_step=start, on_nonfinite=cfg.on_nonfinite
        ) as log,
        Progress(console, "pretrain", cfg.steps, done=start) as bar,
      ):
        for step in range(start, cfg.steps):
          batch = next(batches)
          step_key = jax.random.fold_in(key, step)
          state, metrics = step_fn(state, batch, step_key)
          log.push(step, metrics, batch=batch)
          bar.update(step + 1, **log.figures("loss"))
          last, stopping = step + 1 == cfg.steps, stop.after(step)
          if is_due(step, cfg.save_every_steps) or last or stopping:
            with log.paused():
              log.flush()
              manager.save(
                step + 1,
                state,
                {"batches": batches.get_state()},
                metrics=log.record,
              )
          if stopping and not last:
            raise Stopped("pretrain", step + 1)
        seconds = log.total_seconds
    return folder.finish({"steps": cfg.steps, "seconds": seconds})

A checkpoint's step counts the steps done, so it is the next one to do, and
equal to `state.step`.  A kill costs the steps since the last save: they are
done again, and their records are dropped first.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlm import files, processes
from rlm.checkpoint import leaves, manifest
from rlm.checkpoint.config import KeepBest
from rlm.checkpoint.stored_arrays import (
  StoredArrays,
  chunked,
  open_array,
  read_array,
)
from rlm.workdir import differences

_ASIDE = ".aside-"  # prefix of folders that are no checkpoint (any more)
_WRITTEN_WITHIN_SECS = 3600  # a slower save is an error
_SLACK_BYTES = 16_000_000  # metrics, traces and the JSON beside the arrays


class CheckpointManager:
  """Saves and restores the state of one run; see the module's loop.

  A save returns when the state is copied to the host, and another thread writes
  it; the next save, and the end of the `with` block, wait for that and raise
  what went wrong there.  On several processes all call every method.
  """

  def __init__(
    self,
    folder: files.Path,
    *,
    keep: int,
    keep_best: KeepBest | None = None,
    config: dict | None = None,
  ):
    """Opens the folder, creating it and clearing what a kill left half done.

    Args:
      folder: the checkpoints' folder.
      keep: how many of the newest to keep; two let a torn one fall back.
      keep_best: which one to keep beside them; None for none.
      config: the run's config, as `Workdir.identity`; stored, and compared
        at `restore`.

    Raises:
      ValueError: `keep` is less than 1.
      DiskFullError: no space left.
    """
    if keep < 1:
      raise ValueError(f"keep={keep}: at least one checkpoint must be kept.")
    self.folder = pathlib.Path(folder).absolute()
    self._keep, self._keep_best = keep, keep_best
    self._config = files.to_json(config)
    self._orbax = _open_orbax(ocp.StandardCheckpointHandler())
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._commit: concurrent.futures.Future | None = None
    self._scores: dict[int, float] = {}
    if processes.is_primary():
      with files.clear_disk_errors(self.folder):
        self.folder.mkdir(parents=True, exist_ok=True)
      for leftover in self.folder.glob(f"{_ASIDE}*"):
        shutil.rmtree(leftover)
      for step in manifest.saved_steps(self.folder):
        self._remember(step, _read_scores(self.folder / str(step)))

  def save(
    self,
    step: int,
    state: Any,
    extra: dict[str, Any] | None = None,
    *,
    metrics: dict[str, Any] | None = None,
  ) -> None:
    """Copies the state and returns; `wait` says when it is on the disk.

    When it is, the oldest are dropped.

    Args:
      step: steps done; each is saved once.
      state: a pytree of jax arrays, scalars and typed keys included, or numpy
        arrays, which may lie in files and must not change before `wait`.
      extra: JSON data beside it, such as the data iterator's state.
      metrics: of the last of these steps; `keep_best` looks for its own.

    Raises:
      ValueError: a leaf is no array, or the step was saved before.
      DiskFullError: no space left, perhaps for the checkpoint before this one;
        the older ones are untouched.
    """
    self.wait()
    if step in manifest.saved_steps(self.folder):
      raise ValueError(f"step {step} is already saved in {self.folder}.")
    for path, leaf in leaves.flatten(state):
      if not isinstance(leaf, (jax.Array, np.ndarray)):
        raise ValueError(
          f"state leaf {path} is {type(leaf).__name__}, not an array. Make"
          " it one (jnp.asarray), or put plain data into `extra`."
        )
    best = self._keep_best
    value = (metrics or {}).get(best.metric) if best else None
    scores = {} if best is None or value is None else {best.metric: value}
    record = {
      "extra": files.to_json(extra or {}),
      "config": self._config,
      "scores": files.to_json(scores),
      "arrays": {
        path: leaves.describe(leaf) for path, leaf in leaves.flatten(state)
      },
    }
    stored = jax.tree.map(leaves.stored, state)
    aside = self.folder / f"{_ASIDE}new"
    with files.clear_disk_errors(self.folder / str(step)):
      self._orbax.save(
        aside,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(stored, jax.tree.map(chunked, stored)),
          record=ocp.args.JsonSave(record),
        ),
        force=True,  # over what a failed save left
      )
    self._commit = self._thread.submit(
      self._make_visible, step, aside, record["scores"]
    )

  def wait(self) -> None:
    """Returns when the last saved checkpoint is on the disk.

    Raises:
      DiskFullError: no space left for it; the older ones are untouched.
    """
    commit, self._commit = self._commit, None
    if commit is not None:
      commit.result()

  def _make_visible(
    self, step: int, aside: pathlib.Path, scores: dict[str, float]
  ) -> None:
    """Waits until all processes have written, then gives it its name."""
    final = self.folder / str(step)
    with files.clear_disk_errors(final):
      self._orbax.wait_until_finished()
      if processes.is_primary():
        manifest.write_manifest(aside)
        os.rename(aside, final)
        files.sync_folder(self.folder)
        self._remember(step, scores)
        self._drop_oldest()

  def _remember(self, step: int, scores: dict[str, float]) -> None:
    """Notes what `keep_best` judges a checkpoint by, where it was measured."""
    if self._keep_best and self._keep_best.metric in scores:
      self._scores[step] = scores[self._keep_best.metric]

  @property
  def best(self) -> tuple[int, float] | None:
    """Step and value of the best one there, on process 0; None for none."""
    best = None
    for step in manifest.saved_steps(self.folder):
      value = self._scores.get(step)
      if value is None or self._keep_best is None:
        continue
      if best is None or self._keep_best.is_better(value, best[1]):
        best = step, value
    return best

  def _drop_oldest(self) -> None:
    """Removes all but the newest `keep` checkpoints and the best."""
    best = self.best
    for old in manifest.saved_steps(self.folder)[: -self._keep]:
      if best is not None and old == best[0]:
        continue
      # By a rename, so that a kill never leaves half an old checkpoint.
      doomed = self.folder / f"{_ASIDE}{old}"
      os.rename(self.folder / str(old), doomed)
      shutil.rmtree(doomed)

  def restore(self, template: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """Reads the newest checkpoint that is whole.

    A torn or corrupt one is set aside as `STEP.torn` with a warning, and the
    one before is read.  Also checks that the disk has room for the checkpoints
    to come.

    Args:
      template: a pytree like the state, of arrays or `jax.ShapeDtypeStruct`;
        gives structure, and where a leaf is committed, its sharding.

    Returns:
      (step, state, extra), or None where nothing was saved yet.

    Raises:
      ValueError: the checkpoint is of another config or another state, the
        differing fields named; or none is readable.
      DiskFullError: too little free space.

    Warns:
      UserWarning: a checkpoint was torn.
    """
    self.wait()

    def find():
      steps = manifest.saved_steps(self.folder)
      kept = self._keep + (self._keep_best is not None)
      files.require_free_space(
        self.folder,
        max(kept + 1 - len(steps), 1) * leaves.stored_bytes(template)
        + _SLACK_BYTES,
        f"the next checkpoints in {self.folder}",
      )
      return manifest.newest_whole(self.folder, steps) if steps else None

    if (found := processes.on_primary(find)) is None:
      return None
    step, torn = found
    state, extra = self._read(step, template)
    if processes.is_primary():
      for bad in torn:
        aside = self.folder / f"{bad}.torn"
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier fall
        os.rename(self.folder / str(bad), aside)
      self._drop_oldest()  # a kill right after a save may have kept one more
    return step, state, extra

  def close(self) -> None:
    """Releases the threads; `wait` first."""
    self._thread.shutdown()
    self._orbax.close()

  def __enter__(self):
    return self

  def __exit__(self, exc_type, exc, traceback):
    # What goes wrong here would hide what went wrong before: Orbax tells of a
    # full disk once more when it is closed.
    hidden = (Exception,) if exc_type else ()
    with contextlib.suppress(*hidden), files.clear_disk_errors(self.folder):
      try:
        self.wait()
      finally:
        self.close()

  def _read(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
    """One checkpoint, checked against config, template and checksums."""
    record = _read_record(self._orbax, self.folder / str(step))
    if self._config is not None and record["config"] is not None:
      changed = differences(record["config"], self._config)
      if changed:
        raise ValueError(
          f"the checkpoint {self.folder / str(step)} is of another config;"
          f" saved -> given:\n{changed}\nChoose another --workdir, or give the"
          " saved values."
        )
    wanted = {
      path: leaves.describe(leaf) for path, leaf in leaves.flatten(template)
    }
    changed = differences(_layout(record["arrays"]), _layout(wanted))
    if changed:
      raise ValueError(
        f"the checkpoint {self.folder / str(step)} holds another state;"
        f" saved -> needed:\n{changed}\nThe model, the optimizer or the code"
        " changed since: choose another --workdir."
      )
    state = self._orbax.restore(
      self.folder / str(step),
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.map(leaves.target, template))
      ),
    ).state
    return jax.tree.map(leaves.placed, state, template), record["extra"]


def restore_part(
  folder: files.Path, name: str, *, step: int | None = None
) -> Any:
  """Reads one field of a saved state, without a template or the rest of it.

  Args:
    folder: a checkpoints' folder; nothing in it is changed.
    name: top-level field of the state, such as "variables" or "ema".
    step: which checkpoint; None is the newest that is whole.

  Returns:
    The field as nested dicts and lists (dataclasses are dicts, tuples lists) of
    jax arrays on the default device; None where the field was None.

  Raises:
    ValueError: no checkpoint is there, the step or the field is not, or none
      is readable.

  Warns:
    UserWarning: a checkpoint was torn, and the one before was read.
  """
  folder = _whole_checkpoint(folder, step)
  # Reads the record and StandardSave's layout.
  with _open_orbax(ocp.PyTreeCheckpointHandler()) as orbax:
    record = _read_record(orbax, folder)
    tree = orbax.metadata(folder).item_metadata.state.tree
  _check_field(folder, name, tree)

  def read(path, _):
    text = leaves.path_text(path)
    array = open_array(folder / "state", text.replace("/", "."))
    # A copy, of which the device owns the memory.
    data = jnp.array(read_array(array))
    return leaves.as_leaf(data, record["arrays"][text])

  return jax.tree.map_with_path(read, {name: tree[name]})[name]


def open_variables(
  folder: files.Path, *, step: int | None = None
) -> StoredArrays:
  """The model's variables, to be read as another stage needs them.

  Args:
    folder: a checkpoints' folder; nothing in it is changed.
    step: which checkpoint; None is the newest that is whole.

  Raises:
    ValueError: as `restore_part`.
  """
  folder = _whole_checkpoint(folder, step)
  with _open_orbax(ocp.PyTreeCheckpointHandler()) as orbax:
    arrays = _read_record(orbax, folder)["arrays"]
  _check_field(folder, "variables", {path.split("/")[0] for path in arrays})
  shapes: dict[str, Any] = {}
  for path, array in arrays.items():
    field, *keys = path.split("/")
    if field != "variables":
      continue
    tree = shapes
    for key in keys[:-1]:
      tree = tree.setdefault(key, {})
    shape, dtype = tuple(array["shape"]), jnp.dtype(array["dtype"])
    tree[keys[-1]] = jax.ShapeDtypeStruct(shape, dtype)
  return StoredArrays(folder / "state", "variables", shapes)


def restore_variables(folder: files.Path, *, step: int | None = None) -> Any:
  """Reads the model's variables only, to start another stage from them.

  Args:
    folder: a checkpoints' folder; nothing in it is changed.
    step: which checkpoint; None is the newest that is whole.

  Returns:
    {"params": ..., "router": ...} as saved, on the default device.

  Raises:
    ValueError: as `restore_part`.
  """
  return restore_part(folder, "variables", step=step)


def _open_orbax(handler: Any) -> ocp.AsyncCheckpointer:
  return ocp.AsyncCheckpointer(
    ocp.CompositeCheckpointHandler(
      state=handler, record=ocp.JsonCheckpointHandler()
    ),
    timeout_secs=_WRITTEN_WITHIN_SECS,
  )


def _whole_checkpoint(folder: files.Path, step: int | None) -> pathlib.Path:
  """Folder of the newest checkpoint that is whole, or of that step's."""
  folder = pathlib.Path(folder).absolute()
  if not folder.is_dir():
    raise ValueError(f"{folder} does not exist: it should hold checkpoints.")
  steps = manifest.saved_steps(folder)
  if not steps or (step is not None and step not in steps):
    raise ValueError(
      f"{folder} has no checkpoint{'' if step is None else f' {step}'};"
      f" found: {', '.join(map(str, steps)) or 'none'}."
    )
  step, _ = manifest.newest_whole(folder, steps if step is None else [step])
  return folder / str(step)


def _check_field(
  folder: pathlib.Path, name: str, fields: Iterable[str]
) -> None:
  if name not in fields:
    raise ValueError(
      f"the checkpoint {folder} has no {name!r}; it has"
      f" {', '.join(sorted(fields))}."
    )


def _read_record(
  orbax: ocp.Checkpointer, folder: pathlib.Path
) -> dict[str, Any]:
  args = ocp.args.Composite(record=ocp.args.JsonRestore())
  return orbax.restore(folder, args=args).record


def _read_scores(folder: pathlib.Path) -> dict[str, float]:
  """What one process alone can read of a record, which may be torn."""
  try:
    return files.read_json(folder / "record" / "metadata")["scores"]
  except (OSError, ValueError, KeyError):  # torn, or from before there were any
    return {}


def _layout(arrays: dict[str, Any]) -> dict[str, str]:
  return {path: f"{a['dtype']} {a['shape']}" for path, a in arrays.items()}
