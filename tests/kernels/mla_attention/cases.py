"""Cases that every implementation of latent attention must pass.

A case is judged against the reference in float64: no implementation may be
further from it than three times the reference itself, in the case's dtype.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from rlm.kernels.backend import interpreting
from rlm.kernels.mla_attention import (
  PagedLatents,
  mla_attention,
  mla_decode,
  quantize_latents,
  tiles,
)

NOPE, ROPE, VALUE = 128, 64, 64
# Tiles that cut short lengths into several, forward and backward.
SMALL = tiles.TpuTiles(128, 128, 256, 128, 128, 256, 128, 64, 1, 2**24)
# What a TPU runs into, an interpreter says: races, reads out of bounds (an
# error) and reads of what was never written (NaN, in outputs too).
STRICT = pltpu.InterpretParams(
  detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
)


@contextlib.contextmanager
def platform(implementation: str, interpret=True, **changes) -> Iterator[None]:
  """Within it, `implementation` runs here, in small tiles."""
  if implementation != "tpu":
    yield
    return
  with (
    interpreting("tpu", "TPU v5", interpret),
    tiles.trying(dataclasses.replace(SMALL, **changes)),
  ):
    yield


@dataclasses.dataclass(frozen=True)
class Attention:
  """Of `mla_attention`: documents packed into rows, the last T are queries.

  Attributes:
    documents: of each row, the lengths of its documents; the rest is padding.
    t: queries.
    s: keys.
    n: heads.
    size: factor on the operands.
  """

  documents: tuple[tuple[int, ...], ...]
  t: int
  s: int
  n: int = 2
  size: float = 1.0

  def operands(self, dtype) -> tuple[jax.Array, ...]:
    rng, b = np.random.default_rng(0), len(self.documents)
    shapes = (
      (b, self.t, self.n, NOPE),
      (b, self.t, self.n, ROPE),
      (b, self.s, self.n, NOPE),
      (b, self.s, ROPE),
      (b, self.s, self.n, VALUE),
    )
    draw = rng.standard_normal
    return tuple(jnp.asarray(self.size * draw(s), dtype) for s in shapes)

  def places(self) -> tuple[jax.Array, ...]:
    """Positions of queries and of keys, segments of queries and of keys."""
    length = max(self.t, self.s)
    positions = np.zeros((len(self.documents), length), np.int32)
    segments = np.zeros_like(positions)
    for row, documents in enumerate(self.documents):
      at = 0
      for i, tokens in enumerate(documents):
        positions[row, at : at + tokens] = np.arange(tokens)
        segments[row, at : at + tokens] = i + 1
        at += tokens
    queries, keys = slice(length - self.t, length), slice(0, self.s)
    return tuple(
      jnp.asarray(x)
      for x in (
        positions[:, queries],
        positions[:, keys],
        segments[:, queries],
        segments[:, keys],
      )
    )

  def cotangents(self, dtype):
    rng, b = np.random.default_rng(1), len(self.documents)
    d_out = rng.standard_normal((b, self.t, self.n, VALUE))
    d_lse = rng.standard_normal((b, self.n, self.t))
    sums = jnp.promote_types(dtype, jnp.float32)
    return jnp.asarray(d_out, dtype), jnp.asarray(d_lse, sums)

  def run(self, implementation: str, dtype) -> dict[str, np.ndarray]:
    """Outputs and gradients by name, of operands rounded to bfloat16."""
    operands = [x.astype(dtype) for x in self.operands(jnp.bfloat16)]
    attend = functools.partial(
      mla_attention, scale=0.1, implementation=implementation
    )
    places = self.places()

    @jax.jit
    def values_and_gradients(operands, cotangents):
      (out, lse), vjp = jax.vjp(lambda *x: attend(*x, *places), *operands)
      return out, lse, *vjp(cotangents)

    results = values_and_gradients(operands, self.cotangents(dtype))
    names = ("out", "lse", "q_nope", "q_rope", "k_nope", "k_rope", "v")
    return dict(zip(names, jax.device_get(results), strict=True))


ATTENTION = {
  "packed rows of odd length": Attention(((150, 47), (5, 100, 92)), 197, 197),
  "length 0 and 1, one full": Attention(((), (1,), (130,)), 130, 130, n=1),
  "a part of the queries": Attention(((300,), (120, 180)), 150, 300),
  "a part of the keys": Attention(((10, 290),), 300, 140),
  "heads that do not pair": Attention(((129,),), 129, 129, n=3),
  "huge logits": Attention(((128,),), 128, 128, size=8.0),
}


@dataclasses.dataclass(frozen=True)
class Decode:
  """Of `mla_decode`: rows that hold some tokens, the last T are queries.

  Attributes:
    lengths: tokens that each row holds, its queries among them.
    t: queries.
    n: heads.
    s: room of a row.
    kind: plain, paged, float8, paged float8.
    selected: share of keys that a query may see.
    size: factor on the operands.
    segments: whether rows hold two documents, and see the second.
    page: tokens of a page.
  """

  lengths: tuple[int, ...]
  t: int = 1
  n: int = 16
  s: int = 512
  kind: str = "plain"
  selected: float = 1.0
  size: float = 1.0
  segments: bool = False
  page: int = 128

  WIDTH = 128

  def operands(self, dtype):
    """q and the cache."""
    rng, b = np.random.default_rng(0), len(self.lengths)
    q = rng.standard_normal((b, self.t, self.n, self.WIDTH + ROPE)) * self.size
    kv = rng.standard_normal((b, self.WIDTH + ROPE, self.s)) * self.size
    q, kv = (jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (q, kv))
    page_table = None
    if "paged" in self.kind:
      kv, page_table = self._pages(kv, rng)
    if "float8" in self.kind:
      kv = quantize_latents(kv, kv_lora_rank=self.WIDTH)
    return q, kv if page_table is None else PagedLatents(kv, page_table)

  def _pages(self, kv, rng):
    """Pages in any order; a last one, far off, where a row needs none."""
    b, width, _ = kv.shape
    count = self.s // self.page
    rows = jnp.moveaxis(kv.reshape(b, width, count, self.page), 2, 1)
    order = rng.permutation(b * count).astype(np.int32)
    pages = jnp.full((b * count + 1, width, self.page), 1e4, kv.dtype)
    pages = pages.at[order].set(rows.reshape(b * count, width, self.page))
    needed = np.arange(count) * self.page < np.array(self.lengths)[:, None]
    table = np.where(needed, order.reshape(b, count), b * count)
    return pages, jnp.asarray(table, jnp.int32)

  def places(self):
    b = len(self.lengths)
    lengths = np.array(self.lengths, np.int32)[:, None]
    q_positions = lengths - self.t + np.arange(self.t, dtype=np.int32)
    q_segments = (q_positions >= 0).astype(np.int32)
    kv_positions = np.broadcast_to(
      np.arange(self.s, dtype=np.int32), (b, self.s)
    )
    kv_segments = (kv_positions < lengths).astype(np.int32)
    if self.segments:
      second = kv_positions >= lengths // 2
      kv_segments = np.where(second, 2, 1) * kv_segments
      q_segments = 2 * q_segments
    return q_positions, kv_positions, q_segments, kv_segments

  def run(self, implementation: str, dtype) -> dict[str, np.ndarray]:
    q, cache = self.operands(dtype)
    selected = None
    if self.selected < 1:
      shape = (len(self.lengths), self.t, self.s)
      selected = np.random.default_rng(2).random(shape) < self.selected
    decode = functools.partial(
      mla_decode,
      kv_lora_rank=self.WIDTH,
      scale=0.1,
      implementation=implementation,
    )
    out, lse = jax.jit(
      lambda q, cache: decode(q, cache, *self.places(), selected)
    )(q, cache)
    return {"out": np.asarray(out), "lse": np.asarray(lse)}


def errors(got, want) -> dict[str, tuple[float, float]]:
  """By output: mean square and greatest error, infinities agreeing."""
  result = {}
  for name, exact in want.items():
    x = np.asarray(got[name], np.float64)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(x[~finite], exact[~finite], name)
    difference = np.where(finite, x - np.where(finite, exact, 0), 0)
    assert np.isfinite(difference).all(), name
    result[name] = (
      np.sqrt((difference**2).mean()),
      np.abs(difference).max(),
    )
  return result


DECODE = {
  "rows of 0, 1, odd and all": Decode((0, 1, 301, 512)),
  "two queries a row": Decode((2, 257, 400), t=2, n=5),
  "pages": Decode((128, 129, 511), kind="paged"),
  "float8": Decode((140, 512), kind="float8"),
  "pages of float8": Decode((0, 384), kind="paged float8", t=3, n=4),
  "selected keys": Decode((300, 512), selected=0.1),
  "the second document": Decode((500, 130), segments=True),
  "huge logits": Decode((400,), size=8.0),
  "one row, many heads": Decode((512,), n=128),
  "blocks of heads and tokens": Decode((2, 130, 256), t=3, n=23, s=256),
}


@functools.cache
def exact(case: Attention | Decode) -> dict[str, np.ndarray]:
  """The reference in float64."""
  with jax.enable_x64(True):
    return case.run("reference", jnp.float64)


@functools.cache
def own_errors(case: Attention | Decode, dtype) -> dict:
  return errors(case.run("reference", dtype), exact(case))


def check(got, case: Attention | Decode, dtype) -> None:
  """Three times the reference's error, and a rounding where it has none."""
  rounding = float(jnp.finfo(dtype).eps)
  found = errors(got, exact(case))
  for name, limits in own_errors(case, dtype).items():
    finite = np.where(np.isfinite(exact(case)[name]), exact(case)[name], 0)
    least = rounding * np.array(
      [np.sqrt((finite**2).mean()), abs(finite).max()]
    )
    if name == "lse":  # float32, of operands of any dtype
      least *= float(jnp.finfo(jnp.float32).eps) / rounding
    limit = np.maximum(3 * np.array(limits), least)
    assert (np.array(found[name]) <= limit).all(), (name, found[name], limits)
