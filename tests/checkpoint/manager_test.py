"""Checkpoints come back to the bit, or not at all."""

import errno
import os
import shutil
import threading
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlm import files
from rlm.checkpoint import manager as manager_module
from rlm.checkpoint.config import KeepBest
from rlm.checkpoint.manager import (
  CheckpointManager,
  restore_part,
  restore_variables,
)


@flax.struct.dataclass
class State:
  step: Any
  variables: Any
  opt_state: Any
  ema: Any
  key: Any


def make_state(seed=0):
  key = jax.random.key(seed)
  params = {
    "layers": {
      "w": jax.random.normal(key, (40, 50)),
      "b": jnp.arange(5, dtype=jnp.bfloat16) / 3,
    },
    "embed": jax.random.normal(key, (7, 4)),
    "zero_layers": jnp.zeros((0, 4)),
  }
  is_matrix = {
    "layers": {"w": True, "b": False},
    "embed": True,
    "zero_layers": False,
  }
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=is_matrix)
  )
  return State(
    step=jnp.int32(3),
    variables={"params": params, "router": {}},
    opt_state=tx.init(params),
    ema=None,
    key=jax.random.split(jax.random.key(seed, impl="rbg"), 2),
  )


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert isinstance(x, jax.Array) and x.dtype == y.dtype
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def manager_of(folder, **kwargs):
  return CheckpointManager(folder, **{"keep": 2, **kwargs})


def test_every_kind_of_leaf_comes_back_to_the_bit(tmp_path):
  state = make_state()
  extra = {"data": {"step": 5}, "level": 0.1, "list": [1, None, "é"]}
  with manager_of(tmp_path) as manager:
    assert manager.restore(state) is None
    manager.save(3, state, extra)
  for template in (make_state(1), jax.eval_shape(make_state)):
    with manager_of(tmp_path) as manager:
      step, restored, back = manager.restore(template)
      assert step == 3 and back == extra
      assert_equal(restored, state)


def test_a_restored_state_can_be_donated_and_stays_uncommitted(tmp_path):
  state = {"w": jnp.arange(8.0), "step": jnp.int32(1)}
  with manager_of(tmp_path) as manager:
    manager.save(1, state)
    _, restored, _ = manager.restore(state)
  assert not restored["w"].committed
  add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  after = add(restored)
  assert restored["w"].is_deleted()
  np.testing.assert_array_equal(after["w"], np.arange(1.0, 9.0))
  # Unlike a committed one, it meets arrays that live on a mesh.
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("data")))
  assert (after["w"] + rows).sharding.num_devices == 8


def test_a_sharded_state_comes_back_on_its_mesh_or_another(tmp_path):
  def state_on(shape, axes, spec):
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    place = NamedSharding(mesh, PartitionSpec(*spec))
    return {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), place)}

  saved = state_on((8,), ("data",), ("data", None))
  other = state_on((2, 4), ("data", "model"), (None, "model"))
  with manager_of(tmp_path) as manager:
    manager.save(1, saved)
    for like in (saved, other, jax.eval_shape(lambda: other)):
      _, restored, _ = manager.restore(like)
      np.testing.assert_array_equal(restored["w"], saved["w"])
      if isinstance(like["w"], jax.Array):
        assert restored["w"].sharding == like["w"].sharding
  np.testing.assert_array_equal(restore_part(tmp_path, "w"), saved["w"])


def test_a_part_comes_back_without_a_template(tmp_path):
  state = make_state()
  with manager_of(tmp_path) as manager:
    manager.save(1, make_state(1))
    manager.save(2, state)
  assert_equal(restore_variables(tmp_path), state.variables)
  older = restore_variables(tmp_path, step=1)
  assert_equal(older, make_state(1).variables)
  assert restore_part(tmp_path, "ema") is None
  assert_equal(restore_part(tmp_path, "key"), state.key)
  with pytest.raises(ValueError, match=r"no 'params'; it has ema, key, opt_st"):
    restore_part(tmp_path, "params")
  with pytest.raises(ValueError, match=r"no checkpoint 7; found: 1, 2"):
    restore_variables(tmp_path, step=7)
  with pytest.raises(ValueError, match="no checkpoint; found: none"):
    (tmp_path / "empty").mkdir()
    restore_variables(tmp_path / "empty")
  with pytest.raises(ValueError, match="absent does not exist"):
    restore_variables(tmp_path / "absent")


def test_a_part_that_disappears_is_no_zeros(tmp_path, monkeypatch):
  with manager_of(tmp_path) as manager:
    manager.save(1, make_state())
  open_array = manager_module.open_array

  def open_and_lose(folder, name):
    array = open_array(folder, name)
    shutil.rmtree(folder)
    return array

  monkeypatch.setattr(manager_module, "open_array", open_and_lose)
  with pytest.raises(ValueError, match="disappeared, or lost files, while"):
    restore_variables(tmp_path)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path):
  with manager_of(tmp_path, keep=2) as manager:
    for step in range(1, 5):
      manager.save(step, {"x": jnp.float32(step)}, {"step": step})
    manager.wait()
    assert names(tmp_path) == ["3", "4"]
    step, state, extra = manager.restore({"x": jnp.float32(0)})
  assert (step, float(state["x"]), extra) == (4, 4.0, {"step": 4})


LOWEST = KeepBest("heldout", "min")


def save_scored(manager, scores):
  for step, score in scores.items():
    metrics = {"loss": 1.0} | ({} if score is None else {"heldout": score})
    manager.save(step, {"x": jnp.float32(step)}, metrics=metrics)
  manager.wait()


def test_the_best_is_kept_beside_the_newest(tmp_path):
  with manager_of(tmp_path, keep=2, keep_best=LOWEST) as manager:
    assert manager.best is None
    save_scored(manager, {1: 5.0, 2: 3.0, 3: 4.0, 4: None, 5: 3.0})
    assert names(tmp_path) == ["2", "4", "5"]  # of equal ones the first
    assert manager.best == (2, 3.0)
    assert manager.restore({"x": jnp.float32(0)})[0] == 5
  # A later process knows what an earlier one measured.
  with manager_of(tmp_path, keep=1, keep_best=LOWEST) as manager:
    assert manager.best == (2, 3.0)
    save_scored(manager, {6: 3.5})
    assert names(tmp_path) == ["2", "6"]
    save_scored(manager, {7: 2.5, 8: None})
    assert names(tmp_path) == ["7", "8"]
  # Another metric: what was judged by the old one counts no more.
  best = KeepBest("loss", "max")
  with manager_of(tmp_path, keep=1, keep_best=best) as manager:
    assert manager.best is None
    save_scored(manager, {9: 1.0})
    assert manager.best == (9, 1.0) and names(tmp_path) == ["9"]


@pytest.mark.parametrize(
  "mode, kept", [("min", ["1", "4"]), ("max", ["3", "4"])]
)
def test_the_best_is_the_smallest_or_the_largest(tmp_path, mode, kept):
  best = KeepBest("heldout", mode)
  with manager_of(tmp_path, keep=1, keep_best=best) as manager:
    save_scored(manager, {1: 1.0, 2: 2.0, 3: 3.0, 4: 2.0})
  assert names(tmp_path) == kept


def hold(monkeypatch, held):
  """Commits wait for the event `held`."""
  write = manager_module.manifest.write_manifest

  def write_when_let(folder):
    assert held.wait(30)
    write(folder)

  monkeypatch.setattr(manager_module.manifest, "write_manifest", write_when_let)


def test_a_save_returns_before_it_is_on_the_disk(tmp_path, monkeypatch):
  held = threading.Event()
  hold(monkeypatch, held)
  states = {step: make_state(step) for step in (1, 2)}
  with manager_of(tmp_path) as manager:
    manager.save(1, states[1])
    assert not (tmp_path / "1").exists()
    threading.Timer(0.2, held.set).start()
    manager.save(2, states[2])  # waits for the first
    assert held.is_set() and (tmp_path / "1").exists()
  # So does the end of the block.
  assert (tmp_path / "2").exists()
  with manager_of(tmp_path) as manager:
    step, state, _ = manager.restore(states[1])
  assert step == 2
  assert_equal(state, states[2])


@pytest.mark.parametrize("when", ["save", "wait", "restore", "close"])
def test_an_error_while_writing_is_raised_at_the_next_call(
  tmp_path, monkeypatch, when
):
  states = save_two(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(files, "sync_folder", no_space)
    with pytest.raises(files.DiskFullError, match=r"no space left .*/3\."):
      with manager_of(tmp_path) as manager:
        manager.save(3, states[1])
        if when == "save":
          manager.save(4, states[1])
        elif when == "wait":
          manager.wait()
        elif when == "restore":
          manager.restore(states[1])
  with manager_of(tmp_path) as manager:
    assert manager.restore(states[1])[0] == 2
    manager.save(3, states[1])  # once there is room
  assert names(tmp_path) == ["2", "3"]


def test_an_error_of_the_loop_is_not_hidden_by_one_of_the_save(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(manager_module.manifest, "write_manifest", no_space)
  with pytest.raises(KeyError, match="the loop's"):
    with manager_of(tmp_path) as manager:
      manager.save(1, make_state())
      raise KeyError("the loop's")


def test_what_was_saved_before_an_error_of_the_loop_is_whole(tmp_path):
  with pytest.raises(KeyError):
    with manager_of(tmp_path) as manager:
      manager.save(1, make_state())
      raise KeyError
  with manager_of(tmp_path) as manager:
    assert manager.restore(make_state())[0] == 1


def test_mistakes_are_named(tmp_path):
  with pytest.raises(ValueError, match="keep=0: at least one"):
    manager_of(tmp_path, keep=0)
  with manager_of(tmp_path) as manager:
    with pytest.raises(ValueError, match=r"leaf a/b is int, not an array"):
      manager.save(1, {"a": {"b": 3}})
    manager.save(1, {"a": jnp.int32(1)})
    with pytest.raises(ValueError, match="step 1 is already saved"):
      manager.save(1, {"a": jnp.int32(1)})


def test_another_config_or_state_is_refused_with_its_fields(tmp_path):
  config = {"seed": 0, "model": {"hidden_size": 4}}
  state = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
  with manager_of(tmp_path, config=config) as manager:
    manager.save(1, state)
  other = {"seed": 0, "model": {"hidden_size": 8}}
  with (
    manager_of(tmp_path, config=other) as manager,
    pytest.raises(
      ValueError,
      match=r"(?s)another config; saved -> given:\n  model\.hidden_size: 4 ->",
    ),
  ):
    manager.restore(state)
  grown = {"w": jnp.ones((2, 4)), "c": jnp.ones(3, jnp.bfloat16)}
  with (
    manager_of(tmp_path, config=config) as manager,
    pytest.raises(
      ValueError,
      match=r"(?s)another state; saved -> needed:.*b: 'float32 \[3\]' ->"
      r" \(absent\).*w: 'float32 \[2, 3\]' -> 'float32 \[2, 4\]'"
      r".*c: \(absent\) -> 'bfloat16 \[3\]'",
    ),
  ):
    manager.restore(grown)
  assert (tmp_path / "1").exists()  # refused, not set aside as torn


def no_space(*args, **kwargs):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_two(folder):
  """Checkpoints 1 and 2, and the state of each."""
  states = {step: make_state(step) for step in (1, 2)}
  with manager_of(folder) as manager:
    for step, state in states.items():
      manager.save(step, state, {"step": step})
  return states


def data_files(folder):
  return sorted(
    (path for path in folder.rglob("*") if path.is_file()),
    key=lambda path: path.stat().st_size,
  )


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def zero_page(path):
  with open(path, "r+b") as file:
    file.seek(path.stat().st_size // 2)
    file.write(bytes(64))


def flip_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) * 2 // 3] ^= 0x10
  path.write_bytes(bytes(data))


def test_a_torn_newest_falls_back_and_the_run_goes_on(tmp_path):
  states = save_two(tmp_path)
  truncate(data_files(tmp_path / "2" / "state")[-1])
  with manager_of(tmp_path) as manager:
    with pytest.warns(
      UserWarning,
      match=r"checkpoint 2 in .* torn or corrupt \(state/.* has \d+ bytes"
      r" instead of \d+\); falling back to the one of step 1",
    ):
      step, state, extra = manager.restore(states[1])
    assert (step, extra) == (1, {"step": 1})
    assert_equal(state, states[1])
    manager.save(2, states[2], {"step": 2})  # its place is free again
  assert (tmp_path / "2.torn").is_dir()
  with manager_of(tmp_path) as manager:
    step, state, _ = manager.restore(states[1])
  assert step == 2
  assert_equal(state, states[2])


@pytest.mark.parametrize("damage", [truncate, zero_page, flip_bit, os.remove])
@pytest.mark.parametrize(
  "name",
  ["state/largest", "state/_METADATA", "record/metadata", "manifest.json"],
)
def test_damage_to_any_file_is_found(tmp_path, damage, name):
  states = save_two(tmp_path)
  if name == "state/largest":
    damage(data_files(tmp_path / "2")[-1])
  else:
    damage(tmp_path / "2" / name)
  with pytest.warns(UserWarning, match="falling back"):
    part = restore_variables(tmp_path)
  assert_equal(part, states[1].variables)
  assert (tmp_path / "2").exists()  # reading a part changes nothing
  with (
    manager_of(tmp_path) as manager,
    pytest.warns(UserWarning, match="falling back"),
  ):
    step, state, _ = manager.restore(states[1])
  assert step == 1
  assert_equal(state, states[1])


def test_without_any_readable_checkpoint_nothing_starts_over(tmp_path):
  states = save_two(tmp_path)
  for step in (1, 2):
    truncate(data_files(tmp_path / str(step))[-1])
  with (
    manager_of(tmp_path) as manager,
    pytest.raises(
      ValueError, match=r"(?s)no checkpoint in .* is whole:\n  2: .*\n  1: "
    ),
  ):
    manager.restore(states[1])
  assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_what_a_kill_left_behind_is_cleared(tmp_path):
  states = save_two(tmp_path)
  os.rename(tmp_path / "1", tmp_path / ".aside-1")
  for name in (".aside-new", ".aside-new.orbax-checkpoint-tmp"):
    shutil.copytree(tmp_path / "2", tmp_path / name)
  assert_equal(restore_variables(tmp_path), states[2].variables)
  with manager_of(tmp_path) as manager:
    assert manager.restore(states[1])[0] == 2
  assert {path.name for path in tmp_path.iterdir()} == {"2"}


def test_a_kill_between_a_save_and_its_clearing_leaves_none_too_many(tmp_path):
  states = save_two(tmp_path)
  shutil.copytree(tmp_path / "2", tmp_path / "3")  # as before its clearing
  with manager_of(tmp_path, keep=2) as manager:
    assert manager.restore(states[1])[0] == 3
  assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


def test_the_disk_must_hold_what_is_to_come(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with (
    manager_of(tmp_path, keep=2) as manager,
    pytest.raises(
      files.DiskFullError, match=r"next checkpoints .* need 28 MB .* 10 MB free"
    ),
  ):
    manager.restore({"w": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)})


@pytest.mark.parametrize("spec", [None, (), ("data",)])
def test_steps_taken_while_it_is_written_change_nothing(tmp_path, spec):
  step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
  state = {f"w{i}": jnp.arange(2.0**20).reshape(1024, -1) for i in range(4)}
  if spec is not None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(*spec))
    state = jax.device_put(state, place)
  expected = np.asarray(state["w0"]) * 2  # a copy
  state = step(state)
  with manager_of(tmp_path) as manager:
    manager.save(1, state)
    for _ in range(5):
      state = step(state)  # donates what is being written
    jax.block_until_ready(state)
    _, restored, _ = manager.restore(jax.eval_shape(lambda: state))
  for name in state:
    chex.assert_trees_all_equal(np.asarray(restored[name]), expected)
