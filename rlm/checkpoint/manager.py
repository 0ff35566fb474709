"""Checkpoints of a run: whole or invisible, and verified when read.

Everything that a bit-exact continuation needs is in one Orbax step folder:

  checkpoints/600/state/         the pytree of arrays, by Orbax's StandardSave,
                                 in chunks that a reader can hold
  checkpoints/600/record/        JSON: the run's config, the loop's `extra`, and
                                 each array's path, shape and dtype
  checkpoints/600/manifest.json  every file's size and CRC-32

It is written aside and appears by one rename when all of it is on the disk, so
a kill or a power cut leaves the whole checkpoint or nothing.

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
          last = step + 1 == cfg.steps
          if is_due(step, cfg.save_every_steps) or last or stop.requested:
            with log.paused():
              log.flush()
              manager.save(
                step + 1, state, {"batches": batches.get_state()}
              )
          if stop.requested and not last:
            raise Stopped("pretrain", step + 1)
        seconds = log.total_seconds
    return folder.finish({"steps": cfg.steps, "seconds": seconds})

A checkpoint's step counts the steps done, so it is the next one to do, and
equal to `state.step`.  A kill costs the steps since the last save: they are
done again, and their records are dropped first.
"""

import os
import pathlib
import shutil
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlm import files
from rlm.checkpoint import leaves, manifest
from rlm.checkpoint.stored_arrays import (
  StoredArrays,
  chunked,
  open_array,
  read_array,
)
from rlm.workdir import differences

_ASIDE = ".aside-"  # prefix of folders that are no checkpoint (any more)
_SLACK_BYTES = 16_000_000  # metrics, traces and the JSON beside the arrays


class CheckpointManager:
  """Saves and restores the state of one run; see the module's loop.

  Saving blocks until the checkpoint is on the disk.
  """

  def __init__(
    self, folder: files.Path, *, keep: int, config: dict | None = None
  ):
    """Opens the folder, creating it and clearing what a kill left half done.

    Args:
      folder: the checkpoints' folder.
      keep: how many of the newest to keep; two let a torn one fall back.
      config: the run's config, as `Workdir.identity`; stored, and compared
        at `restore`.

    Raises:
      ValueError: `keep` is less than 1.
      DiskFullError: no space left.
    """
    if keep < 1:
      raise ValueError(f"keep={keep}: at least one checkpoint must be kept.")
    self.folder = pathlib.Path(folder).absolute()
    self._keep = keep
    self._config = files.to_json(config)
    self._orbax = _open_orbax(ocp.StandardCheckpointHandler())
    if jax.process_index() == 0:
      with files.clear_disk_errors(self.folder):
        self.folder.mkdir(parents=True, exist_ok=True)
      for leftover in self.folder.glob(f"{_ASIDE}*"):
        shutil.rmtree(leftover)

  def save(
    self, step: int, state: Any, extra: dict[str, Any] | None = None
  ) -> None:
    """Saves, returns when it is on the disk, then drops the oldest.

    Args:
      step: steps done; each is saved once.
      state: a pytree of jax arrays, scalars and typed keys included, or numpy
        arrays, which may lie in files.
      extra: JSON data beside it, such as the data iterator's state.

    Raises:
      ValueError: a leaf is no array, or the step was saved before.
      DiskFullError: no space left; the older checkpoints are untouched.
    """
    if step in _steps(self.folder):
      raise ValueError(f"step {step} is already saved in {self.folder}.")
    for path, leaf in leaves.flatten(state):
      if not isinstance(leaf, (jax.Array, np.ndarray)):
        raise ValueError(
          f"state leaf {path} is {type(leaf).__name__}, not an array. Make"
          " it one (jnp.asarray), or put plain data into `extra`."
        )
    record = {
      "extra": files.to_json(extra or {}),
      "config": self._config,
      "arrays": {
        path: leaves.describe(leaf) for path, leaf in leaves.flatten(state)
      },
    }
    stored = jax.tree.map(leaves.stored, state)
    final, aside = self.folder / str(step), self.folder / f"{_ASIDE}new"
    with files.clear_disk_errors(final):
      self._orbax.save(
        aside,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(stored, jax.tree.map(chunked, stored)),
          record=ocp.args.JsonSave(record),
        ),
        force=True,  # over what a failed save left
      )
      if jax.process_index() == 0:
        manifest.write_manifest(aside)
        os.rename(aside, final)
        files.sync_folder(self.folder)
        self._drop_oldest()

  def _drop_oldest(self) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for old in _steps(self.folder)[: -self._keep]:
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
    steps = _steps(self.folder)
    files.require_free_space(
      self.folder,
      max(self._keep + 1 - len(steps), 1) * leaves.stored_bytes(template)
      + _SLACK_BYTES,
      f"the next checkpoints in {self.folder}",
    )
    if not steps:
      return None
    step, torn = _newest_whole(self.folder, steps)
    state, extra = self._read(step, template)
    for bad in torn:
      kept = self.folder / f"{bad}.torn"
      shutil.rmtree(kept, ignore_errors=True)  # of an earlier fall
      os.rename(self.folder / str(bad), kept)
    if jax.process_index() == 0:
      self._drop_oldest()  # a kill right after a save may have kept one more
    return step, state, extra

  def close(self) -> None:
    """Releases Orbax's threads."""
    self._orbax.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
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


def _open_orbax(handler: Any) -> ocp.Checkpointer:
  # Blocking: 0.1 s for 2 MB on two cores, of which saving in the background
  # would still hold the loop for 0.03 s.
  return ocp.Checkpointer(
    ocp.CompositeCheckpointHandler(
      state=handler, record=ocp.JsonCheckpointHandler()
    )
  )


def _steps(folder: pathlib.Path) -> list[int]:
  """Steps with a checkpoint, oldest first."""
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def _newest_whole(
  folder: pathlib.Path, steps: list[int]
) -> tuple[int, list[int]]:
  """The newest step that is whole, and the newer ones, which are torn."""
  reasons: dict[int, str] = {}
  for step in sorted(steps, reverse=True):
    reason = manifest.damage(folder / str(step))
    if reason is not None:
      reasons[step] = reason
      continue
    for torn, reason in reasons.items():
      warnings.warn(
        f"checkpoint {torn} in {folder} is torn or corrupt ({reason}); falling"
        f" back to the one of step {step}.",
        stacklevel=3,
      )
    return step, list(reasons)
  lines = "\n".join(f"  {step}: {reason}" for step, reason in reasons.items())
  raise ValueError(
    f"no checkpoint in {folder} is whole:\n{lines}\nRemove the folder to start"
    " from the beginning."
  )


def _whole_checkpoint(folder: files.Path, step: int | None) -> pathlib.Path:
  """Folder of the newest checkpoint that is whole, or of that step's."""
  folder = pathlib.Path(folder).absolute()
  if not folder.is_dir():
    raise ValueError(f"{folder} does not exist: it should hold checkpoints.")
  steps = _steps(folder)
  if not steps or (step is not None and step not in steps):
    raise ValueError(
      f"{folder} has no checkpoint{'' if step is None else f' {step}'};"
      f" found: {', '.join(map(str, steps)) or 'none'}."
    )
  step, _ = _newest_whole(folder, steps if step is None else [step])
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


def _layout(arrays: dict[str, Any]) -> dict[str, str]:
  return {path: f"{a['dtype']} {a['shape']}" for path, a in arrays.items()}
