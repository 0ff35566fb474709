"""Every implementation of latent attention against the reference in float64.

Kernels are interpreted here. Those for GPUs take wider tiles than is quick, and
have files of their own; what they must meet is the same.
"""

import jax.numpy as jnp
import pytest

from tests.kernels.mla_attention import cases

IMPLEMENTATIONS = ("xla", "tpu")
# In every run; the other cases under --full.
QUICK = (
  ("packed rows of odd length", jnp.float32),
  ("huge logits", jnp.bfloat16),
  ("pages of float8", jnp.bfloat16),
  ("two queries a row", jnp.float32),
  ("blocks of heads and tokens", jnp.float32),
)


def by_case(table):
  return [
    pytest.param(
      name,
      dtype,
      id=f"{name}-{dtype.__name__}",
      marks=() if (name, dtype) in QUICK else pytest.mark.full,
    )
    for name in table
    for dtype in (jnp.float32, jnp.bfloat16)
  ]


@pytest.mark.parametrize(("name", "dtype"), by_case(cases.ATTENTION))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention(implementation, name, dtype):
  case = cases.ATTENTION[name]
  with cases.platform(implementation):
    cases.check(case.run(implementation, dtype), case, dtype)


@pytest.mark.parametrize(("name", "dtype"), by_case(cases.DECODE))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode(implementation, name, dtype):
  case = cases.DECODE[name]
  with cases.platform(implementation):
    cases.check(case.run(implementation, dtype), case, dtype)


# Tokens of a step and of a page: several pages a step, the last step partly
# filled; several tiles a page.
STEPS = [(384, 128, "paged"), (512, 128, "paged float8"), (128, 256, "paged")]


@pytest.mark.parametrize(("step", "page", "kind"), STEPS)
@pytest.mark.parametrize("splits", [1, pytest.param(2, marks=pytest.mark.full)])
def test_steps_of_several_pages_and_pages_of_several_steps(
  step, page, kind, splits
):
  case = cases.Decode((500, 1, 640), s=1024, kind=kind, page=page)
  with cases.platform("tpu", decode_keys=step, decode_splits=splits):
    got = case.run("tpu", jnp.float32)
  cases.check(got, case, jnp.float32)


STRICT = [
  ("packed rows of odd length", cases.ATTENTION),
  ("a part of the keys", cases.ATTENTION),
  ("rows of 0, 1, odd and all", cases.DECODE),
  ("pages of float8", cases.DECODE),
  ("blocks of heads and tokens", cases.DECODE),
]


@pytest.mark.full
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize(("name", "table"), STRICT)
def test_a_strict_interpreter_finds_nothing(name, table, dtype, capfd):
  """Races, reads out of bounds and of what was never written."""
  with cases.platform("tpu", cases.STRICT, decode_splits=3):
    got = table[name].run("tpu", dtype)
  cases.check(got, table[name], dtype)
  assert "RACE" not in capfd.readouterr().out


@pytest.mark.full
def test_a_step_repeats_bit_for_bit():
  case = cases.ATTENTION["packed rows of odd length"]
  with cases.platform("tpu"):
    first, second = (case.run("tpu", jnp.bfloat16) for _ in range(2))
  for key, value in first.items():
    assert value.tobytes() == second[key].tobytes(), key
