"""Caches in float8 and in pages."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlm.kernels.mla_attention import (
  Float8Latents,
  PagedLatents,
  quantize_latents,
)
from rlm.kernels.mla_attention.caches import plain, shape_of

C, R, S = 256, 16, 12


def latents(rows=3):
  rng = np.random.default_rng(0)
  return jnp.asarray(3 * rng.standard_normal((rows, C + R, S)), jnp.bfloat16)


def test_float8_is_within_its_rounding():
  kv = latents()
  cache = quantize_latents(kv, kv_lora_rank=C)
  assert cache.latent.dtype == jnp.float8_e4m3fn
  assert cache.scales.shape == (3, C // 128, S)
  back = np.asarray(plain(cache, jnp.float32))
  exact = np.asarray(kv, np.float32)
  np.testing.assert_array_equal(back[:, C:], exact[:, C:])  # rope keys stay
  # e4m3 keeps 3 bits: half of 2^-3 of a number, or of the least one times 448.
  groups = exact[:, :C].reshape(3, -1, 128, S)
  largest = abs(groups).max(axis=2, keepdims=True)
  limit = np.maximum(abs(groups) / 16, largest / 448 * 2**-10)
  error = abs(back[:, :C].reshape(groups.shape) - groups)
  assert (error <= limit * 1.001).all()


def test_the_largest_number_is_exact_and_zeros_stay_zeros():
  kv = jnp.zeros((1, C + R, S)).at[0, 7, 3].set(123.5)
  back = plain(quantize_latents(kv, kv_lora_rank=C), jnp.float32)
  np.testing.assert_allclose(back[0, 7, 3], 123.5, rtol=1e-6)
  assert not back.at[0, 7, 3].set(0).any()


def test_a_published_token_takes_656_bytes():
  cache = quantize_latents(
    jnp.zeros((1, 512 + 64, 128), jnp.bfloat16), kv_lora_rank=512
  )
  arrays = (cache.latent, cache.scales, cache.k_rope)
  assert sum(x.nbytes for x in arrays) == 656 * 128


def test_odd_ranks_are_refused():
  with pytest.raises(ValueError, match="kv_lora_rank=100 is not a multiple"):
    quantize_latents(latents(), kv_lora_rank=100)


@pytest.mark.parametrize("float8", [False, True])
def test_pages_are_rows_in_another_order(float8):
  kv = latents()
  pages = jnp.moveaxis(kv.reshape(3, C + R, 3, 4), 2, 1).reshape(9, C + R, 4)
  order = np.random.default_rng(1).permutation(9)
  table = jnp.asarray(np.argsort(order).reshape(3, 3), jnp.int32)
  pages = pages[order]
  if float8:
    pages = quantize_latents(pages, kv_lora_rank=C)
    kv = plain(quantize_latents(kv, kv_lora_rank=C), jnp.bfloat16)
  cache = PagedLatents(pages, table)
  np.testing.assert_array_equal(plain(cache, jnp.bfloat16), kv)
  assert shape_of(cache) == shape_of(kv) == (3, C + R, S)


def test_shapes_of_float8():
  cache = quantize_latents(latents(), kv_lora_rank=C)
  assert isinstance(cache, Float8Latents)
  assert shape_of(cache) == (3, C + R, S)
