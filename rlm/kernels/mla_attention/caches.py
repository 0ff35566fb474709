"""What `mla_decode` reads: latents in float8, and latents in pages.

The plain cache is one array [B, C + R, S]: normalised latents, key and value at
once, over the rotated key; tokens are the minor axis, so that neither a TPU's
128 lanes nor a page is padded. Here are the two other ones. Every cache says
how many tokens a row has room for, S = B's `capacity`.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

# Latents that share a scale, and the largest finite number of e4m3.
GROUP = 128
_LARGEST = 448.0


@flax.struct.dataclass
class Float8Latents:
  """Latents as FlashMLA keeps them: 656 bytes a token instead of 1152.

  FlashMLA lays the 512 + 16 + 128 bytes of a token side by side; here each
  kind is an array of its own, with tokens as the minor axis.

  Attributes:
    latent: float8_e4m3fn [B, C, S]; times its scale, the normalised latent.
    scales: float32 [B, C / 128, S], one for 128 numbers of a token.
    k_rope: [B, R, S], the rotated key, not quantized: its errors would be
      errors of position.
  """

  latent: jax.Array
  scales: jax.Array
  k_rope: jax.Array


@flax.struct.dataclass
class PagedLatents:
  """A cache in pages: page j of row b is `pages[page_table[b, j]]`.

  Attributes:
    pages: [pages, C + R, page], or Float8Latents of as many pages.
    page_table: int32 [B, S / page]. Every entry must be a page; one whose
      tokens no query may see is not read by the kernels.
  """

  pages: Any
  page_table: jax.Array


Latents = jax.Array | Float8Latents
Cache = Latents | PagedLatents


def quantize_latents(kv: jax.Array, *, kv_lora_rank: int) -> Float8Latents:
  """A plain cache in float8, as FlashMLA rounds it.

  Args:
    kv: [B, C + R, S].
    kv_lora_rank: C, a multiple of 128.

  Raises:
    ValueError: C is no multiple of 128.
  """
  if kv_lora_rank % GROUP:
    raise ValueError(
      f"{kv_lora_rank=} is not a multiple of the {GROUP} latents that share a"
      " float8 scale. Keep this cache in bfloat16."
    )
  latent, k_rope = jnp.split(kv, [kv_lora_rank], axis=1)
  b, c, s = latent.shape
  groups = latent.astype(jnp.float32).reshape(b, c // GROUP, GROUP, s)
  scales = jnp.abs(groups).max(axis=2) / _LARGEST
  safe = jnp.where(scales > 0, scales, 1.0)
  # Rounding the quotient up may pass 448, which e4m3 turns into NaN.
  scaled = jnp.clip(groups / safe[:, :, None], -_LARGEST, _LARGEST)
  return Float8Latents(
    scaled.astype(jnp.float8_e4m3fn).reshape(b, c, s), scales, k_rope
  )


def plain(cache: Cache, dtype: Any) -> jax.Array:
  """Any cache as one array [B, C + R, S] of `dtype`; copies what is not."""
  if isinstance(cache, PagedLatents):
    pages = plain(cache.pages, dtype)  # [pages, W, page]
    rows = pages[cache.page_table]  # [B, S / page, W, page]
    rows = jnp.moveaxis(rows, 1, 2)
    return rows.reshape(*rows.shape[:2], -1)
  if isinstance(cache, Float8Latents):
    b, c, s = cache.latent.shape
    groups = cache.latent.astype(jnp.float32).reshape(b, -1, GROUP, s)
    latent = (groups * cache.scales[:, :, None]).reshape(b, c, s)
    return jnp.concatenate(
      [latent.astype(dtype), cache.k_rope.astype(dtype)], axis=1
    )
  return cache


def shape_of(cache: Cache) -> tuple[int, int, int]:
  """(B, C + R, S) of any cache."""
  if isinstance(cache, PagedLatents):
    _, width, page = shape_of(cache.pages)
    b, pages = cache.page_table.shape
    return b, width, pages * page
  if isinstance(cache, Float8Latents):
    b, c, s = cache.latent.shape
    return b, c + cache.k_rope.shape[1], s
  b, width, s = cache.shape
  return b, width, s
