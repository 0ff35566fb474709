"""Which implementation is taken, and what is said where none can be."""

import jax
import jax.numpy as jnp
import pytest

from rlm.kernels.backend import compiling_for
from rlm.kernels.mla_attention import (
  Float8Latents,
  PagedLatents,
  mla_attention,
  mla_decode,
)
from rlm.kernels.mla_attention.choice import choose

S = jax.ShapeDtypeStruct


@pytest.mark.parametrize(
  ("platform", "reason", "want"),
  [
    ("cpu", None, "xla"),
    ("tpu", None, "tpu"),
    ("tpu", "odd", "xla"),
    ("gpu", None, "gpu"),
    ("gpu", "odd", "xla"),
  ],
)
def test_none_takes_the_kernel_of_the_platform(platform, reason, want):
  with compiling_for(platform, "some chip"):
    assert choose("door", None, lambda kernel: reason) == want


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="implementation='cuda' is unknown"):
    choose("door", "cuda", lambda kernel: None)


def test_another_platform_and_an_obstacle_are_named():
  with pytest.raises(NotImplementedError, match="programs are made for cpu"):
    choose("door", "tpu", lambda kernel: None)
  with (
    compiling_for("tpu", "TPU v5"),
    pytest.raises(NotImplementedError, match=r"cannot run: odd\. Take impl"),
  ):
    choose("door", "tpu", lambda kernel: "odd")


def attention(dtype=jnp.bfloat16, selected=None):
  operands = (
    S((1, 8, 2, 128), dtype),
    S((1, 8, 2, 64), dtype),
    S((1, 8, 2, 128), dtype),
    S((1, 8, 64), dtype),
    S((1, 8, 2, 128), dtype),
  )
  return jax.eval_shape(
    lambda *x: mla_attention(*x, scale=1.0, implementation="tpu"),
    *operands,
    *[S((1, 8), jnp.int32)] * 4,
    selected,
  )


def decode(kv, dtype=jnp.bfloat16, t=1, s=256):
  return jax.eval_shape(
    lambda *x: mla_decode(
      *x, kv_lora_rank=512, scale=1.0, implementation="tpu"
    ),
    S((2, t, 16, 576), dtype),
    kv,
    S((2, t), jnp.int32),
    S((2, s), jnp.int32),
    S((2, t), jnp.int32),
    S((2, s), jnp.int32),
  )


def test_the_kernels_for_tpu_say_what_they_cannot():
  def refused(match):
    return pytest.raises(NotImplementedError, match=match)

  plain = S((2, 576, 256), jnp.bfloat16)
  with compiling_for("tpu", "TPU v2"):
    for call in (attention, lambda: decode(plain)):
      with refused("'TPU v2' has no row"):
        call()
  with compiling_for("tpu", "TPU v5"):
    with refused("operands are float16, float16"):
      attention(jnp.float16)
    with refused("`selected` needs a mask"):
      attention(selected=S((1, 8, 8), jnp.bool_))
    with refused("the cache is float32, queries are bfloat16"):
      decode(S((2, 576, 256), jnp.float32))
    with refused("a row has room for 200 tokens"):
      decode(S((2, 576, 200), jnp.bfloat16), s=200)
    with refused("a page has room for 64 tokens"):
      pages = S((9, 576, 64), jnp.bfloat16)
      decode(PagedLatents(pages, S((2, 4), jnp.int32)))
    with refused("32 queries a row; it takes up to 31"):
      decode(plain, t=32)
    with refused("queries are float16"):
      decode(plain, dtype=jnp.float16)
    with refused("rope keys are float32"):
      decode(
        Float8Latents(
          S((2, 512, 256), jnp.float8_e4m3fn),
          S((2, 4, 256), jnp.float32),
          S((2, 64, 256), jnp.float32),
        )
      )
    assert [x.dtype for x in decode(plain)] == [jnp.bfloat16, jnp.float32]
    assert attention()[0].shape == (1, 8, 2, 128)
