import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlm.checkpoint import leaf_parts
from rlm.checkpoint.leaf_parts import LeafParts, blocks, for_each
from rlm.checkpoint.published_names import Tensor


def matrices(places, shape, transposed):
  """Tensors of a leaf and their numbers, stored."""
  stored = shape[::-1] if transposed else shape
  rng = np.random.default_rng(0)
  return [
    (
      Tensor(str(place), place, transposed, stored),
      rng.standard_normal(stored).astype(ml_dtypes.bfloat16),
    )
    for place in places
  ]


def load(leaf, sharding, tensors, **options):
  parts = LeafParts(leaf, sharding, **options)
  for tensor, numbers in tensors:
    for index in blocks(tensor, parts):
      parts.write(tensor, index, numbers[index])
  return parts.finish()


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  "spec",
  [
    (None,),
    (None, "data"),
    (None, None, "data"),
    (None, None, None, "data"),
    (None, "model", "data"),
  ],
)
def test_every_sharding_gives_the_same_leaf(monkeypatch, on_host, dtype, spec):
  monkeypatch.setattr(leaf_parts, "_BLOCK_SIZE", 20)
  if not on_host and dtype == "bfloat16":
    pytest.skip("compiles as float32 does")
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  shape = (2, 4, 8, 12)
  places = list(itertools.product(range(2), range(4)))
  tensors = matrices(places, shape[2:], transposed=True)
  leaf = jax.ShapeDtypeStruct(shape, dtype)
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  made = load(leaf, sharding, tensors, on_host=on_host)
  wanted = np.stack([x.T for _, x in tensors]).reshape(shape)
  assert made.dtype == dtype and made.sharding == sharding
  np.testing.assert_array_equal(np.asarray(made), wanted.astype(dtype))


def test_vectors_and_matrices_as_stored():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
  leaf = jax.ShapeDtypeStruct((3, 5), jnp.float32)
  tensors = matrices([(0,), (2,)], (5,), transposed=False)
  made = np.asarray(load(leaf, sharding, tensors))
  np.testing.assert_array_equal(made[2], tensors[1][1].astype(np.float32))
  assert not made[1].any()  # no tensor came


def test_blocks_cover_each_row_and_keep_one_shape(monkeypatch):
  monkeypatch.setattr(leaf_parts, "_BLOCK_SIZE", 12)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  parts = LeafParts(jax.ShapeDtypeStruct((7, 4), jnp.float32), sharding)
  tensor = Tensor("w", (), False, (7, 4))
  rows = [index[0] for index in blocks(tensor, parts)]
  assert rows == [slice(0, 3), slice(3, 6), slice(4, 7)]


def test_a_leaf_of_the_host_is_not_copied():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for dtype in ("float32", "bfloat16", "int8"):
    parts = LeafParts(jax.ShapeDtypeStruct((3, 5), dtype), sharding)
    ((_, part),) = parts._parts
    array = parts.finish()
    assert array.unsafe_buffer_pointer() == part._array.ctypes.data


def test_the_first_error_of_a_task_is_raised_and_ends_the_rest():
  done = []

  def fail():
    raise ValueError("broken")

  tasks = itertools.chain([fail], (lambda: done.append(1) for _ in range(1000)))
  with pytest.raises(ValueError, match="broken"):
    for_each(tasks, workers=2)
  assert len(done) < 100
