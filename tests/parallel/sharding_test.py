"""The tables name every array, and everything of one array lies alike."""

import dataclasses
import functools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import pretrain
from rlm.checkpoint import initial
from rlm.config import build
from rlm.models.quantized import quantized_shapes
from rlm.models.transformer import Transformer
from rlm.optim.config import MuonConfig, OptimizerConfig
from rlm.optim.optimizer import make_optimizer
from rlm.parallel import sharding
from rlm.rl.loss import freeze
from rlm.train import init_state
from tests.models import families
from tests.parallel.mesh_models import mesh_model
from tests.tiny_model import lay, mesh_of

STUDENTS = ("qwen2", "qwen3")
EVERY = (*families.FAMILIES, *STUDENTS)


def model_of(name):
  return mesh_model(name) if name in STUDENTS else families.model_of(name)


@functools.cache
def shapes_of(name):
  return initial.shapes(model_of(name))


def mesh_shapes():
  return initial.shapes(mesh_model("v3"))  # cached


def leaves(tree):
  """Path -> leaf."""
  found = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda leaf: isinstance(leaf, P)
  )
  return {jax.tree_util.keystr(path): leaf for path, leaf in found}


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_has_its_place(name):
  """Axes for its own dimensions, none for a stack's; matrices are divided."""
  shapes = leaves(shapes_of(name))
  specs = leaves(sharding.state_specs(shapes_of(name)))
  assert shapes.keys() == specs.keys()
  for path, spec in specs.items():
    stacked = any(stack in path for stack in sharding.STACKS)
    assert len(spec) == shapes[path].ndim, path
    assert not stacked or spec[0] is None
    matrix = len(spec) - stacked > 1
    pieces = [axes for axes in spec if isinstance(axes, tuple)]
    assert len(pieces) == matrix, path
  experts = [p for p, spec in specs.items() if "expert" in spec]
  if not model_of(name).cfg.is_dense:
    assert {path.split("'")[-2] for path in experts} == {
      *("gate_proj", "up_proj", "down_proj")
    }
    assert not any("shared" in path for path in experts)
  else:
    assert not experts


def test_a_parameter_of_no_table_is_named():
  tree = {"params": {"moe_layers": {"gamma": jnp.ones((2, 3))}}}
  with pytest.raises(
    ValueError,
    match=r"no sharding is chosen for the parameter .*\['gamma'\] of 2"
    r" dimensions\. Add 'gamma' to a table in rlm/parallel/sharding\.py",
  ):
    sharding.state_specs(tree)
  # A dimension too many is no row of the table either.
  with pytest.raises(ValueError, match="Add 'router'"):
    sharding.state_specs({"router": jnp.ones((2, 3, 4))})


V3 = runpy.run_path("configs/pretrain/deepseek_v3.py")["get_config"]()
ADAMW = build(OptimizerConfig, V3.optimizer)
MUON = dataclasses.replace(
  ADAMW,
  muon=MuonConfig(momentum=0.95, ns_steps=5, update_rms=0.2, adam_factor=0.3),
)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
  ("tx", "moments"),
  [
    (make_optimizer(ADAMW), 2),
    (make_optimizer(MUON), 1),
    (freeze(make_optimizer(MUON)), 0),
  ],
  ids=["adamw", "muon", "frozen"],
)
def test_moments_and_averages_lie_as_their_parameter(name, tx, moments):
  state = jax.eval_shape(
    functools.partial(init_state, tx=tx, ema_decay=0.9), shapes_of(name)
  )
  places = leaves(sharding.state_specs(state))
  held = leaves(state)
  params = leaves(sharding.state_specs(shapes_of(name)["params"]))
  followed = set()
  for path, spec in params.items():
    ours = {p for p in places if p.endswith(path)}
    followed |= ours
    # Itself, its average, and as many moments as its optimizer keeps.
    frozen = moments == 0 and "mtp_modules" in path
    assert len(ours) >= 2 + (0 if frozen else max(moments, 1))
    assert {places[p] for p in ours} == {spec}
  rest = {p for p in places.keys() - followed if "expert_bias" not in p}
  assert rest and all(places[p] == P() for p in rest)
  assert sum(held[p].size for p in rest) < 40  # counts and coefficients


@pytest.mark.parametrize("name", EVERY)
def test_int8_lies_as_the_matrix_and_one_row_of_scales_with_its_columns(name):
  shapes = shapes_of(name)
  whole = leaves(sharding.state_specs(shapes))
  quantized = leaves(sharding.state_specs(quantized_shapes(shapes)))
  for path, spec in whole.items():
    if path in quantized:
      assert quantized[path] == spec
      continue
    assert quantized.pop(f"{path}.values") == spec
    scale = quantized.pop(f"{path}.scale")
    assert scale == P(*spec[:-2], None, spec[-1])
  assert set(quantized) == {p for p in whole if p in quantized}


def test_batches_lead_with_rows_and_tokens():
  shape = (2, 3, 4)  # microbatches, rows, tokens
  specs = sharding.batch_specs(
    {
      "tokens": np.zeros(shape),
      "row_weights": np.zeros(shape[:2]),
      "mtp_weights": np.zeros((2, 3, 1, 4)),
      "expert_ids": np.zeros((2, 3, 5, 4, 6)),
      "learning_rate": np.float32(0),
    },
    leading=1,
  )
  rows = ("data", "fsdp", "expert")
  assert specs == {
    "tokens": P(None, rows, "context"),
    "row_weights": P(None, rows),
    "mtp_weights": P(None, rows, None, "context"),
    "expert_ids": P(None, rows, None, "context"),
    "learning_rate": P(),
  }
  assert sharding.batch_specs({"tokens": np.zeros((3, 4))}, leading=0) == {
    "tokens": P(rows, "context")
  }


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (
      dict(fsdp=5),
      r"mesh: .*fsdp=5.* does not divide the 32 of .* Make the product one of"
      " 1, 2, 4",
    ),
    (dict(tensor=3), r"mesh: tensor=3 does not .* Make tensor one of 1, 2, 4"),
    (dict(context=3, fsdp=2), r"fsdp=2 x .*context=3 .*one of 1, 2, 4"),
  ],
)
def test_sizes_that_do_not_divide_name_those_that_would(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.check_fits(mesh_of(**sizes), mesh_shapes(), "mesh")
  sharding.check_fits(mesh_of(fsdp=4, expert=2), mesh_shapes(), "mesh")


@pytest.fixture(scope="module")
def published():
  """The shapes of DeepSeek-V3, 671B parameters and MTP."""
  cfg = build(pretrain.Config, V3)
  return initial.shapes(Transformer(cfg.model))


def test_pieces_of_v3_are_whole_tiles_on_512_chips(published):
  """Multiples of the 8 rows of a TPU's tile among the 64 devices of fsdp.

  That is what travels farthest: between devices of `expert` smaller pieces
  of the other matrices are gathered before.
  """
  mesh = mesh_of(fsdp=64, expert=8)
  sharding.check_fits(mesh, published, "mesh")
  specs = sharding.state_specs(published)
  divided = 0
  for leaf, spec in zip(
    jax.tree.leaves(published), jax.tree.leaves(specs), strict=True
  ):
    for size, axes in zip(leaf.shape, spec, strict=True):
      if isinstance(axes, tuple):
        assert axes[0] == "fsdp"
        assert size % (64 * 8) == 0
        divided += 1
  assert divided > 20


def test_no_chip_of_512_holds_much_more_of_v3_than_its_share(published):
  """12 bytes a parameter (AdamW) would be 8 TB; each holds 1/512, 16 GB."""
  mesh = mesh_of(fsdp=64, expert=8)
  specs = sharding.state_specs(published)
  total = held = 0
  for leaf, spec in zip(
    jax.tree.leaves(published), jax.tree.leaves(specs), strict=True
  ):
    parts = 1
    for axes in spec:
      for axis in axes if isinstance(axes, tuple) else (axes,):
        parts *= mesh.sizes[axis] if axis else 1
    total += leaf.size
    held += leaf.size / parts
  assert held / (total / 512) < 1.05


def test_matrices_outside_of_the_experts_may_be_whole_there():
  specs = sharding.state_specs(mesh_shapes(), dense_over_expert=False)
  layers = specs["params"]["moe_layers"]
  assert layers["attn"]["out_proj"] == P(None, "tensor", ("fsdp", "context"))
  assert layers["ffn"]["router"] == P(None, ("fsdp", "context"), None)
  divided = sharding.state_specs(mesh_shapes())["params"]
  for name in ("gate_proj", "down_proj"):
    assert layers["ffn"][name] == divided["moe_layers"]["ffn"][name]
  assert specs["params"]["head"] == divided["head"]
  mesh = mesh_of(expert=8, tensor=1)
  sharding.check_fits(mesh, mesh_shapes(), "mesh")


def test_shardings_are_of_the_mesh():
  layout = lay(mesh_model("v3"), fsdp=2, expert=2, tensor=2)
  specs = sharding.state_specs(mesh_shapes())
  placed = sharding.shardings(layout.mesh, specs)
  assert jax.tree.structure(placed) == jax.tree.structure(mesh_shapes())
  gate = placed["params"]["moe_layers"]["ffn"]["gate_proj"]
  # [L, E, D, F] = [2, 8, 32, 16].
  assert gate.shard_shape((2, 8, 32, 16)) == (2, 4, 16, 8)
