"""What decode remembers of the tokens before, for either kind of attention."""

import flax
import jax
import jax.numpy as jnp

from rlm.kernels.backend import backend
from rlm.models.config import ModelConfig


@flax.struct.dataclass
class TokenCache:
  """The cache of all layers. Entry s of a row is its token at position s.

  Attributes:
    layers: per layer, dense layers first, cfg.dtype [B, W, S], W being
      `cfg.cache_width`. Latent attention keeps the normalised latent c^KV over
      the rotated key k^R shared by all heads (W = C + R), grouped-query
      attention the rotated keys of its M heads over their values (W = 2 M H).
      Separate arrays and not a stack, so that decode reads a layer and adds a
      token in place. Tokens are the minor axis, which the CPU's products of
      decode need.
    lengths: int32 [B], tokens held by each row; later entries are unread.
  """

  layers: tuple[jax.Array, ...]
  lengths: jax.Array

  @classmethod
  def empty(cls, cfg: ModelConfig, batch: int, capacity: int) -> "TokenCache":
    """A cache of no tokens with room for `capacity` of them in each row."""
    shape = (batch, cfg.cache_width, capacity)
    # Each layer its own zeros: a buffer cannot be donated twice.
    return cls(
      layers=tuple(
        jnp.zeros(shape, cfg.dtype) for _ in range(cfg.num_hidden_layers)
      ),
      lengths=jnp.zeros((batch,), jnp.int32),
    )

  @property
  def capacity(self) -> int:
    """Tokens that a row has room for."""
    return self.layers[0].shape[-1]

  def extend(self, capacity: int) -> "TokenCache":
    """The same tokens with room for `capacity` in each row."""
    more = capacity - self.capacity
    if more < 0:
      raise ValueError(
        f"A cache of {self.capacity} tokens cannot shrink to {capacity}."
      )
    pad = [(0, 0), (0, 0), (0, more)]
    layers = tuple(jnp.pad(layer, pad) for layer in self.layers)
    return TokenCache(layers, self.lengths)

  def replace_rows(self, other: "TokenCache", rows: jax.Array) -> "TokenCache":
    """Row b becomes row rows[b] of `other`, or stays where rows[b] is -1.

    Args:
      other: a cache of the same capacity, of any number of rows.
      rows: int32 [B].
    """
    taken, source = rows >= 0, jnp.maximum(rows, 0)

    def choose(mine, theirs):
      theirs = jnp.take(theirs, source, axis=0)
      return jnp.where(taken[:, None, None], theirs, mine)

    return TokenCache(
      layers=tuple(map(choose, self.layers, other.layers)),
      lengths=jnp.where(taken, other.lengths[source], self.lengths),
    )


def room_for(tokens: int) -> int:
  """The capacity of a cache for so many tokens in each row.

  Kernels read whole tiles of 128 tokens; what a row does not use is never seen.
  """
  return tokens if backend() == "cpu" else -(-tokens // 128) * 128


def write_entry(layer: jax.Array, entry: jax.Array, at: jax.Array) -> jax.Array:
  """Writes one token a row into a layer's cache; nowhere if it is full.

  Args:
    layer: [B, W, S].
    entry: [B, W].
    at: int32 [B].
  """
  rows = jnp.arange(layer.shape[0])
  return layer.at[rows, :, at].set(entry, mode="drop")
