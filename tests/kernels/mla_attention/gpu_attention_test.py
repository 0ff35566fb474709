"""What Hopper's kernels take, and what they say of the rest."""

import jax
import jax.numpy as jnp
import pytest

from rlm.kernels.backend import compiling_for
from rlm.kernels.mla_attention import gpu_attention, mla_attention
from tests.kernels.mla_attention import hopper


def shapes(h_nope=128, h_rope=64, h_v=128, dtype=jnp.bfloat16, v_dtype=None):
  n, t, s = 2, 5, 7
  sizes = ((t, n, h_nope), (t, n, h_rope), (s, n, h_nope), (s, h_rope))
  operands = [jax.ShapeDtypeStruct((1, *x), dtype) for x in sizes]
  return *operands, jax.ShapeDtypeStruct((1, s, n, h_v), v_dtype or dtype)


def obstacle(*operands, selected=None, chip=hopper.CHIP):
  with compiling_for("gpu", chip):
    return gpu_attention.attention_obstacle(*operands, selected, 0.1)


@pytest.mark.parametrize(
  "chip",
  (
    "NVIDIA H100 80GB HBM3",
    "NVIDIA H200",
    "NVIDIA H800",
    "NVIDIA H20",
    "NVIDIA GH200 480GB",
  ),
)
def test_hoppers_have_no_obstacle(chip):
  assert obstacle(*shapes(), chip=chip) is None
  assert obstacle(*shapes(dtype=jnp.float16), chip=chip) is None


@pytest.mark.parametrize("chip", ("NVIDIA A100-SXM4-80GB", "NVIDIA B200"))
def test_other_chips_are_refused_by_name(chip):
  assert chip in obstacle(*shapes(), chip=chip)


def test_operands_it_cannot_take_are_named():
  selected = jax.ShapeDtypeStruct((1, 5, 7), jnp.bool)
  assert "`selected`" in obstacle(*shapes(), selected=selected)
  assert "all float16" in obstacle(*shapes(dtype=jnp.float32))
  mixed = shapes(v_dtype=jnp.float16)
  assert "bfloat16, bfloat16, float16" in obstacle(*mixed)
  assert "128, 64 and 96; it takes multiples of 64" in obstacle(*shapes(h_v=96))


WIDTHS = (
  (64, 64, 64),
  (128, 64, 128),
  (128, 64, 64),
  (64, 128, 128),
  (192, 64, 64),
  (192, 128, 128),
)


@pytest.mark.full
@pytest.mark.parametrize("widths", WIDTHS)
def test_what_is_said_to_fit_fits(widths):
  # Lowering measures shared memory, and refuses what is over Hopper's.
  operands = shapes(*widths)
  places = [jax.ShapeDtypeStruct((1, x), jnp.int32) for x in (5, 7, 5, 7)]

  def gradients(*arguments):
    def total(*operands):
      out, lse = gpu_attention.attention(*operands, *arguments[5:], scale=0.1)
      return out.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(total, argnums=range(5))(*arguments[:5])

  reason = obstacle(*operands)
  if reason is None:
    hopper.lowered(gradients, *operands, *places)
  else:
    assert "bytes of shared memory" in reason
    with pytest.raises(ValueError, match="exceeds available shared memory"):
      hopper.lowered(gradients, *operands, *places)


def test_published_widths_fit_and_wide_ones_do_not():
  said = {widths: obstacle(*shapes(*widths)) for widths in WIDTHS}
  assert said[128, 64, 128] is None and said[64, 64, 64] is None
  assert said[192, 128, 128] is not None


def test_the_scale_must_be_positive():
  operands = [jnp.zeros(x.shape, x.dtype) for x in shapes()]
  places = [jnp.zeros((1, x), jnp.int32) for x in (5, 7, 5, 7)]
  with compiling_for("gpu", hopper.CHIP):
    with pytest.raises(
      NotImplementedError, match="scale=-0.1; it finds.*positive"
    ):
      mla_attention(*operands, *places, scale=-0.1, implementation="gpu")
