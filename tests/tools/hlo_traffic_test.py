import jax
import jax.numpy as jnp
import pytest
from jax import P

from tests.tools import hlo_programs
from tests.tools.hlo_programs import array, cpu_mesh, manual, tpu_mesh, traffic
from tools import hlo_loops, hlo_program, hlo_traffic
from tools.hlo_groups import MeshAxes
from tools.hlo_program import HloError

ALL = ("a", "b")


def only(found):
  (collective,) = found.collectives
  return collective


def repeat(function, length):
  """The function, `length` times in a scan."""

  def scanned(x):
    step = lambda x, _: (jnp.sin(function(x)), None)  # noqa: E731
    return jax.lax.scan(step, x, None, length=length)[0]

  return scanned


ROWS, LANES = 64, 32  # of one device, in float32
BYTES = ROWS * LANES * 4


@pytest.mark.parametrize(
  ("name", "function", "axes", "n", "buffer", "factor"),
  [
    (
      "all-gather",
      lambda x: jax.lax.all_gather(x, "a", tiled=True)[:ROWS],
      ("a",),
      4,
      4 * BYTES,
      3 / 4,
    ),
    (
      "all-reduce",
      lambda x: jax.lax.psum(x, "b"),
      ("b",),
      2,
      BYTES,
      2 * 1 / 2,
    ),
    ("all-reduce", lambda x: jax.lax.psum(x, ALL), ALL, 8, BYTES, 2 * 7 / 8),
    (
      "reduce-scatter",
      lambda x: jnp.tile(
        jax.lax.psum_scatter(x, "a", scatter_dimension=0, tiled=True), (4, 1)
      ),
      ("a",),
      4,
      BYTES,
      3 / 4,
    ),
    (
      "all-to-all",
      lambda x: jax.lax.all_to_all(x, ALL, 0, 0, tiled=True),
      ALL,
      8,
      BYTES,
      7 / 8,
    ),
    (
      "collective-permute",
      lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 2), (2, 3), (3, 0)]),
      ("a",),
      4,
      BYTES,
      1,
    ),
  ],
)
def test_bytes_of_each_kind(name, function, axes, n, buffer, factor):
  mesh = cpu_mesh(a=4, b=2)
  x = array(mesh, (8 * ROWS, LANES), jnp.float32, ALL)
  c = only(traffic(mesh, manual(repeat(function, 5), mesh, P(ALL), P(ALL)), x))
  assert (c.kind, c.axes, c.group_size) == (name, axes, n)
  assert (c.executions, c.buffer, c.dtype) == (5, buffer, "f32")
  assert c.sent == pytest.approx(buffer * factor)
  assert c.total == pytest.approx(5 * buffer * factor)
  assert "shard_map" in c.op_name and "hlo_traffic_test.py" in c.source


def test_nested_loops_and_a_number_of_turns_from_outside():
  mesh = cpu_mesh(a=8)
  inner = repeat(lambda x: jax.lax.psum(x, "a"), 3)

  def step(x, n):
    return jax.lax.fori_loop(0, n[0], lambda _, x: jnp.cos(inner(x)), x)

  jitted = manual(step, mesh, (P("a"), P()), P("a"))
  x = array(mesh, (8 * ROWS, LANES), jnp.float32, "a")
  n = array(mesh, (1,), jnp.int32)
  with pytest.raises(HloError, match="depend on data"):
    traffic(mesh, jitted, x, n)
  c = only(traffic(mesh, jitted, x, n, default_trips=10))
  assert c.executions == 30
  assert c.total == pytest.approx(30 * BYTES * 2 * 7 / 8)


def test_a_collective_in_a_branch():
  mesh = cpu_mesh(a=8)

  def step(p, x):
    psum = lambda x: jax.lax.psum(x @ x, "a")  # noqa: E731
    return jax.lax.cond(p[0], psum, jnp.cos, x)

  jitted = manual(step, mesh, (P(), P()), P())
  p, x = array(mesh, (1,), bool), array(mesh, (16, 16), jnp.float32)
  assert only(traffic(mesh, jitted, p, x)).kind == "all-reduce"


def test_gspmd_weights_gathered_and_gradients_reduced():
  mesh = cpu_mesh(a=8)
  whole = jax.NamedSharding(mesh, P())

  def loss(w, x):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w, whole)
      return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer), x, w)[0].sum()

  w = array(mesh, (6, 64, 64), jnp.float32, None, "a")
  x = array(mesh, (256, 64), jnp.float32, "a")
  found = traffic(mesh, jax.jit(jax.grad(loss)), w, x)
  sums = found.by(lambda c: c.kind)
  weight = 64 * 64 * 4
  assert sums["all-gather"]["executions"] == 12  # forward and backward
  assert sums["all-gather"]["sent"] == pytest.approx(12 * weight * 7 / 8)
  reduced = sum(s["sent"] for k, s in sums.items() if k != "all-gather")
  # The CPU's compiler knows no reduce-scatter: it reduces, then slices.
  assert reduced >= 6 * weight * 2 * 7 / 8
  assert found.sent == pytest.approx(sum(s["sent"] for s in sums.values()))


def test_a_mesh_of_another_size():
  run = hlo_programs.follow(jax.jit(jnp.sin), jnp.zeros(3))
  with pytest.raises(HloError, match=r"for 1 devices, the mesh \{'a': 8\}"):
    hlo_traffic.read_traffic(run, MeshAxes(("a",), (8,)))


ALGORITHM = (
  '"collective_algorithm_config":{"emitter":"E","strategy":"%s",'
  '"debug":"%s{colors:%d phases:1}"}'
)
# As TPU prints them: a reduce-scatter is a fusion of an all-reduce and a slice;
# an asynchronous all-gather is in three fusions; one over a whole slice is an
# all-reduce of zeros and the own part.
TPU = """HloModule jit_step, num_partitions=4

%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add = bf16[] add(%a, %b)
}

%all-reduce-scatter (g: bf16[64,128]) -> bf16[16,128] {
  %g = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %ar = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%g), channel_id=1, \
replica_groups={{0,1,2,3}}, to_apply=%sum
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %own = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-slice(%ar, %id, %zero), \
dynamic_slice_sizes={16,128}
}

%start (w: bf16[14,128]) -> (bf16[14,128], bf16[56,128], u32[]) {
  %w = bf16[14,128]{1,0:T(8,128)(2,1)} parameter(0)
  %ag = bf16[56,128]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=2, \
replica_groups=[1,4]<=[4], dimensions={0}, backend_config={\
"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %go = (bf16[14,128]{1,0:T(8,128)(2,1)}, bf16[56,128]{1,0:T(8,128)(2,1)},\
 u32[]{:S(2)}) custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%done (w.1: bf16[14,128], r.1: bf16[56,128], f.1: u32[]) -> bf16[56,128] {
  %w.1 = bf16[14,128]{1,0:T(8,128)(2,1)} parameter(0)
  %r.1 = bf16[56,128]{1,0:T(8,128)(2,1)} parameter(1)
  %f.1 = u32[]{:S(2)} parameter(2)
  %ag.1 = bf16[56,128]{1,0:T(8,128)(2,1)} all-gather(%w.1), channel_id=2, \
replica_groups=[1,4]<=[4], dimensions={0}, backend_config={\
"async_collective_fusion_config":{"flag_start":"2","flag_end":"3"}}
  ROOT %stop = bf16[56,128]{1,0:T(8,128)(2,1)} custom-call(%w.1, %r.1, %ag.1, \
%f.1), custom_call_target="AsyncCollectiveDone"
}

%own-part (z: bf16[64,128], v: bf16[16,128]) -> bf16[64,128] {
  %z = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %v = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(1)
  %at = u32[] constant(0)
  ROOT %put = bf16[64,128]{1,0:T(8,128)(2,1)} dynamic-update-slice(%z, %v, \
%at, %at), metadata={op_name="weights"}
}

ENTRY %main (p: bf16[64,128], q: bf16[14,128], r: bf16[16,128]) -> bf16[] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[14,128]{1,0:T(8,128)(2,1)} parameter(1)
  %r = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(2)
  %rs = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%p), kind=kCustom, \
calls=%all-reduce-scatter, metadata={op_name="grad"}, backend_config={RING}
  %begin = (bf16[14,128]{1,0:T(8,128)(2,1)}, bf16[56,128]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) fusion(%q), kind=kCustom, calls=%start
  %e0 = bf16[14,128]{1,0:T(8,128)(2,1)} get-tuple-element(%begin), index=0
  %e1 = bf16[56,128]{1,0:T(8,128)(2,1)} get-tuple-element(%begin), index=1
  %e2 = u32[]{:S(2)} get-tuple-element(%begin), index=2
  %end = bf16[56,128]{1,0:T(8,128)(2,1)} fusion(%e0, %e1, %e2), kind=kCustom, \
calls=%done
  %zeros = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(), \
custom_call_target="AllocateBuffer"
  %mine = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%zeros, %r), kind=kLoop, \
calls=%own-part
  %whole = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%mine), channel_id=3, \
replica_groups=mesh['x'=4] {'x'}, to_apply=%sum, backend_config={ND}
  %sent = (bf16[14,128]{1,0}, u32[], token[]) send(%q, %token), channel_id=4
  %token = token[] after-all()
  ROOT %loss = bf16[] constant(0)
}
"""


def on_tpu():
  ring = ALGORITHM % ("StrategyRing", "StrategyRing", 1)
  nd = ALGORITHM % ("UniDirectionNDRingStrategy", "Uni", 6)
  text = TPU.replace("RING", ring).replace("ND}", nd + "}")
  run = hlo_loops.follow(hlo_program.parse(text))
  return hlo_traffic.read_traffic(run, MeshAxes(("x",), (4,)))


def test_collectives_in_fusions():
  found = {c.name: c for c in on_tpu().collectives}
  assert set(found) == {"rs", "begin", "whole"}
  rs, ag = found["rs"], found["begin"]
  assert (rs.kind, rs.form, rs.shard) == ("reduce-scatter", "fused", (16, 128))
  assert rs.sent == 64 * 128 * 2 * 3 / 4
  assert (rs.op_name, rs.rings, rs.in_tiles) == ("grad", 2, True)
  assert (ag.kind, ag.form, ag.in_tiles) == ("all-gather", "async", False)
  assert ag.total == 14 * 128 * 2 * 3  # once, though it stands in two


def test_an_all_reduce_that_stands_for_an_all_gather():
  whole = next(c for c in on_tpu().collectives if c.name == "whole")
  assert (whole.kind, whole.instead_of) == ("all-reduce", "all-gather")
  assert whole.op_name == "weights"
  assert whole.total == 2 * 64 * 128 * 2 * 3 / 4
  assert whole.needed == whole.total / 2
  assert (whole.shard, whole.rings) == ((16, 128), 6)


def test_what_is_not_counted_is_named():
  assert on_tpu().unknown == ["sent"]


@pytest.mark.tpu
def test_a_whole_slice_has_no_gather_or_scatter_of_its_own():
  # v5p, all three dimensions of the torus: both become all-reduces.
  def step(x):
    x = jax.lax.all_gather(x, ALL, tiled=True) * 2
    return jax.lax.psum_scatter(x, ALL, tiled=True)

  mesh = tpu_mesh("v5p:4x4x4", a=16, b=4)
  x = array(mesh, (64 * 16, 1024), jnp.bfloat16, ALL)
  found = traffic(mesh, manual(step, mesh, P(ALL), P(ALL)), x).collectives
  assert [c.kind for c in found] == ["all-reduce"] * 2
  assert {c.instead_of for c in found} == {"all-gather", "reduce-scatter"}
  assert all(c.rings == 6 for c in found)


@pytest.mark.tpu
@pytest.mark.parametrize(("rows", "padded"), [(16, 16), (14, 16)])
def test_tpu_gathers_and_scatters_over_a_plane(rows, padded):
  def step(x):
    x = jax.lax.all_gather(x, "a", tiled=True) * 2
    return jax.lax.psum_scatter(x, "a", tiled=True)

  mesh = tpu_mesh("v5p:8x8x8", a=64, b=8)
  x = array(mesh, (512 * rows, 1024), jnp.bfloat16, ALL)
  jitted = manual(repeat(step, 7), mesh, P(ALL), P(ALL))
  found = traffic(mesh, jitted, x).collectives
  by_kind = {c.kind: c for c in found}
  ag, rs = by_kind["all-gather"], by_kind["reduce-scatter"]
  assert ag.executions == rs.executions == 7
  assert ag.axes == rs.axes == ("a",)
  assert ag.sent == 63 * rows * 1024 * 2
  # 14 rows are padded to 16, and what lands at a neighbour is passed on.
  assert rs.sent == 63 * padded * 1024 * 2
  permuted = [c for c in found if c.kind == "collective-permute"]
  assert bool(permuted) == (rows != padded)
  assert len(found) == 2 + len(permuted)


@pytest.mark.tpu
@pytest.mark.parametrize("d", [7168, 8192])
def test_weights_sharded_over_the_whole_slice_are_reduced_in_full(d):
  mesh = tpu_mesh("v5p:8x8x8", a=512)
  whole = jax.NamedSharding(mesh, P())

  def loss(w, x):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w.astype(jnp.bfloat16), whole)
      return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

  w = array(mesh, (4, d, d), jnp.float32, None, "a")
  x = array(mesh, (512 * 256, d), jnp.bfloat16, "a")
  sharded = jax.NamedSharding(mesh, P(None, "a"))
  jitted = jax.jit(jax.grad(loss), out_shardings=sharded)
  found = traffic(mesh, jitted, w, x).collectives
  assert {c.kind for c in found} == {"all-reduce"}
  gradient = [c for c in found if c.instead_of == "reduce-scatter"]
  assert [c.executions for c in gradient] == [4]
  assert gradient[0].sent == pytest.approx(2 * d * d * 2 * 511 / 512)
  assert gradient[0].shard == (d // 512, d)
  assert gradient[0].in_tiles == (d == 8192)


@pytest.mark.tpu
def test_weights_sharded_over_a_plane_are_scattered():
  mesh = tpu_mesh("v5p:8x8x8", a=64, b=8)
  whole = jax.NamedSharding(mesh, P())

  def loss(w, x):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w.astype(jnp.bfloat16), whole)
      return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

  w = array(mesh, (4, 7168, 2048 * 7 // 2), jnp.float32, None, "a")
  x = array(mesh, (64 * 256, 7168), jnp.bfloat16, "a")
  sharded = jax.NamedSharding(mesh, P(None, "a"))
  jitted = jax.jit(jax.grad(loss), out_shardings=sharded)
  found = traffic(mesh, jitted, w, x).by(lambda c: c.kind)
  assert set(found) == {"all-gather", "reduce-scatter"}
  weight = 7168 * 7168 * 2
  assert found["reduce-scatter"]["sent"] == pytest.approx(
    4 * weight * 63 / 64, rel=1e-6
  )


@pytest.mark.tpu
def test_ragged_all_to_all_forward_and_backward():
  def step(x, sizes):
    sizes = sizes[0]
    offsets = jnp.cumsum(sizes) - sizes

    def exchange(x):
      out = jnp.zeros((1024, 512), x.dtype)
      return jax.lax.ragged_all_to_all(
        x, out, offsets, sizes, offsets, sizes, axis_name=ALL
      )

    y, pull = jax.vjp(exchange, x)
    return pull(y)[0]

  mesh = tpu_mesh("v5p:2x2x2", a=4, b=2)
  x = array(mesh, (8 * 512, 512), jnp.bfloat16, ALL)
  sizes = array(mesh, (8, 8), jnp.int32, ALL)
  jitted = manual(step, mesh, (P(ALL), P(ALL)), P(ALL))
  with pytest.raises(HloError, match="give ragged_rows"):
    traffic(mesh, jitted, x, sizes)
  found = traffic(mesh, jitted, x, sizes, ragged_rows={1: 256})
  ragged = [c for c in found.collectives if c.kind == "ragged-all-to-all"]
  assert [c.axes for c in ragged] == [ALL] * 2
  # 256 rows of 512 there and of 1024 back.
  assert [c.sent for c in ragged] == [256 * 512 * 2 * 7 / 8] * 2
