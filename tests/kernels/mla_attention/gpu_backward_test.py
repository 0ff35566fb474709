"""Hopper's backward kernels: interpreted, lowered; on a GPU if there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.kernels.mla_attention import gpu_backward, mla_attention
from tests.kernels.mla_attention import cases, hopper
from tests.kernels.mla_attention.gpu_forward_test import ALL

# Tiles of keys seen whole, on the diagonal, and of three documents; two heads,
# whose gradients to the rope key are added up.
SOME = cases.Attention(((200, 1, 49),), 120, 250)


@pytest.mark.full
def test_gradients():
  with hopper.interpreted():
    cases.check(SOME.run("gpu", jnp.bfloat16), SOME, jnp.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_of_all_cases(name):
  with hopper.interpreted():
    case = ALL[name]
    cases.check(case.run("gpu", jnp.bfloat16), case, jnp.bfloat16)


@pytest.mark.full
def test_five_heads_are_five_blocks_of_partial_sums():
  case = cases.Attention(((100,),), 100, 100, n=5)
  with hopper.interpreted():
    cases.check(case.run("gpu", jnp.bfloat16), case, jnp.bfloat16)


def check_the_same_twice(case):
  first, second = (case.run("gpu", jnp.bfloat16) for _ in range(2))
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], name)


@pytest.mark.full
def test_gradients_repeat_bit_for_bit():
  with hopper.interpreted():
    check_the_same_twice(SOME)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("name", ALL)
def test_gradients_on_a_gpu(name, dtype):
  cases.check(ALL[name].run("gpu", dtype), ALL[name], dtype)


@pytest.mark.gpu
def test_published_sizes_on_a_gpu(monkeypatch):
  monkeypatch.setattr(cases, "VALUE", 128)
  n = hopper.HEADS["V2-Lite"]
  case = cases.Attention(((1500,), (700, 1, 799)), 1000, 1500, n=n)
  got = case.run("gpu", jnp.bfloat16)
  want = case.run("xla", jnp.float32)
  for name, exact in want.items():
    x, seen = np.asarray(got[name], np.float32), np.isfinite(exact)
    np.testing.assert_array_equal(np.isfinite(x), seen, name)
    error = np.linalg.norm(x[seen] - exact[seen]) / np.linalg.norm(exact[seen])
    assert error < 0.01, (name, error)


@pytest.mark.gpu
def test_gradients_repeat_bit_for_bit_on_a_gpu():
  documents = ((1000, 1, 2000, 1095), (4096,), (513, 30))
  check_the_same_twice(cases.Attention(documents, 4096, 4096, n=8))


@pytest.mark.parametrize("model", hopper.HEADS)
def test_lowers_for_hopper_at_published_sizes(model):
  attend = functools.partial(mla_attention, scale=0.1, implementation="gpu")

  def gradients(*arguments):
    operands, places = arguments[:5], arguments[5:]

    def total(*operands):
      out, lse = attend(*operands, *places)
      return out.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(total, argnums=range(5))(*operands)

  program = hopper.lowered(gradients, *hopper.published(model, 2, 4096, 8192))
  assert program.count("@mosaic_gpu_v2") == 3


@pytest.mark.parametrize(
  "heads, most, want",
  [(128, 4, 4), (6, 4, 3), (5, 4, 1), (2, 4, 2), (1, 4, 1)],
)
def test_blocks_have_as_many_heads_as_divide_them(heads, most, want):
  assert gpu_backward.heads_of_a_block(heads, most) == want
