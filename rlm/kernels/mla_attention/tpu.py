"""The TPU's kernels behind the front doors."""

from rlm.kernels.mla_attention import tpu_attention, tpu_decode

attention_obstacle = tpu_attention.attention_obstacle
attention = tpu_attention.attention
decode_obstacle = tpu_decode.decode_obstacle
decode = tpu_decode.decode
