import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools import hlo_programs
from tools import hlo_loops, hlo_program
from tools.hlo_program import HloError

X = jnp.zeros((8, 8))


def counts(run, opcode):
  return sorted(
    e.count for e in run.executions if e.instruction.opcode == opcode
  )


def trips(run):
  return sorted((loop.trips, loop.entered) for loop in run.loops)


def test_scans_in_scans_multiply():
  def inner(c, _):
    return jnp.sin(c @ c), None

  def outer(c, _):
    c = jax.lax.scan(inner, c, None, length=7)[0]
    return jnp.cos(c @ c), None

  run = hlo_programs.follow(
    jax.jit(lambda x: jax.lax.scan(outer, x, None, length=3)[0]), X
  )
  assert trips(run) == [(3, 1), (7, 3)]
  assert counts(run, "dot") == [3, 21]
  assert not any(loop.dynamic for loop in run.loops)
  deepest = max(run.executions, key=lambda e: len(e.loops))
  assert len(deepest.loops) == 2


def loop_text(
  start="0", step="1", bound="6", direction="LT", op="add", extra=""
):
  """A loop as TPU prints it: no trip count; the bound comes in its state."""
  state = "(s32[], s32[], f32[8])"
  return f"""HloModule m

%body (s: {state}) -> {state} {{
  %s = {state} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %x = f32[8] get-tuple-element(%s), index=2
  %step = s32[] constant({step})
  %moved = s32[] copy(%i)
  %next = s32[] {op}(%moved, %step)
  %y = f32[8] negate(%x)
  ROOT %t = {state} tuple(%next, %n, %y)
}}

%condition (s.1: {state}) -> pred[] {{
  %s.1 = {state} parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n.1 = s32[] get-tuple-element(%s.1), index=1
  ROOT %go = pred[] compare(%i.1, %n.1), direction={direction}
}}

ENTRY %main (x.2: f32[8], n.2: s32[]) -> f32[8] {{
  %x.2 = f32[8] parameter(0)
  %n.2 = s32[] parameter(1)
  %start = s32[] constant({start})
  %begin = s32[] copy(%start)
  %fixed = s32[] constant({bound})
  %in = {state} tuple(%begin, {extra or "%fixed"}, %x.2)
  %loop = {state} while(%in), condition=%condition, body=%body
  ROOT %out = f32[8] get-tuple-element(%loop), index=2
}}
"""


@settings(max_examples=40)
@given(
  st.integers(-9, 9), st.integers(1, 4), st.integers(-9, 40), st.booleans()
)
def test_trips_are_read_from_condition_and_start(start, step, bound, up):
  text = loop_text(
    start=str(start if up else -start),
    step=str(step),
    bound=str(bound if up else -bound),
    direction="LT" if up else "GT",
    op="add" if up else "subtract",
  )
  run = hlo_loops.follow(hlo_program.parse(text))
  assert trips(run) == [(len(range(start, bound, step)), 1)]
  assert counts(run, "negate") == [t for t, _ in trips(run) if t]


def test_a_bound_from_outside_is_dynamic():
  module = hlo_program.parse(loop_text(extra="%n.2"))
  with pytest.raises(HloError, match="depend on data: loop"):
    hlo_loops.follow(module)
  run = hlo_loops.follow(module, default_trips=11)
  assert trips(run) == [(11, 1)] and run.loops[0].dynamic
  assert counts(run, "negate") == [11]
  run = hlo_loops.follow(module, default_trips=11, dynamic_trips={"loop": 4})
  assert counts(run, "negate") == [4]


def test_a_loop_that_never_ends_is_dynamic(monkeypatch):
  monkeypatch.setattr(hlo_loops, "_LONGEST", 100)
  module = hlo_program.parse(loop_text(direction="NE", bound="-1"))
  with pytest.raises(HloError, match="depend on data"):
    hlo_loops.follow(module)


def test_accumulation_over_a_number_that_is_an_argument():
  def step(x, n):
    inner = lambda c, _: (jnp.sin(c @ c), None)  # noqa: E731
    body = lambda _, c: jax.lax.scan(inner, c, None, length=5)[0]  # noqa: E731
    return jax.lax.fori_loop(0, n, body, x)

  run = hlo_programs.follow(
    jax.jit(step), X, jnp.int32(3), dynamic_trips={"while": 15}
  )
  assert [(loop.trips, loop.entered, loop.dynamic) for loop in run.loops] == [
    (15, 1, True),
    (5, 15, False),
  ]
  assert counts(run, "dot") == [75]


def test_a_stated_count_that_differs():
  text = loop_text().replace(
    "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
  )
  with pytest.raises(HloError, match="turns 6 times, but states 5"):
    hlo_loops.follow(hlo_program.parse(text))


def test_of_a_conditional_the_dearest_branch_counts():
  def f(p, x):
    return jax.lax.cond(p, lambda x: jnp.sin(x @ x @ x), jnp.cos, x)

  jitted = jax.jit(f)
  run = hlo_programs.follow(jitted, True, X)
  (branching,) = run.branchings
  assert counts(run, "dot") == [1, 1]
  assert len(branching.branches) == 2
  run = hlo_programs.follow(
    jitted, True, X, branches={branching.name: 1 - branching.taken}
  )
  assert counts(run, "dot") == []


def test_a_loop_in_the_branch_that_is_not_taken_is_left_out():
  def f(p, x):
    scan = lambda x: jax.lax.scan(  # noqa: E731
      lambda c, _: (jnp.sin(c @ c), None), x, None, length=9
    )[0]
    return jax.lax.cond(p, scan, jnp.cos, x)

  run = hlo_programs.follow(jax.jit(f), True, X)
  assert trips(run) == [(9, 1)]
  other = 1 - run.branchings[0].taken
  name = run.branchings[0].name
  run = hlo_programs.follow(jax.jit(f), True, X, branches={name: other})
  assert trips(run) == []


def test_instructions_of_a_fusion_know_it():
  run = hlo_programs.follow(jax.jit(lambda x: jnp.sin(x) * 2 + 1), X)
  inside = [e for e in run.executions if e.instruction.opcode == "sine"]
  assert inside and all(e.fused and e.caller.opcode == "fusion" for e in inside)


CALLS = """HloModule m

%offloaded (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0)
  ROOT %d = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8] parameter(0)
  %go = ((f32[8,8]), f32[8,8], u32[]) call-start(%p), \
async_execution_thread="sparsecore", to_apply=%offloaded
  ROOT %out = f32[8,8] call-done(%go)
}
"""


def test_work_on_another_core_is_followed():
  run = hlo_loops.follow(hlo_program.parse(CALLS))
  assert counts(run, "dot") == [1]
  (dot,) = [e for e in run.executions if e.instruction.name == "d"]
  assert not dot.fused and dot.caller.name == "go"


def test_work_in_a_call_that_is_not_understood():
  text = CALLS.replace("call-start(%p)", "custom-call(%p)")
  text = text.replace("((f32[8,8]), f32[8,8], u32[])", "f32[8,8]")
  text = text.replace("call-done(%go)", "negate(%go)")
  with pytest.raises(HloError, match="go, a custom-call, calls d, a dot"):
    hlo_loops.follow(hlo_program.parse(text))
