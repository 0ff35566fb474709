"""Hopper's decode kernel: interpreted, lowered; on a GPU if there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.kernels.backend import compiling_for
from rlm.kernels.mla_attention import (
  Float8Latents,
  PagedLatents,
  gpu_decode,
  mla_decode,
)
from rlm.kernels.mla_attention.gpu_decode_block import KEYS
from rlm.kernels.mla_attention.tiles import gpu_tiles
from tests.kernels.mla_attention import cases, hopper

Case = cases.Decode
decode = functools.partial(mla_decode, scale=0.1, implementation="gpu")


class Wide(cases.Decode):
  """Latents of two float8 groups."""

  WIDTH = 256


class Published(cases.Decode):
  """DeepSeek-V3's latents, of which a warpgroup has more than one product."""

  WIDTH = 512


# Few blocks, for the interpreter of jax 0.10 compiles each of them anew; with
# into how many parts rows are split.
SOME = {
  # One tile, so a part has none; and three in two parts.
  "parts": (Case((60, 301), t=2, n=5, segments=True), 2),
  "heads that fill no block": (Case((130,), n=40), 1),
  "pages of float8": (Wide((0, 200), kind="paged float8", t=3, n=4), 1),
}
ALL = cases.DECODE | {
  "two documents, two queries": Case((500, 257), t=2, segments=True),
  "four queries of many heads": Case((200, 65), t=4, n=40),
  "float8, many heads": Wide((200,), n=65, kind="float8"),
  "pages, selected keys": Case((512,), kind="paged", selected=0.02, t=2),
  "float8, huge logits": Case((300,), kind="float8", size=8.0),
  "published, few heads": Published((1, 200)),
  "published, many heads": Published((200,), n=128),
  "published, float8": Published((200,), n=64, kind="float8"),
}


@pytest.fixture
def parts(monkeypatch):
  """Sets how many parts rows are split into."""
  return lambda n: monkeypatch.setattr(gpu_decode, "splits_of", lambda *_: n)


def check_interpreted(case, dtype):
  with hopper.interpreted():
    got = case.run("gpu", dtype)
  cases.check(got, case, dtype)


@pytest.mark.parametrize(
  "name",
  [
    "heads that fill no block",
    pytest.param("parts", marks=pytest.mark.full),
    pytest.param("pages of float8", marks=pytest.mark.full),
  ],
)
def test_values(name, parts):
  case, number = SOME[name]
  parts(number)
  check_interpreted(case, jnp.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("name", ALL)
def test_values_of_all_cases(name, dtype, parts):
  parts(3)
  check_interpreted(ALL[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("name", SOME | ALL)
def test_values_on_a_gpu(name, dtype):
  case = SOME[name][0] if name in SOME else ALL[name]
  cases.check(case.run("gpu", dtype), case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ("plain", "paged", "float8"))
def test_a_batch_of_512_on_a_gpu(kind):
  lengths = np.random.default_rng(3).integers(0, 513, 512)
  case = Case(tuple(lengths.tolist()), kind=kind)
  cases.check(case.run("gpu", jnp.bfloat16), case, jnp.bfloat16)


def shapes(b, t, n, s, *, c=512, r=64, page=0, float8=False, dtype="bfloat16"):
  """Of `mla_decode`'s operands; DeepSeek-V3's C and R."""
  room = page or s
  lead = b * s // room
  of = jax.ShapeDtypeStruct
  kv = of((lead, c + r, room), dtype)
  if float8:
    kv = Float8Latents(
      of((lead, c, room), jnp.float8_e4m3fn),
      of((lead, c // 128, room), jnp.float32),
      of((lead, r, room), dtype),
    )
  if page:
    kv = PagedLatents(kv, of((b, s // page), jnp.int32))
  places = ((b, t), (b, s), (b, t), (b, s))
  return of((b, t, n, c + r), dtype), kv, *(of(x, jnp.int32) for x in places)


PUBLISHED = (
  dict(b=128, t=1, n=16, s=4096),
  dict(b=1, t=2, n=128, s=65536),
  dict(b=4, t=1, n=128, s=4096, page=64),
  dict(b=4, t=1, n=16, s=4096, float8=True),
  dict(b=4, t=2, n=128, s=4096, page=64, float8=True),
)


@pytest.mark.parametrize("sizes", PUBLISHED, ids=str)
def test_lowers_for_hopper_at_published_sizes(sizes):
  function = functools.partial(decode, kv_lora_rank=512)
  assert hopper.lowered(function, *shapes(**sizes)).count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize("float8", (False, True))
@pytest.mark.parametrize("rope", (16, 48, 64))
def test_shared_memory_is_foretold(rope, float8, monkeypatch):
  operands = shapes(1, 1, 16, 512, r=rope, float8=float8)
  with compiling_for("gpu", hopper.CHIP):
    fits = gpu_decode._sizes(*operands[:2], 512, 0.1, gpu_tiles())
    assert fits.stages == 2
    monkeypatch.setattr(gpu_decode, "SMEM_BYTES", 2**30)
    most = gpu_decode._sizes(*operands[:2], 512, 0.1, gpu_tiles())
  assert most.stages == 4
  taken = gpu_decode.smem_bytes(most)
  with pytest.raises(ValueError, match=f"smem_bytes={taken} > "):
    hopper.lowered(functools.partial(decode, kv_lora_rank=512), *operands)


REFUSED = {
  "C is 96; it takes multiples of 64 to 512": dict(c=96),
  "C is 576; it takes": dict(c=576),
  "C is 192; it takes multiples of 128": dict(c=192, float8=True),
  "R is 24; it takes multiples of 16": dict(r=24),
  "a row has 33 query tokens; it takes 32": dict(t=33),
  "a row of the cache has room for 4000 tokens": dict(s=4000),
  "a page has room for 32 tokens": dict(page=32),
  "queries are float32 and keys float32": dict(dtype="float32"),
  "C and R are 512 and 512, whose tiles take 272424 bytes": dict(r=512),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refuses_with_a_reason(sentence):
  sizes = dict(b=2, t=1, n=16, s=4096) | REFUSED[sentence]
  operands = shapes(**sizes)
  with compiling_for("gpu", hopper.CHIP):
    assert gpu_decode.decode_obstacle(*shapes(2, 1, 16, 4096)[:2], 512) is None
    with pytest.raises(NotImplementedError, match=sentence):
      jax.eval_shape(
        functools.partial(decode, kv_lora_rank=sizes.get("c", 512)), *operands
      )


def test_refuses_queries_and_keys_of_two_dtypes():
  q, kv, *_ = shapes(2, 1, 16, 4096)
  q = jax.ShapeDtypeStruct(q.shape, jnp.float16)
  with compiling_for("gpu", hopper.CHIP):
    obstacle = gpu_decode.decode_obstacle(q, kv, 512)
  assert obstacle.startswith("queries are float16 and keys bfloat16")


@pytest.mark.parametrize("chip", ("NVIDIA A100-SXM4-80GB", "NVIDIA B200"))
def test_refuses_what_is_not_hopper(chip):
  with compiling_for("gpu", chip):
    obstacle = gpu_decode.decode_obstacle(*shapes(2, 1, 16, 4096)[:2], 512)
  assert chip in obstacle


@pytest.mark.parametrize(
  "chip", ("NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB")
)
def test_takes_every_hopper(chip):
  with compiling_for("gpu", chip):
    q, kv, *_ = shapes(2, 1, 16, 4096)
    assert gpu_decode.decode_obstacle(q, kv, 512) is None


def test_splits_by_hand():
  # 16 heads: 3 tiles beside its own for a block. 64 tiles in 64 parts: 1 + 3.
  assert gpu_decode.splits_of(1, 64, 16, 132) == 64
  # All multiprocessors are taken by one part.
  assert gpu_decode.splits_of(132, 64, 16, 132) == 1
  # 2 x 64 blocks of 16 tiles in one wave; 66 parts would be of 16 as well.
  assert gpu_decode.splits_of(2, 1024, 64, 132) == 64
  # 133 rows in one part: 2 waves of 64 + 3; in 4: 5 waves of 16 + 3.
  assert gpu_decode.splits_of(133, 64, 16, 132) == 4
  assert gpu_decode.splits_of(1, 1, 16, 132) == 1


def test_places_of_tiles():
  ids = jnp.asarray([[0, 2, 3], [1, 1, 1]])
  kv = jnp.zeros((2, 1, 4 * KEYS))
  np.testing.assert_array_equal(
    gpu_decode._places(kv, ids, 4 * KEYS), [[0, 2, 3], [5, 5, 5]]
  )
  # Two tiles a page: tile 3 is the second of the row's second page.
  paged = PagedLatents(kv, jnp.asarray([[7, 4], [0, 9]]))
  np.testing.assert_array_equal(
    gpu_decode._places(paged, ids, 2 * KEYS), [[14, 8, 9], [1, 1, 1]]
  )
