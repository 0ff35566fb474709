"""What every block is made of: the product, RMSNorm, SwiGLU, embedding."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlm.kernels.product import einsum
from rlm.models.config import ModelConfig
from rlm.models.quantized import Int8Matrix, operand


def normal_init(cfg: ModelConfig) -> nn.initializers.Initializer:
  """Normal of std `initializer_range`, for every matrix (sheet 2.6)."""
  return nn.initializers.normal(stddev=cfg.initializer_range)


def dot(subscripts: str, x: jax.Array, w: jax.Array | Int8Matrix) -> jax.Array:
  """Activations times parameters, in the dtype of the activations.

  Args:
    subscripts: einsum subscripts, as in `jnp.einsum`.
    x: activations; their dtype is the precision of the product.
    w: parameters, cast to the dtype of `x`.

  Returns:
    The product in the dtype of `x`.
  """
  return einsum(subscripts, x, operand(w, x)).astype(x.dtype)


def linear(x: jax.Array, w: jax.Array | Int8Matrix) -> jax.Array:
  """[..., D] times [D, F] -> [..., F].

  The leading axes are joined first: contracting two of them in the weight's
  gradient costs the CPU far more than contracting one.
  """
  rows = x.reshape(-1, x.shape[-1])
  return dot("ND,DF->NF", rows, w).reshape(*x.shape[:-1], w.shape[-1])


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
  """X / rms(x) * scale over the last axis, in float32, cast back.

  Args:
    x: [..., D].
    scale: [D].
    eps: added to the mean square.

  Returns:
    [..., D] in the dtype of `x`.
  """
  x32 = x.astype(jnp.float32)
  variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(variance + eps)
  scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
  return (normed * scale).astype(x.dtype)


class RMSNorm(nn.Module):
  """Root-mean-square norm with a scale that starts at 1."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.cfg
    dtype = jnp.dtype(c.param_dtype)
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), dtype)
    return rms_norm(x, scale, eps=c.rms_norm_eps)


def swiglu(x, gate_proj, up_proj, down_proj) -> jax.Array:
  """W_down (silu(W_gate x) * W_up x); [..., D] -> [..., D]."""
  return linear(nn.silu(linear(x, gate_proj)) * linear(x, up_proj), down_proj)


class SwiGLU(nn.Module):
  """The feed-forward layer, also the shared experts fused into one."""

  cfg: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.cfg
    init, dtype = normal_init(c), jnp.dtype(c.param_dtype)
    d, f = c.hidden_size, self.width
    gate_proj = self.param("gate_proj", init, (d, f), dtype)
    up_proj = self.param("up_proj", init, (d, f), dtype)
    down_proj = self.param("down_proj", init, (f, d), dtype)
    return swiglu(x, gate_proj, up_proj, down_proj)


class Embedding(nn.Module):
  """Token ids to vectors; int32 [...] -> cfg.dtype [..., D]."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    c = self.cfg
    shape = (c.vocab_size, c.hidden_size)
    dtype = jnp.dtype(c.param_dtype)
    embedding = self.param("embedding", normal_init(c), shape, dtype)
    return jnp.take(embedding, tokens, axis=0).astype(c.dtype)
