"""rlm: reasoning language models in JAX, after DeepSeek-V3 and R1.

Axis letters, the same in docstrings (`bfloat16 [B, T, D]`), in einsums and as
suffixes of locals (`rewards_PG`):

  B rows            N heads                V vocabulary
  T query tokens    H nope dim             E experts
  S key tokens      R rope dim             K experts per token
  D hidden          h value dim            F expert width
  L layers          C kv_lora_rank         P prompts
                    Q q_lora_rank          G completions; B = P * G

Masks are bool with True = keep, positions and ids int32, segment id 0 is
padding, log-probs are in nats and lengths in tokens.
"""

__version__ = "0.1.0"
