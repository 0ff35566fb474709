"""Every implementation of latent attention against the reference in float64."""

import jax.numpy as jnp
import pytest

from tests.kernels.mla_attention import cases

IMPLEMENTATIONS = ("xla", "tpu")
DTYPES = (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.ATTENTION)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention(implementation, name, dtype):
  case = cases.ATTENTION[name]
  with cases.platform(implementation):
    cases.check(case.run(implementation, dtype), case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.DECODE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode(implementation, name, dtype):
  case = cases.DECODE[name]
  with cases.platform(implementation):
    cases.check(case.run(implementation, dtype), case, dtype)
