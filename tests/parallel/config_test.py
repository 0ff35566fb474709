import pytest

from rlm.parallel.config import MeshConfig, replicas
from tests.tiny_model import mesh_of


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(expert=0), r"mesh\.expert=0 must be at least 1"),
    (dict(tensor=-2), r"mesh\.tensor=-2 must be at least 1"),
    (dict(expert_chunk=-1), "expert_chunk=-1 must not be negative; 0 is all"),
    (
      dict(expert_capacity=0.0),
      r"expert_capacity=0\.0 must be above 0",
    ),
  ],
)
def test_sizes_that_mean_nothing_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    mesh_of(**changes)


def test_rows_are_divided_by_three_axes_and_matrices_by_two():
  mesh = MeshConfig(data=2, fsdp=3, expert=5, context=7, tensor=11)
  assert mesh.devices == 2 * 3 * 5 * 7 * 11
  assert mesh.row_shards == 2 * 3 * 5
  assert mesh.pieces == 3 * 7
  assert list(mesh.sizes.items()) == [
    *(("data", 2), ("fsdp", 3), ("expert", 5), ("context", 7), ("tensor", 11))
  ]


def test_replicas_divide_nothing_but_rows():
  mesh = replicas(6)
  assert (mesh.devices, mesh.row_shards, mesh.pieces) == (6, 6, 1)


@pytest.mark.parametrize("rows", [0, 6, 10])
def test_rows_that_do_not_divide_are_named(rows):
  mesh = mesh_of(data=2, expert=2)
  mesh.check_rows("mesh", "batch.rows", 12)
  with pytest.raises(
    ValueError,
    match=rf"batch\.rows={rows} cannot be divided among the 4 parts of mesh"
    r" \(data=2 x fsdp=1 x expert=2\)\. Make it a multiple",
  ):
    mesh.check_rows("mesh", "batch.rows", rows)
