"""Every form of grouped-query attention against the loops of latent attention.

The loops and the rows are those of latent attention's; here N query heads
share M < N keys and values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.kernels import gqa_attention as kernel
from rlm.kernels.attention import attention_mask
from tests.fast_jit import fast_jit
from tests.kernels.mla_attention.reference_test import (
  loop,
  selected_keys,
  where,
)

B, T, S, N, M, H = 2, 6, 9, 6, 2, 4
SCALE = 0.37


def arrays():
  rng = np.random.default_rng(0)
  shapes = (B, T, N, H), (B, S, M, H), (B, S, M, H)
  return tuple((2 * rng.standard_normal(s)).astype(np.float32) for s in shapes)


def repeated(q, k, v):
  """Every query head with keys and values of its own: head n reads n // 3."""
  return q, np.repeat(k, N // M, axis=2), np.repeat(v, N // M, axis=2)


def by_form(form, selected=None):
  """(q, k, v) -> out, lse."""
  if form in ("whole", "chunks"):
    return lambda *a: kernel.gqa_attention(
      *a,
      *where(),
      selected,
      scale=SCALE,
      query_chunk=2 if form == "chunks" else 0,
    )
  attend = {
    "by head": kernel._attend_by_head,
    "batched": kernel._attend_batched,
  }[form]
  mask = attention_mask(*map(jnp.asarray, where()), selected)
  return lambda *a: attend(*a, mask, SCALE)


@pytest.mark.parametrize("selection", [False, True])
@pytest.mark.parametrize("form", ["by head", "batched", "whole", "chunks"])
def test_values(form, selection):
  selected = selected_keys() if selection else None
  out, lse = fast_jit(by_form(form, selected))(*arrays())
  want, want_lse = loop(*repeated(*arrays()), where(), selected, SCALE)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)


@functools.cache
def gradients(form):
  rng = np.random.default_rng(1)
  d_out = rng.standard_normal((B, T, N, H)).astype(np.float32)
  d_lse = rng.standard_normal((B, N, T)).astype(np.float32)

  def scalar(*a):
    out, lse = by_form(form)(*a)
    seen = jnp.isfinite(lse)
    return (out * d_out).sum() + jnp.where(seen, lse * d_lse, 0.0).sum()

  grads = fast_jit(jax.grad(scalar, argnums=range(3)))(*arrays())
  return jax.device_get(grads), d_out, d_lse


@pytest.mark.parametrize("form", ["by head", "batched", "chunks"])
def test_gradients_by_differences_of_the_loop(form):
  grads, d_out, d_lse = gradients(form)

  def scalar(a):
    out, lse = loop(*repeated(*a), where(), None, SCALE)
    return (out * d_out).sum() + (np.where(np.isinf(lse), 0, lse) * d_lse).sum()

  rng = np.random.default_rng(2)
  a = [x.astype(np.float64) for x in arrays()]
  for i, grad in enumerate(grads):
    direction = rng.standard_normal(a[i].shape)
    step = 1e-5
    sides = []
    for sign in (1, -1):
      moved = list(a)
      moved[i] = a[i] + sign * step * direction
      sides.append(scalar(moved))
    slope = (sides[0] - sides[1]) / (2 * step)
    # Differences are good to 1e-8, the float32 gradient to about 1e-6.
    np.testing.assert_allclose((grad * direction).sum(), slope, rtol=2e-5)


def test_decode_over_the_cache():
  q, k, v = arrays()
  cache = np.concatenate([k, v], axis=2).reshape(B, S, -1).swapaxes(1, 2)
  out, lse = fast_jit(
    lambda q, cache: kernel.gqa_decode(
      q, cache, *where(), num_key_value_heads=M, scale=SCALE
    )
  )(q, cache)
  want, want_lse = loop(*repeated(q, k, v), where(), None, SCALE)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_a_chunk_that_does_not_divide():
  with pytest.raises(ValueError, match="query_chunk=4 does not divide the 6"):
    kernel.gqa_attention(*arrays(), *where(), scale=SCALE, query_chunk=4)
