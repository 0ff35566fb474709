"""Checkpoints of a run: whole or invisible, and verified when read.

Everything that a bit-exact continuation needs is in one Orbax step folder:

  checkpoints/600/state/    the pytree of arrays, by Orbax's StandardSave
  checkpoints/600/record/   JSON: the run's config, the loop's `extra`, and
                            each array's path, shape, dtype and CRC-32

Orbax writes aside and renames, so a kill leaves the folder or nothing; its own
checks find torn files, but a flipped bit or a page of zeros inside an array's
bytes only the CRCs find (measured by damaging each file of a checkpoint).

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

import contextlib
import os
import pathlib
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlm import files
from rlm.checkpoint import record as record_lib
from rlm.workdir import differences

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
    """
    if keep < 1:
      raise ValueError(f"keep={keep}: at least one checkpoint must be kept.")
    self.folder = pathlib.Path(folder).absolute()
    self._keep = keep
    self._config = files.to_json(config)
    with files.clear_disk_errors(self.folder):
      self._orbax = _open_orbax(
        self.folder, ocp.StandardCheckpointHandler(), create=True
      )
    if jax.process_index() == 0:
      for leftover in self.folder.glob(".deleted-*"):
        shutil.rmtree(leftover)

  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, None without one."""
    return max(self._orbax.all_steps(), default=None)

  def save(
    self, step: int, state: Any, extra: dict[str, Any] | None = None
  ) -> None:
    """Saves, returns when it is on the disk, then drops the oldest.

    Args:
      step: steps done; each is saved once.
      state: a pytree of jax arrays, scalars and typed keys included.
      extra: JSON data beside it, such as the data iterator's state.

    Raises:
      ValueError: a leaf is no jax array, or the step was saved before.
      DiskFullError: no space left; the older checkpoints are untouched.
    """
    if step in self._orbax.all_steps():
      raise ValueError(f"step {step} is already saved in {self.folder}.")
    for path, leaf in record_lib.leaves(state):
      if not isinstance(leaf, jax.Array):
        raise ValueError(
          f"state leaf {path} is {type(leaf).__name__}, not a jax array. Make"
          " it one (jnp.asarray), or put plain data into `extra`."
        )
    record = record_lib.make_record(
      state, files.to_json(extra or {}), self._config
    )
    with files.clear_disk_errors(self.folder / str(step)):
      self._orbax.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_stored(state)),
          record=ocp.args.JsonSave(record),
        ),
        force=True,
      )
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        _sync_tree(self.folder / str(step))
        # Only now: until the new one is on the disk, the old ones are needed.
        for old in sorted(self._orbax.all_steps())[: -self._keep]:
          # By a rename, so that a kill never leaves half an old checkpoint.
          doomed = self.folder / f".deleted-{old}"
          os.rename(self.folder / str(old), doomed)
          shutil.rmtree(doomed)
    self._orbax.reload()

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
    steps = sorted(self._orbax.all_steps(), reverse=True)
    need = sum(
      leaf.size * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(jax.eval_shape(_stored, template))
    )
    files.require_free_space(
      self.folder,
      max(self._keep + 1 - len(steps), 1) * need + _SLACK_BYTES,
      f"the next checkpoints in {self.folder}",
    )
    if not steps:
      return None
    step, (state, record), torn = _newest_whole(
      self._orbax, steps, lambda step: self._read(step, template)
    )
    if torn:
      for bad in torn:
        aside = self.folder / f"{bad}.torn"
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier fall
        os.rename(self.folder / str(bad), aside)
      self._orbax.reload()
      warnings.warn(_torn_message(self.folder, torn, step), stacklevel=2)
    return step, state, record["extra"]

  def close(self) -> None:
    """Releases Orbax's threads."""
    self._orbax.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  def _read(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
    """One checkpoint, checked against config, template and checksums."""
    record = _read_record(self._orbax, step)
    if self._config is not None and record["config"] is not None:
      changed = differences(record["config"], self._config)
      if changed:
        raise _MismatchError(
          f"the checkpoint {self.folder / str(step)} is of another config;"
          f" saved -> given:\n{changed}\nChoose another --workdir, or give the"
          " saved values."
        )
    changed = differences(
      record_lib.saved_layout(record), record_lib.layout(template)
    )
    if changed:
      raise _MismatchError(
        f"the checkpoint {self.folder / str(step)} holds another state;"
        f" saved -> needed:\n{changed}\nThe model, the optimizer or the code"
        " changed since: choose another --workdir."
      )
    state = self._orbax.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.map(_target, template))
      ),
    ).state
    record_lib.check_arrays(state, record)
    return jax.tree.map(_as_template, state, template), record


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
  folder = pathlib.Path(folder).absolute()
  if not folder.is_dir():
    raise ValueError(f"{folder} does not exist: it should hold checkpoints.")
  # The same layout as StandardSave's, and a handler that reads parts of it.
  handler = ocp.PyTreeCheckpointHandler()
  with contextlib.closing(_open_orbax(folder, handler, create=False)) as orbax:
    steps = sorted(orbax.all_steps(), reverse=True)
    if not steps or (step is not None and step not in steps):
      raise ValueError(
        f"{folder} has no checkpoint{'' if step is None else f' {step}'};"
        f" found: {', '.join(map(str, steps)) or 'none'}."
      )
    step, part, torn = _newest_whole(
      orbax,
      steps if step is None else [step],
      lambda step: _read_part(orbax, step, name),
    )
  if torn:
    warnings.warn(_torn_message(folder, torn, step), stacklevel=2)
  return part


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


class _MismatchError(ValueError):
  """The checkpoint is whole, but not this run's."""


def _open_orbax(
  folder: pathlib.Path, handler: Any, *, create: bool
) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    folder,
    item_handlers={
      "state": handler,
      "record": ocp.JsonCheckpointHandler(),
    },
    options=ocp.CheckpointManagerOptions(
      create=create,
      cleanup_tmp_directories=create,
      # Blocking: 0.1 s for 2 MB on two cores, of which a save in the
      # background would still hold the loop for 0.03 s.
      enable_async_checkpointing=False,
    ),
  )


def _newest_whole(orbax: Any, steps: list[int], read: Any) -> tuple:
  """(step, read(step), [torn steps]) of the first step that reads."""
  reasons: dict[int, str] = {}
  for step in steps:
    try:
      return step, read(step), list(reasons)
    except (_MismatchError, KeyboardInterrupt):
      raise
    except Exception as error:  # whatever Orbax raises on damaged files
      reasons[step] = f"{type(error).__name__}: {str(error)[:200]}"
  lines = "\n".join(f"  {step}: {reason}" for step, reason in reasons.items())
  raise ValueError(
    f"no checkpoint in {orbax.directory} is readable:\n{lines}\nRemove the"
    " folder to start from the beginning."
  )


def _torn_message(folder: pathlib.Path, torn: list[int], step: int) -> str:
  return (
    f"checkpoint {', '.join(map(str, torn))} in {folder} is torn or corrupt;"
    f" falling back to the one of step {step}."
  )


def _read_record(orbax: Any, step: int) -> dict[str, Any]:
  record = orbax.restore(
    step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
  ).record
  record_lib.check_record(record)
  return record


def _read_part(orbax: Any, step: int, name: str) -> Any:
  record = _read_record(orbax, step)
  tree = orbax.item_metadata(step).state.tree
  if name not in tree:
    raise _MismatchError(
      f"the checkpoint {orbax.directory / str(step)} has no {name!r}; it has"
      f" {', '.join(sorted(tree))}."
    )
  target = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), tree[name])
  part = orbax.restore(
    step,
    args=ocp.args.Composite(
      state=ocp.args.PyTreeRestore(
        {name: target},
        restore_args={
          name: jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target
          )
        },
        partial_restore=True,
      )
    ),
  ).state
  record_lib.check_arrays(part, record)

  def as_saved(path, leaf):
    impl = record["arrays"][record_lib.path_text(path)].get("key_impl")
    array = jnp.array(leaf)
    return array if impl is None else jax.random.wrap_key_data(array, impl=impl)

  return jax.tree_util.tree_map_with_path(as_saved, part)[name]


def _stored(tree: Any) -> Any:
  return jax.tree.map(record_lib.stored, tree)


def _target(leaf: Any) -> Any:
  """What Orbax shall restore for a template's leaf."""
  data = jax.eval_shape(record_lib.stored, leaf)
  if _has_place(leaf):
    sharding = (
      record_lib.stored(leaf).sharding
      if isinstance(leaf, jax.Array)
      else leaf.sharding
    )
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
  return np.empty(data.shape, data.dtype)


def _has_place(leaf: Any) -> bool:
  """Whether the template says on which devices the leaf lives."""
  if isinstance(leaf, jax.Array):
    return leaf.committed
  return getattr(leaf, "sharding", None) is not None


def _as_template(restored: Any, leaf: Any) -> Any:
  """A restored leaf as the template's: its key type, and uncommitted alike."""
  if not _has_place(leaf):
    # A copy: the device must own what a donating step will reuse.
    restored = jnp.array(restored)
  if not record_lib.is_key(leaf):
    return restored
  return jax.random.wrap_key_data(restored, impl=record_lib.key_impl(leaf))


def _sync_tree(folder: pathlib.Path) -> None:
  """Brings a finished checkpoint and its name to the disk."""
  for path in [*folder.rglob("*"), folder, folder.parent]:
    files.sync_folder(path)  # fsync of a descriptor: files as well as folders
