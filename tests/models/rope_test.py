"""RoPE and YaRN: the published numbers, and rotation as complex numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlm.models import rope
from rlm.models.config import YarnScaling
from tests.models import families, reference

V3 = YarnScaling(
  factor=40.0,
  original_max_position_embeddings=4096,
  beta_fast=32.0,
  beta_slow=1.0,
  mscale=1.0,
  mscale_all_dim=1.0,
)
V2 = YarnScaling(
  factor=40.0,
  original_max_position_embeddings=4096,
  beta_fast=32.0,
  beta_slow=1.0,
  mscale=0.707,
  mscale_all_dim=0.707,
)


def test_plain_frequencies_are_a_geometric_series():
  f = rope.rope_frequencies(64, 10000.0, None)
  assert f.dtype == np.float32 and f.shape == (32,)
  want = [10000.0 ** (-i / 32) for i in range(32)]
  np.testing.assert_allclose(f, want, rtol=1e-6)


def test_yarn_ramp_of_v3_goes_from_pair_10_to_pair_23():
  plain = rope.rope_frequencies(64, 10000.0, None).astype(np.float64)
  ratio = rope.rope_frequencies(64, 10000.0, V3) / plain
  ramp = (1 - ratio) / (1 - 1 / 40)
  want = np.clip((np.arange(32) - 10) / 13, 0, 1)
  np.testing.assert_allclose(ramp, want, atol=1e-6)


@pytest.mark.parametrize("scaling", [None, families.YARN, V3])
def test_frequencies_are_those_of_the_reference(scaling):
  for dim, theta in ((8, 10.0), (64, 10000.0)):
    np.testing.assert_allclose(
      rope.rope_frequencies(dim, theta, scaling),
      reference.frequencies(dim, theta, scaling),
      rtol=1e-6,
    )


def test_a_ramp_of_no_width_is_a_step():
  # Both ends fall on pair 0: the released code widens the ramp by 0.001.
  narrow = YarnScaling(4.0, 2, 2.0, 1.0, 1.0, 1.0)
  plain = rope.rope_frequencies(4, 10000.0, None)
  f = rope.rope_frequencies(4, 10000.0, narrow)
  np.testing.assert_allclose(f, plain * np.array([1, 0.25]), rtol=1e-6)


def test_published_magnitudes_and_scales():
  assert rope.yarn_mscale(40.0, 1.0) == pytest.approx(1.36889, abs=5e-6)
  assert rope.yarn_mscale(40.0, 1.0) ** 2 == pytest.approx(1.87385, abs=5e-6)
  assert rope.yarn_mscale(40.0, 0.707) == pytest.approx(1.26080, abs=5e-6)
  assert rope.yarn_mscale(1.0, 1.0) == 1.0
  assert rope.softmax_scale(192, V3) == pytest.approx(0.135234, abs=5e-7)
  assert rope.softmax_scale(192, V2) == pytest.approx(0.114721, abs=5e-7)
  assert rope.softmax_scale(192, None) == pytest.approx(0.0721688, abs=5e-8)


def test_magnitude_on_cos_and_sin_is_a_ratio():
  assert rope.rope_magnitude(V3) == rope.rope_magnitude(V2) == 1.0
  want = (0.08 * math.log(4) + 1) / (0.12 * math.log(4) + 1)
  assert rope.rope_magnitude(families.YARN) == pytest.approx(want)
  zero = jnp.zeros((1, 1), jnp.int32)
  cos, sin = rope.rope_rotations(zero, 8, 10.0, families.YARN)
  np.testing.assert_allclose(cos, np.full((1, 1, 4), want), rtol=1e-6)
  assert not sin.any()


def test_pairs_are_neighbours_turned_as_complex_numbers():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 3, 2, 8)).astype(np.float32)
  positions = np.array([[0, 1, 2], [9, 0, 163839]], np.int32)
  cos, sin = rope.rope_rotations(positions, 8, 10.0, None)
  turned = rope.apply_rope(jnp.asarray(x), cos, sin)
  freqs = reference.frequencies(8, 10.0, None)
  for index in np.ndindex(2, 3, 2):
    want = reference.rotate(x[index], positions[index[:2]], freqs)
    # A float32 angle of 1e5 radians is good to 4e-3.
    atol = 2e-2 if positions[index[:2]] > 1000 else 1e-5
    np.testing.assert_allclose(turned[index], want, atol=atol)
  # Without the axis of heads: the key.
  key = rope.apply_rope(jnp.asarray(x[:, :, 0]), cos, sin)
  np.testing.assert_array_equal(key, turned[:, :, 0])


def test_products_depend_on_the_distance_alone():
  rng = np.random.default_rng(1)
  q, k = rng.standard_normal((2, 1, 1, 8)).astype(np.float32)

  def product(m, n):
    def turn(x, at):
      at = jnp.full((1, 1), at, jnp.int32)
      return rope.apply_rope(x[None], *rope.rope_rotations(at, 8, 10.0, None))

    return float((turn(q, m) * turn(k, n)).sum())

  assert product(7, 3) == pytest.approx(product(14, 10), abs=1e-5)
  assert product(7, 3) != pytest.approx(product(3, 7), abs=1e-2)
  assert product(5, 5) == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_bfloat16_is_turned_in_float32():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((1, 3, 8)), jnp.bfloat16)
  positions = jnp.array([[3, 500, 800]], jnp.int32)
  rotations = rope.rope_rotations(positions, 8, 10.0, None)
  turned = rope.apply_rope(x, *rotations)
  assert turned.dtype == jnp.bfloat16
  exact = rope.apply_rope(x.astype(jnp.float32), *rotations)
  np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))
