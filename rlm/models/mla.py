"""Multi-head latent attention, expanded and absorbed (V3 eq. 1-11).

Weights are packed as published: q_b and kv_b are head-major, the part without
positions first; kv_a holds the latent's rows first, then the RoPE key's.
"""

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from rlm.kernels import mla_attention as kernel
from rlm.models.config import ModelConfig
from rlm.models.layers import RMSNorm, dot, linear, normal_init
from rlm.models.rope import apply_rope, softmax_scale


@flax.struct.dataclass
class LayerCache:
  """What one layer remembers of each token; tokens are the minor axis.

  Attributes:
    kv_latent: [B, C, S], the normalised latent c^KV.
    k_rope: [B, R, S], the rotated key k^R shared by all heads.
  """

  kv_latent: jax.Array
  k_rope: jax.Array


@flax.struct.dataclass
class LatentCache:
  """The cache of all layers. Entry s of a row is its token at position s.

  Attributes:
    layers: LayerCache with a leading layer axis, dense layers first:
      kv_latent [L, B, C, S], k_rope [L, B, R, S].
    lengths: int32 [B], tokens held by each row; later entries are unread.
  """

  layers: LayerCache
  lengths: jax.Array

  @classmethod
  def empty(cls, cfg: ModelConfig, batch: int, capacity: int) -> "LatentCache":
    """A cache of no tokens with room for `capacity` of them in each row."""
    shape = (cfg.num_hidden_layers, batch)
    dtype = jnp.dtype(cfg.dtype)
    return cls(
      layers=LayerCache(
        kv_latent=jnp.zeros((*shape, cfg.kv_lora_rank, capacity), dtype),
        k_rope=jnp.zeros((*shape, cfg.qk_rope_head_dim, capacity), dtype),
      ),
      lengths=jnp.zeros((batch,), jnp.int32),
    )

  @property
  def capacity(self) -> int:
    """Tokens that a row has room for."""
    return self.layers.kv_latent.shape[-1]

  def extend(self, capacity: int) -> "LatentCache":
    """The same tokens with room for `capacity` in each row."""
    more = capacity - self.capacity
    if more < 0:
      raise ValueError(
        f"A cache of {self.capacity} tokens cannot shrink to {capacity}."
      )
    pad = [(0, 0), (0, 0), (0, 0), (0, more)]
    layers = jax.tree.map(lambda x: jnp.pad(x, pad), self.layers)
    return self.replace(layers=layers)

  def replace_rows(
    self, other: "LatentCache", rows: jax.Array
  ) -> "LatentCache":
    """Row b becomes row rows[b] of `other`, or stays where rows[b] is -1.

    Args:
      other: a cache of the same capacity, of any number of rows.
      rows: int32 [B].
    """
    taken, source = rows >= 0, jnp.maximum(rows, 0)

    def choose(mine, theirs):
      theirs = jnp.take(theirs, source, axis=1)
      return jnp.where(taken[None, :, None, None], theirs, mine)

    return LatentCache(
      layers=jax.tree.map(choose, self.layers, other.layers),
      lengths=jnp.where(taken, other.lengths[source], self.lengths),
    )

  def append(self, entries: LayerCache) -> "LatentCache":
    """Writes one token a row at its length.

    Args:
      entries: kv_latent [L, B, C], k_rope [L, B, R].
    """
    rows = jnp.arange(self.lengths.shape[0])

    def write(cache, entry):  # advanced indices lead: [B, L, C]
      entry = entry.swapaxes(0, 1)
      return cache.at[:, rows, :, self.lengths].set(entry, mode="drop")

    layers = jax.tree.map(write, self.layers, entries)
    return LatentCache(layers, self.lengths + 1)


class MLA(nn.Module):
  """Latent attention with low-rank queries, or plain ones if q_lora_rank=None.

  `__call__` is the expanded form, `decode` the absorbed form of the same
  weights: W^UK moves into the query and W^UV behind the sum over tokens.
  """

  cfg: ModelConfig

  def setup(self):
    c = self.cfg
    init, dtype = normal_init(c), jnp.dtype(c.param_dtype)
    n, d = c.num_attention_heads, c.hidden_size
    qk_head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
    if c.q_lora_rank is None:
      self.q_proj = self.param("q_proj", init, (d, n * qk_head_dim), dtype)
    else:
      self.q_a = self.param("q_a", init, (d, c.q_lora_rank), dtype)
      self.q_norm = RMSNorm(c)
      shape = (c.q_lora_rank, n * qk_head_dim)
      self.q_b = self.param("q_b", init, shape, dtype)
    shape = (d, c.kv_lora_rank + c.qk_rope_head_dim)
    self.kv_a = self.param("kv_a", init, shape, dtype)
    self.kv_norm = RMSNorm(c)
    shape = (c.kv_lora_rank, n * (c.qk_nope_head_dim + c.v_head_dim))
    self.kv_b = self.param("kv_b", init, shape, dtype)
    self.out_proj = self.param("out_proj", init, (n * c.v_head_dim, d), dtype)

  def query_latent(self, x: jax.Array) -> jax.Array:
    """c^Q, normalised; [B, T, D] -> [B, T, Q]."""
    return self.q_norm(linear(x, self.q_a))

  def _queries(self, x, rotations):
    """q_nope [B, T, N, H] and rotated q_rope [B, T, N, R]."""
    c = self.cfg
    if c.q_lora_rank is None:
      q = linear(x, self.q_proj)
    else:
      q = linear(self.query_latent(x), self.q_b)
    q = q.reshape(*x.shape[:2], c.num_attention_heads, -1)
    q_nope, q_rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
    return q_nope, apply_rope(q_rope, *rotations)

  def _latents(self, x, rotations):
    """Normalised kv_latent [B, T, C] and rotated k_rope [B, T, R]."""
    kv = linear(x, self.kv_a)
    kv_latent, k_rope = jnp.split(kv, [self.cfg.kv_lora_rank], axis=-1)
    return self.kv_norm(kv_latent), apply_rope(k_rope, *rotations)

  def _kv_up(self):
    """W^UK [C, N, H] and W^UV [C, N, h] of the packed kv_b."""
    c = self.cfg
    kv_b = self.kv_b.reshape(c.kv_lora_rank, c.num_attention_heads, -1)
    return jnp.split(kv_b, [c.qk_nope_head_dim], axis=-1)

  def _out(self, heads):
    return linear(heads.reshape(*heads.shape[:2], -1), self.out_proj)

  @property
  def _scale(self) -> float:
    c = self.cfg
    qk_head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
    return softmax_scale(qk_head_dim, c.rope_scaling)

  def __call__(self, x, rotations, positions, segment_ids):
    """Expanded form.

    Args:
      x: cfg.dtype [B, T, D].
      rotations: cos, sin of `rope_rotations`.
      positions: int32 [B, T].
      segment_ids: int32 [B, T]; 0 is padding.

    Returns:
      out [B, T, D] and the LayerCache of these tokens (T entries).
    """
    c = self.cfg
    q_nope, q_rope = self._queries(x, rotations)
    kv_latent, k_rope = self._latents(x, rotations)
    kv = linear(kv_latent, self.kv_b)
    kv = kv.reshape(*x.shape[:2], c.num_attention_heads, -1)
    k_nope, v = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)
    out, _ = kernel.mla_attention(
      q_nope,
      q_rope,
      k_nope,
      k_rope,
      v,
      positions,
      positions,
      segment_ids,
      segment_ids,
      scale=self._scale,
      query_chunk=c.attention_chunk,
    )
    cache = LayerCache(kv_latent.swapaxes(1, 2), k_rope.swapaxes(1, 2))
    return self._out(out), cache

  def decode(self, x, rotations, cache: LayerCache, lengths):
    """Absorbed form of one new token a row.

    The cache is only read: the token attends to itself apart and the two parts
    of its softmax are joined, so that no layer's cache is copied to add it.

    Args:
      x: cfg.dtype [B, 1, D].
      rotations: cos, sin at position `lengths`.
      cache: kv_latent [B, C, S], k_rope [B, R, S].
      lengths: int32 [B], entries of the cache in use.

    Returns:
      out [B, 1, D] and the token's entry: kv_latent [B, C], k_rope [B, R].
    """
    q_nope, q_rope = self._queries(x, rotations)
    kv_latent, k_rope = self._latents(x, rotations)
    k_up, v_up = self._kv_up()
    q_latent = dot("BTNH,CNH->BTNC", q_nope, k_up)
    slots = jnp.arange(cache.kv_latent.shape[-1], dtype=jnp.int32)
    held = (slots[None] < lengths[:, None]).astype(jnp.int32)
    position = lengths[:, None]
    one = jnp.ones_like(position)
    out_cache, lse_cache = kernel.mla_decode(
      q_latent,
      q_rope,
      cache.kv_latent,
      cache.k_rope,
      position,
      jnp.broadcast_to(slots[None], held.shape),
      one,
      held,
      scale=self._scale,
    )
    out_self, lse_self = kernel.mla_decode(
      q_latent,
      q_rope,
      kv_latent.swapaxes(1, 2),
      k_rope.swapaxes(1, 2),
      position,
      position,
      one,
      one,
      scale=self._scale,
    )
    latent = kernel.combine(out_cache, lse_cache, out_self, lse_self)
    heads = dot("BTNC,CNh->BTNh", latent, v_up)
    return self._out(heads), LayerCache(kv_latent[:, 0], k_rope[:, 0])
