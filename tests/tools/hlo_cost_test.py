import jax
import jax.numpy as jnp
import pytest

from tests.tools import hlo_programs
from tests.tools.hlo_programs import array, manual, tpu_mesh
from tools import hlo_cost, hlo_loops, hlo_program, hlo_work
from tools.hlo_program import HloError


def entry_of(text):
  module = hlo_program.parse(text)
  return module, module[module.entry]


def one(opcode_line, parameters, called=""):
  """A program of one instruction, `%i = ...`, over parameters %p0, %p1, ..."""
  lines = "".join(
    f"  %p{k} = {shape} parameter({k})\n" for k, shape in enumerate(parameters)
  )
  types = ", ".join(f"p{k}: x" for k in range(len(parameters)))
  return entry_of(
    f"HloModule m\n\n{called}\nENTRY %main ({types}) -> x {{\n{lines}"
    f"  ROOT %i = {opcode_line}\n}}\n"
  )


def flops_of(opcode_line, *parameters, **how):
  _, entry = one(opcode_line, parameters)
  return hlo_cost.instruction_flops(entry, entry["i"], **how)


def bytes_of(opcode_line, *parameters, called="", **how):
  module, entry = one(opcode_line, parameters, called)
  return hlo_cost.hbm_bytes(module, entry, entry["i"], **how)


def test_a_dot_with_batch_dimensions():
  flops = flops_of(
    "f32[3,4,6] dot(%p0, %p1), lhs_batch_dims={0}, rhs_batch_dims={0},"
    " lhs_contracting_dims={2}, rhs_contracting_dims={1}",
    "bf16[3,4,5]",
    "bf16[3,5,6]",
  )
  assert flops.nominal == flops.executed == 2 * 3 * 4 * 5 * 6
  assert (flops.kind, flops.dtype) == ("dot", "bf16")


@pytest.mark.parametrize(
  ("line", "parameters", "flops"),
  [
    (  # a dot, as TPU writes it
      "bf16[128,1024] convolution(%p0, %p1), dim_labels=bf_io->bf",
      ("bf16[128,512]", "bf16[512,1024]"),
      2 * 128 * 512 * 1024,
    ),
    (  # a batched one: of 8 x 8 pairs, only those of equal index meet
      "bf16[8,64,32] convolution(%p0, %p1), window={size=8 stride=7"
      " lhs_dilate=8}, dim_labels=0fb_0io->0bf",
      ("bf16[8,16,64]", "bf16[8,16,32]"),
      2 * 8 * 64 * 16 * 32,
    ),
    (  # a window of 3 over 10, padded by 1 on both sides: 28 of 30 meet
      "f32[2,10,7] convolution(%p0, %p1), window={size=3 pad=1_1},"
      " dim_labels=b0f_0io->b0f",
      ("f32[2,10,5]", "f32[3,5,7]"),
      2 * 2 * 28 * 5 * 7,
    ),
    (
      "f32[2,10,6] convolution(%p0, %p1), window={size=3 pad=1_1},"
      " dim_labels=b0f_0io->b0f, feature_group_count=6",
      ("f32[2,10,6]", "f32[3,1,6]"),
      2 * 2 * 28 * 1 * 6,
    ),
  ],
)
def test_convolutions(line, parameters, flops):
  assert flops_of(line, *parameters).nominal == flops


def test_convolutions_as_xla_counts_them():
  def f(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (2, 1), ((1, 2), (0, 3)), lhs_dilation=(1, 2), rhs_dilation=(2, 1)
    )

  arguments = jnp.zeros((2, 4, 9, 8)), jnp.zeros((6, 4, 3, 2))
  compiled = jax.jit(f).lower(*arguments).compile()
  module = hlo_program.parse(compiled.as_text())
  counted = [
    hlo_cost.instruction_flops(c, i)
    for c in module.computations.values()
    for i in c
    if i.opcode == "convolution"
  ]
  assert [f.nominal for f in counted] == [compiled.cost_analysis()["flops"]]


def test_what_is_no_product():
  assert flops_of("f32[8] negate(%p0)", "f32[8]") is None
  with pytest.raises(HloError, match="not lowered"):
    flops_of("f32[8,8] ragged-dot(%p0, %p0)", "f32[8,8]")
  with pytest.raises(HloError, match="dim_labels"):
    flops_of("f32[8,8] convolution(%p0, %p0)", "f32[8,8]")


def kernel(config="", attributes="", name="i"):
  return (
    'f32[1024,64] custom-call(%p0, %p1), custom_call_target="tpu_custom_call"'
    f"{attributes}, backend_config={{{config}}}"
  )


def test_kernels_state_their_operations_or_are_unknown():
  parameters = "bf16[1024,256]", "bf16[4,256,64]"
  stated = '"custom_call_config":{"cost_estimate":{"flops":"123"}}'
  assert flops_of(kernel(stated), *parameters).executed == 123
  assert flops_of(kernel(stated), *parameters).kind == "kernel"
  silent = flops_of(kernel(), *parameters)
  assert (silent.kind, silent.nominal) == ("unknown", 0)


def test_ragged_products_count_the_rows_in_use():
  tiling = ', frontend_attributes={ragged_dot_tiling="128,256,32"}'
  parameters = "bf16[1024,256]", "bf16[4,256,64]"
  whole = flops_of(kernel(attributes=tiling), *parameters)
  assert whole.kind == "ragged"
  assert whole.nominal == whole.executed == 2 * 1024 * 256 * 64
  part = flops_of(kernel(attributes=tiling), *parameters, ragged_rows=300)
  assert part.executed == pytest.approx(2 * 300 * 256 * 64)
  # Three tiles of 128 rows, and one more where each of 3 groups begins.
  assert part.at_most == 2 * 6 * 128 * 256 * 64
  # Rows are read for each of the two tiles of columns, matrices once.
  bytes_ = bytes_of(kernel(attributes=tiling), *parameters, ragged_rows=512)
  assert bytes_ == 2 * 512 * 256 * 2 + 4 * 256 * 64 * 2 + 512 * 64 * 4
  cut = tiling.replace("128,256,32", "128,128,64")
  bytes_ = bytes_of(kernel(attributes=cut), *parameters, ragged_rows=1024)
  # Eight tiles of rows in four groups: matrices are read twice.
  assert bytes_ == 1024 * 256 * 2 + 2 * 4 * 256 * 64 * 2 + 1024 * 64 * 4


def test_gradients_of_ragged_products_count_the_rows_in_use():
  line = kernel(
    attributes=', frontend_attributes={grouped_matmul_tiles="128,128,64"}'
  ).replace("f32[1024,64]", "f32[4,256,64]")
  parameters = "bf16[1024,256]", "bf16[1024,64]"
  part = flops_of(line, *parameters, ragged_rows=300)
  assert part.kind == "ragged"
  assert part.nominal == 2 * 1024 * 256 * 64
  assert part.executed == pytest.approx(2 * 300 * 256 * 64)
  assert part.at_most == 2 * 6 * 128 * 256 * 64
  # One tile of columns, two of depth.
  bytes_ = bytes_of(line, *parameters, ragged_rows=512)
  assert bytes_ == 512 * 256 * 2 + 2 * 512 * 64 * 2 + 4 * 256 * 64 * 4


@pytest.mark.parametrize(
  ("line", "parameters", "size"),
  [
    ("f32[8,128] add(%p0, %p1)", ("f32[8,128]",) * 2, 3 * 4096),
    ("f32[128,8] bitcast(%p0)", ("f32[8,128]",), 0),
    ("f32[1,128] dynamic-slice(%p0, %p1, %p1)", ("f32[9,128]", "s32[]"), 1024),
    (
      "f32[9,128] dynamic-update-slice(%p0, %p1, %p2, %p2)",
      ("f32[9,128]", "f32[1,128]", "s32[]"),
      1024,
    ),
    ("f32[3,128] gather(%p0, %p1)", ("f32[99,128]", "s32[3]"), 2 * 1536 + 12),
    ("f32[8,128]{1,0:S(1)} negate(%p0)", ("f32[8,128]",), 4096),
    (
      "(f32[8,128]{1,0:S(1)}, f32[8,128], u32[]{:S(2)}) copy-start(%p0)",
      ("f32[8,128]",),
      4096,
    ),
    ("bf16[14,128]{1,0:T(8,128)(2,1)} copy(%p0)", ("f32[8,128]",), 8192),
  ],
)
def test_hbm_bytes(line, parameters, size):
  assert bytes_of(line, *parameters) == size


def test_a_ragged_exchange_moves_the_rows_in_use():
  line = "bf16[999,128] ragged-all-to-all(%p0, %p1, %p2, %p2, %p2, %p2)"
  parameters = "bf16[500,128]", "bf16[999,128]", "s32[8]"
  assert bytes_of(line, *parameters, ragged_rows=100) == 2 * 100 * 256
  assert bytes_of(line, *parameters) == 2 * 500 * 256


def test_asynchronous_forms_count_where_they_start():
  shape = "((f32[99,128]), f32[3,128], u32[]{:S(2)})"
  line = f"{shape} slice-start(%p0), slice={{[0:3], [0:128]}}"
  assert bytes_of(line, "f32[99,128]") == 2 * 3 * 512
  assert bytes_of("f32[3,128] slice-done(%p0)", shape) == 0
  with pytest.raises(HloError, match=r"a slice-start that yields f32\[3\]"):
    bytes_of("f32[3] slice-start(%p0)", "f32[9]")


FUSED = """%fused (stack: f32[9,128], at: s32[], row: f32[128]) -> f32[9,128] {
  %stack = f32[9,128] parameter(0)
  %at = s32[] parameter(1)
  %row = f32[128] parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,128] dynamic-slice(%stack, %at, %zero)
  %flat = f32[1,128] bitcast(%row)
  %new = f32[1,128] add(%old, %flat)
  ROOT %put = f32[9,128] dynamic-update-slice(%stack, %new, %at, %zero)
}
"""


def test_a_fusion_moves_what_it_slices_and_updates():
  line = "f32[9,128] fusion(%p0, %p1, %p2), kind=kLoop, calls=%fused"
  parameters = "f32[9,128]", "s32[]", "f32[128]"
  assert bytes_of(line, *parameters, called=FUSED) == 3 * 512 + 4


def test_a_masked_product_without_its_mask():
  line = (
    "f32[9,128] fusion(%p0, %p1, %p2), kind=kLoop, calls=%fused,"
    ' backend_config={"mask_aggregator_config":{"iteration_skipper_mode":'
    '"ITERATION_SKIPPER_MODE_ITERATION_INDICES"}}'
  )
  module, entry = one(line, ("f32[9,128]", "s32[]", "f32[128]"), FUSED)
  assert hlo_cost.skips_masked(entry["i"])
  flops = hlo_cost.Flops("convolution", 8.0, 8.0, 8.0, "f32")
  with pytest.raises(HloError, match="has no mask"):
    hlo_cost.masked_flops(module["fused"], entry["i"], flops, None)


@pytest.mark.tpu
def test_tpu_ragged_dots_skip_the_rows_in_no_group():
  rows, depth, columns, groups = 4096, 1024, 512, 8

  def step(x, w, sizes):
    y, pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)
    return pull(jnp.sin(y))

  mesh = tpu_mesh("v5p:2x2x1", a=4)
  arguments = (
    array(mesh, (rows, depth), jnp.bfloat16),
    array(mesh, (groups, depth, columns), jnp.bfloat16),
    array(mesh, (groups,), jnp.int32),
  )
  p = jax.P()
  run = hlo_programs.follow(manual(step, mesh, (p, p, p), (p, p)), *arguments)
  product = 2 * rows * depth * columns
  work = hlo_work.count_work(run)
  assert not work.unknown
  # The gradient by the matrices is a product over all pairs of row and group,
  # of which it skips the tiles without any; the compiler counts them all.
  assert work.flops_nominal == (2 + groups) * product
  assert work.flops == 3 * product
  assert work.flops_by_kind == {"ragged": 2 * product, "masked": product}
  half = hlo_work.count_work(run, ragged_rows=rows / 2)
  assert half.flops == 1.5 * product
  assert half.flops < half.flops_at_most < 3 * product  # 8 tiles of rows
  assert half.hbm_bytes < work.hbm_bytes


@pytest.mark.tpu
def test_tpu_scans_count_every_turn():
  def step(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  mesh = tpu_mesh("v5e:2x2", a=4)
  x = array(mesh, (512, 1024), jnp.bfloat16, "a")
  w = array(mesh, (12, 1024, 1024), jnp.bfloat16)
  compiled = jax.jit(step).lower(x, w).compile()
  run = hlo_loops.follow(hlo_program.parse(compiled.as_text()))
  work = hlo_work.count_work(run)
  assert work.flops == 12 * 2 * 128 * 1024 * 1024
  assert compiled.cost_analysis()["flops"] < work.flops / 2
  weights = 12 * 1024 * 1024 * 2
  assert weights <= work.hbm_bytes < 1.5 * weights
