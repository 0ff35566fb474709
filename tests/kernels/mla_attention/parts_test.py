"""Parts of one softmax join to the whole."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.kernels.mla_attention import join_parts, mla_attention
from tests.kernels.mla_attention.reference_test import (
  SCALE,
  arrays,
  joined,
  loop,
  where,
)


def parts_of(cuts):
  q_positions, kv_positions, q_segments, kv_segments = where()
  q_nope, q_rope, k_nope, k_rope, v = arrays()
  results = []
  for start, stop in itertools.pairwise(cuts):
    keys = slice(start, stop)
    results.append(
      mla_attention(
        q_nope,
        q_rope,
        k_nope[:, keys],
        k_rope[:, keys],
        v[:, keys],
        q_positions,
        kv_positions[:, keys],
        q_segments,
        kv_segments[:, keys],
        scale=SCALE,
      )
    )
  outs, lses = zip(*results, strict=True)
  return jnp.stack(outs), jnp.stack(lses)


@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 1, 2, 6, 9)])
def test_values_are_those_of_all_keys(cuts):
  out, lse = join_parts(*parts_of(cuts))
  want, want_lse = loop(*joined(*arrays()), where(), None, SCALE)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_a_query_without_keys_stays_so_and_huge_parts_do_not_overflow():
  outs = jnp.array([2.0, 4.0]).reshape(2, 1, 1, 1, 1)
  nothing = jnp.full((2, 1, 1, 1), -jnp.inf)
  out, lse = join_parts(outs, nothing)
  assert out == 0 and jnp.isneginf(lse)
  out, lse = join_parts(outs, jnp.full((2, 1, 1, 1), 1e4))
  assert out == 3 and lse == pytest.approx(1e4 + np.log(2))
  one = jnp.array([-jnp.inf, 5.0]).reshape(2, 1, 1, 1)
  out, lse = join_parts(outs, one)
  assert out == 4 and lse == 5


def test_the_gradient_is_finite_where_a_part_is_empty():
  lses = jnp.array([-jnp.inf, 5.0]).reshape(2, 1, 1, 1)

  def scalar(outs):
    out, lse = join_parts(outs, lses)
    return out.sum() + lse.sum()

  np.testing.assert_array_equal(
    jax.grad(scalar)(jnp.ones((2, 1, 1, 1, 1))).ravel(), [0, 1]
  )
