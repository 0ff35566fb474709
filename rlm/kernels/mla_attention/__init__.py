"""Latent attention: the expanded form and the absorbed one.

`mla_attention` is for training and prefill, `mla_decode` for decoding over the
latent cache. Both take positions and segment ids of queries and keys, allow
T != S, and return the log-sum-exp of the scores beside the output, so that
parts of one softmax computed apart join exactly (`join_parts`).

| file | what |
|---|---|
| expanded.py, absorbed.py | the two front doors |
| reference.py | plain jnp: the definition of both |
| xla.py | the forms that XLA runs best |
| choice.py | which implementation a front door takes |
| caches.py | float8 latents, pages |
| parts.py | parts of one softmax, joined |
| visible.py, visits.py | which tiles meet; which ones decode visits |
| tpu_*.py | Pallas kernels for TPU |
| gpu_*.py | Pallas kernels for GPU |
| tiles.py | tile sizes by chip |
"""

from rlm.kernels.mla_attention.absorbed import mla_decode
from rlm.kernels.mla_attention.caches import (
  Float8Latents,
  PagedLatents,
  quantize_latents,
)
from rlm.kernels.mla_attention.expanded import mla_attention
from rlm.kernels.mla_attention.parts import join_parts

__all__ = [
  "Float8Latents",
  "PagedLatents",
  "join_parts",
  "mla_attention",
  "mla_decode",
  "quantize_latents",
]
