"""One block of the Hopper kernel of `mla_decode`, three warpgroups.

Group 0 makes scores and weights, and accumulates the first half of the latents;
group 1 accumulates the second half; group 2 fetches. What they tell each other:

| barrier | from | to | says |
|---|---|---|---|
| q_full | the copy engine | 0 | the queries have come |
| full[slot] | the copy engine | 0, 1 | a tile has come |
| free[slot] | 0, 1 | 2 | nobody reads the tile any more |
| weighed | 0 | 1 | the tile's weights and the factor of the sums so far |
| taken | 1 | 0 | those have been read |
| rope_full, rope_free | as full, free | | the rope keys of a float8 tile |
| converted | 1 | 0 | its half of a float8 tile is there in 16 bits |

Every barrier that has been waited for is waited for to its last phase.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rlm.kernels.attention import MASKED
from rlm.kernels.backend import interpretation
from rlm.kernels.mla_attention.caches import GROUP
from rlm.kernels.mla_attention.gpu_products import LOG2_E, ROWS

# Tokens of a tile: a row of 128 bytes, which the copy engine swizzles.
KEYS = 64
# Of the latents, what one product takes; and of a float8 tile, one conversion.
SLAB = 64
# The running maximum starts far above MASKED, so that in a row that sees
# nothing a masked score weighs exp2(-5e29) = 0, and far below any score.
LOWEST = MASKED / 2
# Bits of e4m3 read as float16 are 2^-8 of its number, subnormal ones too.
E4M3_UNIT = 256.0
# Registers of a thread: 2 x 128 x 232 + 128 x 40 of the 65536 that an SM has.
COMPUTING_REGISTERS, FETCHING_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What a call of the kernel fixes.

  Attributes:
    heads: N; row r of T * N holds head r % N of token r // N.
    kv_lora_rank: C.
    rope: R.
    columns: rows of queries that are written: 64, or in a call of no more 16 or
      32, where products with latents are turned and these are their columns.
    splits: parts of a row's tiles.
    stages: tiles in SMEM at once.
    page: tokens of a page, or of a row where there are no pages.
    scale: factor on the scores.
    float8: whether latents are codes with scales.
  """

  heads: int
  kv_lora_rank: int
  rope: int
  columns: int
  splits: int
  stages: int
  page: int
  scale: float
  float8: bool

  @property
  def turned(self) -> bool:
    """Whether sums are [latents, rows], for few rows, or [rows, latents]."""
    return self.columns < ROWS

  @property
  def latent_slots(self) -> int:
    """Tiles of latents in 16 bits."""
    return 1 if self.float8 else self.stages

  @property
  def rope_slots(self) -> int:
    return 1 if self.float8 else self.stages

  def chunks(self, group: int) -> list[tuple[int, int]]:
    """(start, width) of the latents that a group accumulates, one by one.

    The product of a chunk is 64 registers of a thread, beside the sums' 128.
    """
    half = SLAB * -(-self.kv_lora_rank // (2 * SLAB))
    start, stop = ((0, half), (half, self.kv_lora_rank))[group]
    width = 2 * SLAB * ROWS // self.columns
    return [(at, min(width, stop - at)) for at in range(start, stop, width)]

  def sums_shape(self, width: int) -> tuple[int, int]:
    return (width, self.columns) if self.turned else (ROWS, width)


def _old_interpreter() -> bool:
  """Whether jax 0.10 interprets: no layouts, no references read turned."""
  return bool(interpretation()) and jax.__version_info__ < (0, 11)


def _laid_out(x: jax.Array, layout) -> jax.Array:
  """`x` in a layout of registers."""
  return x if _old_interpreter() else plgpu.layout_cast(x, layout)


def _vector(x: jax.Array, axis: int) -> jax.Array:
  """A vector laid out as is a product reduced over `axis`."""
  return _laid_out(x, plgpu.Layout.WGMMA.reduce(axis))


def _along(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
  """A vector along `axis` of a matrix of `shape`, the same over the other."""
  return lax.broadcast_in_dim(x, shape, (axis,))


def _multiply_turned(shape: tuple[int, int], left_ref, right_ref) -> jax.Array:
  """Gives left @ right^T in float32, of `shape`; both in SMEM."""
  if _old_interpreter():
    last = (((1,), (1,)), ((), ()))
    return lax.dot_general(
      left_ref[...], right_ref[...], last, preferred_element_type=jnp.float32
    )

  def product(acc_ref):
    plgpu.wgmma(acc_ref, left_ref, right_ref.T)
    return acc_ref[...]

  return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def _from_e4m3(code: jax.Array) -> jax.Array:
  """int8 bits of e4m3 -> float32, 1 / E4M3_UNIT of their numbers.

  The sign's copy that widening puts on top of the exponent is taken away.
  """
  half = (code.astype(jnp.int16) << 7) & jnp.int16(~0x4000)
  return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)


class _Block:
  """References of a block and where it stands in the grid."""

  def __init__(self, sizes: Sizes, refs, smem: dict):
    self.sizes = sizes
    self.q_ref, self.bits_ref, self.ids_ref, self.places_ref = refs[:4]
    counts_ref = refs[4]
    *self.cache_refs, self.out_ref, self.lse_ref = refs[5:]
    self.smem = types.SimpleNamespace(**smem)
    self.b, self.split = lax.axis_index("b"), lax.axis_index("split")
    self.first_row = lax.axis_index("rows") * ROWS
    self.rows = pl.ds(self.first_row, ROWS)
    # Blocks of the same row take its tiles in turn: neighbours read neighbours.
    splits = jnp.int32(sizes.splits)
    self.count = lax.div(counts_ref[self.b] + (splits - 1 - self.split), splits)

  def slot(self, i):
    return lax.rem(i, jnp.int32(self.sizes.stages))

  def latents(self, i):
    """Tile i in 16 bits."""
    slot = 0 if self.sizes.float8 else self.slot(i)
    return self.smem.latents.at[slot]

  # Group 2.

  def fetch(self) -> None:
    """Starts the copies of all tiles, each when its slot is free."""
    sizes, smem = self.sizes, self.smem
    stages = jnp.int32(sizes.stages)
    per_page = jnp.int32(sizes.page // KEYS)

    @pl.loop(0, self.count)
    def _(i):
      # Read ahead of the wait, which hides how long that takes.
      at = i * sizes.splits + self.split
      place = self.places_ref[self.b, at]
      tile = self.ids_ref[self.b, at]
      page = lax.div(place, per_page)
      keys = pl.ds(lax.rem(place, per_page) * KEYS, KEYS)
      slot = self.slot(i)

      @pl.when(i >= stages)
      def _():
        plgpu.barrier_wait(smem.free.at[slot])

      def copy(source, target_ref, barrier=smem.full.at[slot]):
        plgpu.copy_gmem_to_smem(source, target_ref, barrier)

      copy(
        self.bits_ref.at[self.b, pl.ds(tile * KEYS, KEYS)], smem.bits.at[slot]
      )
      if not sizes.float8:
        (pages_ref,) = self.cache_refs
        latent = pages_ref.at[page, pl.ds(0, sizes.kv_lora_rank), keys]
        rope = pages_ref.at[page, pl.ds(sizes.kv_lora_rank, sizes.rope), keys]
        copy(latent, smem.latents.at[slot])
        copy(rope, smem.k_ropes.at[slot])
        return
      codes_ref, scales_ref, k_ropes_ref = self.cache_refs
      copy(codes_ref.at[page, :, keys], smem.codes.at[slot])
      copy(scales_ref.at[page, :, keys], smem.scales.at[slot])

      @pl.when(i > 0)
      def _():
        plgpu.barrier_wait(smem.rope_free)

      copy(k_ropes_ref.at[page, :, keys], smem.k_ropes.at[0], smem.rope_full)

    @pl.loop(jnp.maximum(self.count, stages), self.count + stages)
    def _(i):
      plgpu.barrier_wait(smem.free.at[self.slot(i)])

    if sizes.float8:

      @pl.when(self.count > 0)
      def _():
        plgpu.barrier_wait(smem.rope_free)

  # Both groups that compute.

  def convert(self, i, group: int) -> None:
    """A group's half of a float8 tile, times its scales, in 16 bits.

    These are the numbers that the reference multiplies.
    """
    smem, slot = self.smem, self.slot(i)
    scales = {}
    for start, width in self.sizes.chunks(group):
      for at in range(start, start + width, SLAB):
        slab, row = pl.ds(at, SLAB), at // GROUP
        if row not in scales:
          scales[row] = _vector(smem.scales[slot, row], 0) * E4M3_UNIT
        scale = scales[row]
        code = _laid_out(smem.codes[slot, slab], plgpu.Layout.WGMMA)
        latent = _from_e4m3(code) * _along(scale, (SLAB, KEYS), 1)
        smem.latents[0, slab] = latent.astype(smem.latents.dtype)
    plgpu.commit_smem()

  def zeros(self, group: int) -> tuple[jax.Array, ...]:
    shapes = [self.sizes.sums_shape(w) for _, w in self.sizes.chunks(group)]
    return tuple(
      _laid_out(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
      for shape in shapes
    )

  def factors(self):
    """What group 0 has put down for each row, laid out to multiply sums."""
    kept = self.smem.factors[pl.ds(0, self.sizes.columns)]
    return _vector(kept, 0 if self.sizes.turned else 1)

  def scaled(self, x: jax.Array, factors: jax.Array) -> jax.Array:
    return x * _along(factors, x.shape, 1 if self.sizes.turned else 0)

  def accumulate(self, sums, i, group: int) -> tuple[jax.Array, ...]:
    """Returns sums * factors + weights @ latents, of a group's half."""
    factors = self.factors()
    latents, weights = self.latents(i), self.smem.weights
    result = []
    for x, (start, width) in zip(sums, self.sizes.chunks(group), strict=True):
      chunk = latents.at[pl.ds(start, width)]
      if self.sizes.turned:
        pair = chunk, weights.at[pl.ds(0, self.sizes.columns)]
      else:
        pair = weights, chunk
      # Not added up in the product's own registers: interpreters have no such.
      new = _multiply_turned(self.sizes.sums_shape(width), *pair)
      result.append(self.scaled(x, factors) + new)
    return tuple(result)

  def write(self, sums, group: int) -> None:
    """Out, from sums and the inverse of the weights' sum."""
    inverse = self.factors()
    for x, (start, width) in zip(sums, self.sizes.chunks(group), strict=True):
      out, chunk = self.scaled(x, inverse), pl.ds(start, width)
      if self.sizes.turned:
        self.out_ref[self.split, self.b, chunk, :] = out
      else:
        self.out_ref[self.split, self.b, self.rows, chunk] = out

  # Group 1.

  def follow(self) -> None:
    smem = self.smem
    plgpu.barrier_arrive(smem.taken)

    def step(i, sums):
      plgpu.barrier_wait(smem.full.at[self.slot(i)])
      if self.sizes.float8:
        # Group 0 has read the last tile's scores, for it has sent weights.
        self.convert(i, 1)
        plgpu.barrier_arrive(smem.converted)
        plgpu.barrier_arrive(smem.free.at[self.slot(i)])
      plgpu.barrier_wait(smem.weighed)
      sums = self.accumulate(sums, i, 1)
      plgpu.barrier_arrive(smem.taken)
      if not self.sizes.float8:
        plgpu.barrier_arrive(smem.free.at[self.slot(i)])
      return sums

    sums = lax.fori_loop(0, self.count, step, self.zeros(1))
    plgpu.barrier_wait(smem.weighed)
    self.write(sums, 1)

  # Group 0.

  def send(self, factors: jax.Array, weights: jax.Array | None = None) -> None:
    plgpu.barrier_wait(self.smem.taken)
    self.smem.factors[...] = factors
    if weights is not None:
      self.smem.weights[...] = weights.astype(self.smem.weights.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(self.smem.weighed)

  def scores(self, i, row_bits: jax.Array) -> jax.Array:
    """float32 [ROWS, KEYS], times scale and log2(e); MASKED where unseen."""
    smem, shape = self.smem, (ROWS, KEYS)
    if self.sizes.float8:
      plgpu.barrier_wait(smem.rope_full)
    rope_slot = 0 if self.sizes.float8 else self.slot(i)

    def product(acc_ref):
      plgpu.wgmma(acc_ref, smem.q_latent, self.latents(i))
      plgpu.wgmma(acc_ref, smem.q_rope, smem.k_ropes.at[rope_slot])
      return acc_ref[...]

    scores = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
    if self.sizes.float8:
      plgpu.barrier_arrive(smem.rope_free)
    key_bits = _vector(smem.bits[self.slot(i)], 0)
    seen = (_along(key_bits, shape, 1) & _along(row_bits, shape, 0)) != 0
    return jnp.where(seen, scores * (self.sizes.scale * LOG2_E), MASKED)

  def lead(self) -> None:
    sizes, smem = self.sizes, self.smem
    c = sizes.kv_lora_rank
    # Rows beyond `columns` are never written: whatever lies there may do.
    q_ref = self.q_ref.at[self.b, pl.ds(self.first_row, sizes.columns)]
    held = pl.ds(0, sizes.columns)
    for width, target_ref in (
      (pl.ds(0, c), smem.q_latent),
      (pl.ds(c, sizes.rope), smem.q_rope),
    ):
      source_ref, target_ref = q_ref.at[:, width], target_ref.at[held]
      plgpu.copy_gmem_to_smem(source_ref, target_ref, smem.q_full)
    row = _vector(lax.iota(jnp.int32, ROWS), 1) + self.first_row
    # Rows beyond the last token's have any bit; shifting by 32 is undefined.
    row_bits = jnp.int32(1) << (lax.div(row, jnp.int32(sizes.heads)) & 31)
    plgpu.barrier_wait(smem.q_full)

    def step(i, carry):
      top, total, sums = carry
      plgpu.barrier_wait(smem.full.at[self.slot(i)])
      if sizes.float8:
        self.convert(i, 0)
        plgpu.barrier_wait(smem.converted)
      scores = self.scores(i, row_bits)
      new_top = jnp.maximum(top, scores.max(axis=1))
      factors = jnp.exp2(top - new_top)
      weights = jnp.exp2(scores - _along(new_top, scores.shape, 0))
      total = total * factors + weights.sum(axis=1)
      self.send(factors, weights)
      if sizes.float8:
        plgpu.barrier_arrive(smem.free.at[self.slot(i)])
      sums = self.accumulate(sums, i, 0)
      if not sizes.float8:
        plgpu.barrier_arrive(smem.free.at[self.slot(i)])
      return new_top, total, sums

    start = (
      _vector(jnp.full((ROWS,), LOWEST, jnp.float32), 1),
      _vector(jnp.zeros((ROWS,), jnp.float32), 1),
      self.zeros(0),
    )
    top, total, sums = lax.fori_loop(0, self.count, step, start)
    safe = jnp.where(total > 0, total, 1.0)
    self.send(1.0 / safe)
    self.write(sums, 0)
    lse = jnp.where(total > 0, top / LOG2_E + jnp.log(safe), -jnp.inf)
    self.lse_ref[self.split, self.b, self.rows] = lse


def block(*refs, sizes: Sizes, **smem) -> None:
  """The kernel of a block; grid (b, split, rows), threads `group`.

  Args:
    *refs: in GMEM: q [B, rows, C + R], of `columns` rows or 64s; bits int32 [B,
      S], bit t of a key set where token t sees it; ids int32 [B, tiles],
      visited tiles of the mask; places int32 [B, tiles], where they are, page *
      tiles of a page + tile; counts int32 [B], how many are visited; the
      cache's arrays, by pages; out float32 [splits, B, 64s, C], or [splits, B,
      C, columns] where turned; lse float32 [splits, B, 64s].
    sizes: what is static.
    **smem: of `scratch`.
  """
  here = _Block(sizes, refs, smem)
  group = lax.axis_index("group")

  @pl.when(group == 0)
  def _():
    plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
    here.lead()

  @pl.when(group == 1)
  def _():
    plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
    here.follow()

  @pl.when(group == 2)
  def _():
    plgpu.set_max_registers(FETCHING_REGISTERS, action="decrease")
    here.fetch()


def _swizzled(elements: int, itemsize: int) -> tuple:
  """How a matrix whose rows are a multiple of `elements` lies in SMEM."""
  return (
    plgpu.TilingTransform((8, elements)),
    plgpu.SwizzleTransform(elements * itemsize),
  )


def scratch(sizes: Sizes, dtype) -> dict:
  """SMEM and barriers of a block."""
  c, stages = sizes.kv_lora_rank, sizes.stages
  whole = _swizzled(KEYS, 2)
  narrow = _swizzled(next(x for x in (64, 32, 16) if sizes.rope % x == 0), 2)
  result = dict(
    q_latent=plgpu.SMEM((ROWS, c), dtype, transforms=whole),
    q_rope=plgpu.SMEM((ROWS, sizes.rope), dtype, transforms=narrow),
    latents=plgpu.SMEM((sizes.latent_slots, c, KEYS), dtype, transforms=whole),
    k_ropes=plgpu.SMEM(
      (sizes.rope_slots, sizes.rope, KEYS), dtype, transforms=narrow
    ),
    weights=plgpu.SMEM((ROWS, KEYS), dtype, transforms=whole),
    bits=plgpu.SMEM((stages, KEYS), jnp.int32),
    factors=plgpu.SMEM((ROWS,), jnp.float32),
    q_full=plgpu.Barrier(num_arrivals=2),
    full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    weighed=plgpu.Barrier(),
    taken=plgpu.Barrier(),
  )
  if sizes.float8:
    result |= dict(
      codes=plgpu.SMEM(
        (stages, c, KEYS), jnp.int8, transforms=_swizzled(KEYS, 1)
      ),
      scales=plgpu.SMEM((stages, c // GROUP, KEYS), jnp.float32),
      rope_full=plgpu.Barrier(),
      rope_free=plgpu.Barrier(),
      converted=plgpu.Barrier(),
    )
  return result


def smem_bytes(sizes: Sizes) -> int:
  """What `scratch` takes: each buffer whole KiB, a barrier 8 bytes."""
  c, stages = sizes.kv_lora_rank, sizes.stages
  buffers = [
    2 * ROWS * c,
    2 * ROWS * sizes.rope,
    2 * KEYS * c * sizes.latent_slots,
    2 * KEYS * sizes.rope * sizes.rope_slots,
    2 * ROWS * KEYS,
    4 * KEYS * stages,
    4 * ROWS,
  ]
  barriers = 3 + 2 * stages
  if sizes.float8:
    buffers += [KEYS * c * stages, 4 * KEYS * (c // GROUP) * stages]
    barriers += 3
  return sum(1024 * -(-x // 1024) for x in buffers) + 8 * barriers
