"""The GPU's kernels behind the front doors."""

from rlm.kernels.mla_attention import gpu_attention, gpu_decode

attention_obstacle = gpu_attention.attention_obstacle
attention = gpu_attention.attention
decode_obstacle = gpu_decode.decode_obstacle
decode = gpu_decode.decode
