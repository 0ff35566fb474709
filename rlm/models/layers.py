"""What every block is made of: the product, RMSNorm, SwiGLU, embedding."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlm.kernels.product import einsum
from rlm.models.config import ModelConfig
from rlm.models.quantized import Int8Matrix, operand
from rlm.parallel.shard import WHOLE, Whole


def normal_init(cfg: ModelConfig) -> nn.initializers.Initializer:
  """Normal of std `initializer_range`, for every matrix (sheet 2.6)."""
  return nn.initializers.normal(stddev=cfg.initializer_range)


# What attention gives before its output projection, for policies of
# rematerialisation.
ATTENTION_OUTPUT = "attention"


def parameter(
  module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple
) -> jax.Array:
  """A parameter of `module`, of cfg.param_dtype; a part of it on a mesh.

  Args:
    module: with a `cfg`.
    name: of the parameter.
    init: draws the whole of it.
    shape: of the whole; what is given may be a part in any dimension.

  Raises:
    ValueError: what is given is no part of that shape.
  """
  if not module.has_variable("params", name):
    return module.param(name, init, shape, jnp.dtype(module.cfg.param_dtype))
  given = module.get_variable("params", name)
  if len(given.shape) != len(shape) or any(
    whole % part for whole, part in zip(shape, given.shape, strict=True)
  ):
    raise ValueError(
      f"the parameter {'/'.join((*module.path, name))} has the shape"
      f" {given.shape}, of which {shape} is needed. The variables are of"
      " another model."
    )
  return given


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
  # Of `Shard.enter_tensor` where only some heads are normed here.
  enter: Callable[[jax.Array], jax.Array] = lambda scale: scale

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
    return rms_norm(x, self.enter(scale), eps=self.cfg.rms_norm_eps)


def swiglu(x, gate_proj, up_proj, down_proj) -> jax.Array:
  """W_down (silu(W_gate x) * W_up x); [..., D] -> [..., D]."""
  return linear(nn.silu(linear(x, gate_proj)) * linear(x, up_proj), down_proj)


class SwiGLU(nn.Module):
  """The feed-forward layer, also the shared experts fused into one."""

  cfg: ModelConfig
  width: int
  shard: Whole = WHOLE

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init, d, f = normal_init(self.cfg), self.cfg.hidden_size, self.width
    gate_proj = parameter(self, "gate_proj", init, (d, f))
    up_proj = parameter(self, "up_proj", init, (d, f))
    down_proj = parameter(self, "down_proj", init, (f, d))
    x = self.shard.enter_tensor(x)
    return self.shard.leave_tensor(swiglu(x, gate_proj, up_proj, down_proj))


class Embedding(nn.Module):
  """Token ids to vectors; int32 [B, T] -> cfg.dtype [B, T, D]."""

  cfg: ModelConfig
  shard: Whole = WHOLE

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    c = self.cfg
    shape = (c.vocab_size, c.hidden_size)
    embedding = parameter(self, "embedding", normal_init(c), shape)
    return self.shard.lookup(embedding, tokens, c.dtype)
