"""The TPU's kernels compiled ahead of time, at the sizes of V2-Lite and V3."""

import json
import re

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

pytestmark = pytest.mark.tpu

CHIPS = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1")
HEADS = {"V2-Lite": 16, "V3": 128}
TOKENS = 4096


@pytest.fixture(params=CHIPS)
def device(request):
  pytest.importorskip("libtpu")
  from tools.ahead import describe_slice

  return describe_slice(request.param)[0]


def compiled(function, operands, device):
  place = jax.sharding.SingleDeviceSharding(device)
  operands = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), operands
  )
  with compiling_for("tpu", device.device_kind):
    # A function of its own, or jax takes the trace made for another chip.
    return jax.jit(lambda *x: function(*x)).lower(*operands).compile()


def estimates(program) -> dict[str, dict]:
  """What each kernel of the program states, by name."""
  found = {}
  for line in program.as_text().splitlines():
    if 'custom_call_target="tpu_custom_call"' in line:
      name = re.search(
        r"mla_(attention_forward|attention_backward|decode)", line
      )[0]
      cost = re.search(r'"cost_estimate":(\{[^}]*\})', line)[1]
      found[name] = {k: int(v) for k, v in json.loads(cost).items()}
  return found


def shape(*dims, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(dims, dtype)


def operands(t, s, n, dtype=jnp.bfloat16):
  """Of `mla_attention`, and places."""
  arrays = (
    shape(1, t, n, 128, dtype=dtype),
    shape(1, t, n, 64, dtype=dtype),
    shape(1, s, n, 128, dtype=dtype),
    shape(1, s, 64, dtype=dtype),
    shape(1, s, n, 128, dtype=dtype),
  )
  return arrays, [shape(1, x, dtype=jnp.int32) for x in (t, s, t, s)]


def attend(arrays, places):
  return mla_attention(*arrays, *places, scale=0.1, implementation="tpu")


def gradients(arrays, places):
  def loss(*arrays):
    out, lse = attend(arrays, places)
    return out.astype(jnp.float32).sum() + lse.sum()

  return jax.grad(loss, argnums=tuple(range(5)))(*arrays)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_attention_fits_and_states_its_bytes(heads, device):
  t, n = TOKENS, heads
  pairs = n * t * (t + 1) // 2
  # Each number once: of a token and head q, k, v and out, of a token the rope
  # key; a few more are places, and of a token and head maximum and sum.
  least = 2 * (n * (192 + 128 + 128 + 128) + 64) * t
  exact = least + (16 + 8 * n) * t
  found = estimates(compiled(attend, operands(t, t, n), device))
  assert found["mla_attention_forward"]["bytes_accessed"] == exact
  assert exact <= 1.1 * least
  found = estimates(compiled(gradients, operands(t, t, n), device))
  forward, backward = (
    found[f"mla_attention_{name}"] for name in ("forward", "backward")
  )
  assert forward["flops"] == pairs * 2 * (192 + 128)
  assert backward["flops"] == pairs * 2 * (3 * 192 + 2 * 128)
  # For its gradient, what rounding took from out as well, four bits a number.
  assert forward["bytes_accessed"] == exact + n * 128 * t // 2
  assert forward["bytes_accessed"] <= 1.1 * least
  least = 2 * (n * (2 * 192 + 4 * 128 + 128) + 64) * t
  groups = 2
  exact = least + (16 + 12 * n + groups * 4 * 64) * t
  assert backward["bytes_accessed"] == exact
  assert exact <= 1.1 * least


def test_several_spans_of_keys_are_counted_as_often_as_they_come(device):
  t, s, n = 8192, 32768, 16
  stated = estimates(compiled(attend, operands(t, s, n), device))
  tiles = 8192 // (
    256 if device.device_kind in ("TPU v6 lite", "TPU7x") else 1024
  )
  queries = 2 * n * (192 + 128) * t + 8 * t + 8 * n * t
  keys = n * tiles * (2 * (128 + 128 + 64) + 8) * s
  assert stated["mla_attention_forward"]["bytes_accessed"] == queries + keys
  stated = estimates(compiled(gradients, operands(t, s, n), device))
  # Four calls, of a quarter of the pairs each.
  flops = n * t * (s // 4) * 2 * (3 * 192 + 2 * 128)
  assert stated["mla_attention_backward"]["flops"] == flops


def test_float32_fits_too(device):
  found = estimates(
    compiled(gradients, operands(8192, 8192, 2, jnp.float32), device)
  )
  assert set(found) == {"mla_attention_forward", "mla_attention_backward"}


def caches(kind, rows, s):
  page = 256
  count, tokens = (rows * s // page, page) if "pages" in kind else (rows, s)
  cache = shape(count, 576, tokens)
  if "float8" in kind:
    cache = Float8Latents(
      shape(count, 512, tokens, dtype=jnp.float8_e4m3fn),
      shape(count, 4, tokens, dtype=jnp.float32),
      shape(count, 64, tokens),
    )
  if "pages" not in kind:
    return cache
  return PagedLatents(cache, shape(rows, s // page, dtype=jnp.int32))


@pytest.mark.parametrize(
  "kind", ["plain", "pages", "float8", "pages of float8"]
)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_decode_fits_and_states_its_bytes(heads, kind, device):
  rows, t, s = 4, 2, 8192
  places = [shape(rows, x, dtype=jnp.int32) for x in (t, s, t, s)]

  def decode(q, cache, places):
    return mla_decode(
      q, cache, *places, kv_lora_rank=512, scale=0.1, implementation="tpu"
    )

  q = shape(rows, t, heads, 576)
  program = compiled(decode, (q, caches(kind, rows, s), places), device)
  stated = estimates(program)["mla_decode"]["bytes_accessed"]
  token = 656 if "float8" in kind else 1152
  least = rows * (s * token + t * heads * 2 * (576 + 512))
  assert least <= stated <= 1.1 * least
  # Nothing of the cache's size is made on the way: it is read where it lies.
  temporary = program.memory_analysis().temp_size_in_bytes
  assert temporary < rows * s * token / 8 + 2**22


@pytest.mark.parametrize("kind", ["plain", "float8", "pages of float8"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_largest_block_fits(rows, kind, device):
  t, s = 8, 4096  # 1024 heads of tokens; one row is split over two cores
  places = [shape(rows, x, dtype=jnp.int32) for x in (t, s, t, s)]

  def decode(q, cache, places):
    return mla_decode(
      q, cache, *places, kv_lora_rank=512, scale=0.1, implementation="tpu"
    )

  q = shape(rows, t, 128, 576)
  program = compiled(decode, (q, caches(kind, rows, s), places), device)
  assert "mla_decode" in estimates(program)


@pytest.mark.parametrize(
  ("dtype", "t", "blocks"), [(jnp.bfloat16, 31, 4), (jnp.float32, 5, 2)]
)
def test_many_queries_of_v3_are_blocks_that_fit(dtype, t, blocks, device):
  s, itemsize = 4096, jnp.dtype(dtype).itemsize
  places = [shape(2, x, dtype=jnp.int32) for x in (t, s, t, s)]

  def decode(q, cache, places):
    return mla_decode(
      q, cache, *places, kv_lora_rank=512, scale=0.1, implementation="tpu"
    )

  q = shape(2, t, 128, 576, dtype=dtype)
  cache = shape(2, 576, s, dtype=dtype)
  program = compiled(decode, (q, cache, places), device)
  stated = estimates(program)["mla_decode"]["bytes_accessed"]
  vectors = 2 * t * 128 * (576 + 512) * itemsize
  least = vectors + blocks * 2 * s * 576 * itemsize
  assert least <= stated <= 1.05 * least


def test_the_largest_context_of_v3_compiles(device):
  s = 131072
  places = [shape(1, x, dtype=jnp.int32) for x in (1, s, 1, s)]

  def decode(q, cache, places):
    return mla_decode(
      q, cache, *places, kv_lora_rank=512, scale=0.1, implementation="tpu"
    )

  operands = (shape(1, 1, 128, 576), shape(1, 576, s), places)
  assert "mla_decode" in estimates(compiled(decode, operands, device))
