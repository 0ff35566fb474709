"""An output's rounding, kept beside it in four bits a number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.kernels.mla_attention.rounding import lost, restored


def taken_back(exact, tile):
  """`exact` [T, h] rounded, and restored from what each tile has lost."""
  exact = jnp.asarray(exact, jnp.float32)
  out = exact.astype(jnp.bfloat16)
  tiles = exact.reshape(-1, tile, exact.shape[1])
  packed = jax.vmap(lost)(tiles, tiles.astype(jnp.bfloat16))
  packed = packed.reshape(-1, exact.shape[1])
  assert packed.dtype == jnp.int8 and packed.size == exact.size // 2
  return np.asarray(restored(out, packed, tile)), np.asarray(out, np.float32)


@pytest.mark.parametrize("tile", (2, 8, 24))
def test_an_error_is_a_fourteenth_of_rounding_s(tile):
  rng = np.random.default_rng(0)
  exact = rng.standard_normal((24, 64)) * 2.0 ** rng.integers(-90, 90, (24, 64))
  exact = exact.astype(np.float32)
  got, out = taken_back(exact, tile)
  # Half a unit in the last place of `out`, in seven steps, rounded to one.
  unit = 2.0 ** (np.floor(np.log2(np.abs(out))) - 7)
  assert np.all(np.abs(exact - got) <= unit / 28 * (1 + 1e-5))
  # Of rounding alone, most are beyond it.
  assert np.mean(np.abs(exact - out) <= unit / 28) < 0.1


def test_ties_powers_of_two_and_zero():
  up, down = 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-8 - 2.0**-20
  exact = np.array([[0.0, 1.0, up], [-up, down, 2 - 2.0**-9]], np.float32)
  got, _ = taken_back(exact, 2)
  np.testing.assert_allclose(got, exact, rtol=2.0**-7 / 28, atol=0)
  assert got[0, 0] == 0 and got[0, 1] == 1  # what was exact stays so


def test_numbers_near_underflow_stay_as_they_were_rounded():
  exact = np.array([[2e-38, 2e-35], [3e-32, -4e-34]], np.float32)
  got, out = taken_back(exact, 2)
  np.testing.assert_array_equal(got, out)
