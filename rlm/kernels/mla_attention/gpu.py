"""The GPU's kernels behind the front doors."""

import jax

from rlm.kernels.mla_attention import gpu_attention
from rlm.kernels.mla_attention.caches import Cache

attention_obstacle = gpu_attention.attention_obstacle
attention = gpu_attention.attention


def decode_obstacle(q: jax.Array, kv: Cache, kv_lora_rank: int) -> str | None:
  """Why `decode` cannot run these operands, or None."""
  return "there is no GPU kernel yet"


def decode(*_, **__):
  raise NotImplementedError
