"""What `tools/bench_mla.py` measures: cases, every way to compute one, bounds.

Rows are one document each, caches are full. A way of decoding that keeps
another cache than ours has operands and bounds of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm.kernels.backend import backend
from rlm.kernels.mla_attention import (
  PagedLatents,
  mla_attention,
  mla_decode,
  quantize_latents,
)
from rlm.kernels.mla_attention.caches import GROUP
from tools.mla_rivals import RIVALS, joined_keys

PAGE = 64  # tokens, as FlashMLA's
_GRADIENTS = ("dq_nope", "dq_rope", "dk_nope", "dk_rope", "dv")

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Heads, and the widths of what they attend to."""

  heads: int
  kv_lora_rank: int
  nope: int
  rope: int
  value: int

  @property
  def scale(self) -> float:
    return (self.nope + self.rope) ** -0.5

  @property
  def cached(self) -> int:
    """Numbers of a token in the latent cache."""
    return self.kv_lora_rank + self.rope


LAPTOP = Sizes(4, 32, 16, 16, 16)  # configs/pretrain/laptop.py
LITE = Sizes(16, 512, 128, 64, 128)  # DeepSeek-V2-Lite
V3 = dataclasses.replace(LITE, heads=128)


@dataclasses.dataclass(frozen=True)
class Work:
  """What bounds a call: bytes that it must move, FLOPs that it must do."""

  nbytes: int
  flops: int


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to compute a case.

  Attributes:
    make: key -> (what is read once a call, what calls share); jittable.
    run: what `make` gives -> arrays by name.
    baseline: plain jnp, run on the same; in float32, the truth.
    work: what bounds a call.
    rank: of several ways, those of a lower rank are measured first where time
      is short: 0 ours, 1 XLA's form, 2 the others.
  """

  make: Callable[[jax.Array], tuple[Any, Any]]
  run: Callable[[Any, Any], Arrays]
  baseline: Callable[[Any, Any], Arrays]
  work: Work
  rank: int


def _normal(key: jax.Array, shapes: Sequence[tuple[int, ...]], dtype: str):
  keys = jax.random.split(key, len(shapes))
  return [
    jax.random.normal(k, shape, dtype)
    for k, shape in zip(keys, shapes, strict=True)
  ]


def _itemsize(dtype: str) -> int:
  return jnp.dtype(dtype).itemsize


def kernel_name() -> str | None:
  """The kernels of this platform, or None where there are none."""
  return backend() if backend() in ("gpu", "tpu") else None


def _doors() -> dict[str, int]:
  """The implementations of a front door that this platform has; their ranks."""
  kernel = kernel_name()
  ours = {kernel: 0} if kernel else {}
  return ours | {"xla": 1, "reference": 2}


@dataclasses.dataclass(frozen=True)
class Attention:
  """Expanded attention over causal rows.

  Attributes:
    part: "forward", or "train": with the backward pass.
    query_chunk: of the form "xla".
  """

  part: str
  sizes: Sizes
  rows: int
  length: int
  dtype: str = "bfloat16"
  query_chunk: int = 0

  @property
  def name(self) -> str:
    return (
      f"{self.part} {self.rows} x {self.length}, {self.sizes.heads} heads,"
      f" {self.dtype}"
    )

  @property
  def kind(self) -> str:
    """What a check speaks for."""
    return f"attention, {self.sizes.heads} heads, {self.dtype}"

  @property
  def forward(self) -> "Attention":
    """The same without a backward pass."""
    return dataclasses.replace(self, part="forward")

  @property
  def work(self) -> Work:
    """Of each part: every array once, every visible pair of tokens."""
    s = self.sizes
    tokens = self.rows * self.length
    pairs = self.rows * self.length * (self.length + 1) // 2 * s.heads
    operands = s.heads * (2 * s.nope + s.rope + s.value) + s.rope
    out = s.heads * s.value
    forward = (operands + out) * _itemsize(self.dtype) + 4 * s.heads
    # Operands, out and its gradient are read, a gradient each is written.
    backward = 2 * (operands + out) * _itemsize(self.dtype) + 4 * s.heads
    keys, values = s.nope + s.rope, s.value
    result = Work(tokens * forward, 2 * pairs * (keys + values))
    if self.part == "forward":
      return result
    return Work(
      result.nbytes + tokens * backward,
      result.flops + 2 * pairs * (3 * keys + 2 * values),
    )

  def make(self, key: jax.Array) -> tuple[Any, Any]:
    """Operands with the gradient of the output; positions, segments."""
    s, b, t = self.sizes, self.rows, self.length
    widths = [(s.heads, s.nope), (s.heads, s.rope), (s.heads, s.nope)]
    widths += [(s.rope,), (s.heads, s.value), (s.heads, s.value)]
    operands = _normal(key, [(b, t, *width) for width in widths], self.dtype)
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    segments = jnp.ones((b, t), jnp.int32)
    return operands, (positions, positions, segments, segments)

  def _run(self, attend: Callable, operands: Any, places: Any) -> Arrays:
    *operands, d_out = operands
    if self.part == "forward":
      return attend(operands, places)
    out, vjp, rest = jax.vjp(
      lambda *x: _out_and_rest(attend(x, places)), *operands, has_aux=True
    )
    gradients = vjp(d_out)
    return {"out": out} | rest | dict(zip(_GRADIENTS, gradients, strict=True))

  def ways(self) -> dict[str, Way]:
    """Every way by name: the front door's, then those of others."""

    def door(name, operands, places):
      chunk = self.query_chunk if name == "xla" else 0
      out, lse = mla_attention(
        *operands,
        *places,
        scale=self.sizes.scale,
        query_chunk=chunk,
        implementation=name,
      )
      return {"out": out, "lse": lse}

    def rival(attend, operands, places):
      del places  # rows of one document: causal says it all
      *parts, v = operands
      q, k = joined_keys(*parts)
      return {"out": attend(q, k, v, scale=self.sizes.scale, causal=True)}

    reference = functools.partial(door, "reference")
    baseline = functools.partial(self._run, reference)

    def way(attend, rank):
      run = functools.partial(self._run, attend)
      return Way(self.make, run, baseline, self.work, rank)

    ours = {n: way(functools.partial(door, n), r) for n, r in _doors().items()}
    rivals = {
      name: way(functools.partial(rival, attend), 2)
      for name, attend in RIVALS.items()
    }
    return ours | rivals


def _out_and_rest(arrays: Arrays) -> tuple[jax.Array, Arrays]:
  rest = {name: x for name, x in arrays.items() if name != "out"}
  return arrays["out"], rest


@dataclasses.dataclass(frozen=True)
class Decode:
  """Absorbed attention of the last `tokens` over caches of `context` tokens.

  Attributes:
    cache: "plain", "paged" or "float8".
    every_way: also plain jnp, and the caches that others would keep; of a cache
      that is not plain, also XLA's form, which copies it.
  """

  sizes: Sizes
  rows: int
  context: int
  cache: str = "plain"
  dtype: str = "bfloat16"
  tokens: int = 1
  every_way: bool = True

  @property
  def name(self) -> str:
    return (
      f"decode {self.rows} x {self.context}, {self.sizes.heads} heads,"
      f" {self.dtype} {self.cache}"
    )

  @property
  def kind(self) -> str:
    """What a check speaks for."""
    return f"decode, {self.sizes.heads} heads, {self.dtype} {self.cache}"

  @property
  def token_bytes(self) -> int:
    """Of one token in the cache: 1152 in bfloat16 and 656 in float8."""
    s, itemsize = self.sizes, _itemsize(self.dtype)
    if self.cache == "float8":
      scales = 4 * s.kv_lora_rank // GROUP
      return s.kv_lora_rank + scales + s.rope * itemsize
    return s.cached * itemsize

  def _work(self, token_bytes: int, q_width: int, out_width: int) -> Work:
    vectors = self.rows * self.tokens * self.sizes.heads
    moved = vectors * (q_width + out_width) * _itemsize(self.dtype)
    nbytes = self.rows * self.context * token_bytes + moved
    return Work(nbytes, 2 * vectors * self.context * (q_width + out_width))

  @property
  def work(self) -> Work:
    """The cache once, with queries and outputs; C + R and C for a pair."""
    s = self.sizes
    return self._work(self.token_bytes, s.cached, s.kv_lora_rank)

  def _places(self) -> tuple[jax.Array, ...]:
    b, t, s = self.rows, self.tokens, self.context
    kv_positions = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))
    segments = jnp.ones((b, s), jnp.int32)
    last = slice(s - t, s)
    return kv_positions[:, last], kv_positions, segments[:, last], segments

  def make(self, key: jax.Array) -> tuple[Any, Any]:
    """The cache; queries, positions and segments."""
    s, b = self.sizes, self.rows
    q_key, kv_key = jax.random.split(key)
    (q,) = _normal(q_key, [(b, self.tokens, s.heads, s.cached)], self.dtype)
    pages = -(-self.context // PAGE)

    def row(key):  # one after the other: random bits are wider than a cache
      if self.cache == "paged":
        return jax.random.normal(key, (pages, s.cached, PAGE), self.dtype)
      kv = jax.random.normal(key, (1, s.cached, self.context), self.dtype)
      if self.cache == "float8":
        return quantize_latents(kv, kv_lora_rank=s.kv_lora_rank)
      return kv

    rows = jax.lax.map(row, jax.random.split(kv_key, b))
    cache = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    if self.cache == "paged":
      order = np.random.default_rng(0).permutation(b * pages)
      table = jnp.asarray(order.reshape(b, pages), jnp.int32)
      cache = PagedLatents(cache, table)
    return cache, (q, *self._places())

  def ways(self) -> dict[str, Way]:
    """Every way by name: the front door's, then those of others."""

    def door(name, cache, rest):
      q, *places = rest
      out, lse = mla_decode(
        q,
        cache,
        *places,
        kv_lora_rank=self.sizes.kv_lora_rank,
        scale=self.sizes.scale,
        implementation=name,
      )
      return {"out": out, "lse": lse}

    baseline = functools.partial(door, "reference")
    result = {
      name: Way(
        self.make, functools.partial(door, name), baseline, self.work, rank
      )
      for name, rank in _doors().items()
      if self.every_way or rank == 0 or (rank == 1 and self.cache == "plain")
    }
    others = self.cache == "plain" and self.every_way
    return result | (self._latent() | self._expanded() if others else {})

  def _latent(self) -> dict[str, Way]:
    """The latent cache as one key and value head that all queries share."""

    def make(key):
      kv_key, q_key = jax.random.split(key)
      s, b = self.sizes, self.rows
      (q,) = _normal(q_key, [(b, self.tokens, s.heads, s.cached)], self.dtype)
      (kv,) = _normal(kv_key, [(b, self.context, 1, s.cached)], self.dtype)
      return kv, q

    def run(attend, kv, q):
      out = attend(q, kv, kv, scale=self.sizes.scale, causal=False)
      return {"out": out[..., : self.sizes.kv_lora_rank]}

    baseline = functools.partial(run, _plain_attention)
    return {
      f"{name}, latents": Way(
        make, functools.partial(run, RIVALS[name]), baseline, self.work, 2
      )
      for name in ("jax.nn xla", "jax.nn cudnn")
    }

  def _expanded(self) -> dict[str, Way]:
    """Caches of keys and values of every head, as without latents."""
    s, b = self.sizes, self.rows
    width = s.nope + s.rope

    def make(value, key):
      q_key, kv_key = jax.random.split(key)
      (q,) = _normal(q_key, [(b, self.tokens, s.heads, width)], self.dtype)

      def row(key):
        shapes = [(self.context, s.heads, w) for w in (width, value)]
        return _normal(key, shapes, self.dtype)

      return jax.lax.map(row, jax.random.split(kv_key, b)), q

    def run(attend, kv, q):
      out = attend(q, *kv, scale=s.scale, causal=False)
      return {"out": out[..., : s.value]}

    baseline = functools.partial(run, _plain_attention)
    token_bytes = s.heads * (width + s.value) * _itemsize(self.dtype)
    work = self._work(token_bytes, width, s.value)
    result = {}
    for name, attend in {"plain": _plain_attention, **RIVALS}.items():
      # jax.nn wants values as wide as keys: its cache holds zeros as well.
      value = width if name.startswith("jax.nn") else s.value
      result[f"{name}, expanded"] = Way(
        functools.partial(make, value),
        functools.partial(run, attend),
        baseline,
        work,
        2,
      )
    return result


def _plain_attention(q, k, v, *, scale, causal):
  """What the others must give of a cache that all queries see."""
  assert not causal
  group = q.shape[2] // k.shape[2]
  q = q.reshape(*q.shape[:2], k.shape[2], group, -1)
  exact = dict(precision="highest", preferred_element_type=jnp.float32)
  scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, **exact)
  probs = jax.nn.softmax(scores * scale, axis=-1).astype(v.dtype)
  out = jnp.einsum("BKGTS,BSKh->BTKGh", probs, v, **exact)
  return out.reshape(*out.shape[:2], -1, v.shape[-1]).astype(q.dtype)


def sets_of(work: Work) -> int:
  """Caches that calls take in turn, so that none is met in the L2 again.

  The L2 of an H200 holds 60 MB; 256 MB pass through it in between, or 16 of the
  smallest caches, which then stay there (`stays_cached`).
  """
  return min(16, max(1, math.ceil(2**28 / work.nbytes)))


def stays_cached(work: Work) -> bool:
  """Whether `sets_of` such caches fit into a last-level cache."""
  return sets_of(work) * work.nbytes < 2**27


CPU_CASES: list[Attention | Decode] = [
  Attention("train", LAPTOP, 32, 128, "float32"),
  Attention("train", LITE, 1, 512, "float32"),
  Attention("train", LITE, 1, 1024, "float32"),
  Attention("forward", LITE, 1, 2048, "float32", query_chunk=512),
  Attention("train", LITE, 1, 512, "bfloat16"),
  Decode(LAPTOP, 64, 128, "plain", "float32"),
  Decode(LITE, 8, 512, "plain", "float32"),
  Decode(LITE, 4, 2048, "plain", "float32"),
  Decode(LITE, 4, 2048, "plain", "bfloat16"),
  Decode(LITE, 4, 2048, "paged", "bfloat16"),
  Decode(LITE, 4, 2048, "float8", "bfloat16"),
  Decode(V3, 1, 2048, "plain", "float32"),
]


def gpu_cases() -> list[Attention | Decode]:
  """The published cases; what reads copies and others' caches at 16 rows."""
  cases: list[Attention | Decode] = [
    Decode(sizes, rows, context, every_way=rows == 16)
    for rows in (128, 16, 1)
    for context in (8192, 32768, 131072, 1024)
    for sizes in (LITE, V3)
  ]
  for cache in ("float8", "paged"):
    for rows in (128, 16):
      for context in (8192, 32768):
        for sizes in (LITE, V3):
          every_way = rows == 16
          cases.append(Decode(sizes, rows, context, cache, every_way=every_way))
  for sizes in (LITE, V3):
    for length in (4096, 8192, 16384, 32768):
      for part in ("forward", "train"):
        rows = 32768 // length
        cases.append(Attention(part, sizes, rows, length, query_chunk=512))
  return cases


def check_cases(sizes_of: tuple[Sizes, ...]) -> list[Attention | Decode]:
  """Small cases of these sizes; their lengths are no whole tiles."""
  cases: list[Attention | Decode] = []
  for sizes in sizes_of:
    cases.append(Attention("train", sizes, 2, 328, query_chunk=82))
    for cache in ("plain", "float8", "paged"):
      cases.append(Decode(sizes, 3, 320, cache, tokens=2))
  return cases
