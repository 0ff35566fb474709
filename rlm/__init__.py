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

Three lines for importers:

  model, variables = rlm.load_checkpoint(folder, dtype="float32")
  logits = model.logits(variables, tokens)
  out = rlm.generate(model, variables, prompts, key, max_new_tokens=64)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from rlm.checkpoint.load import load_checkpoint as load_checkpoint
  from rlm.sampling.generate import generate as generate

__version__ = "0.1.0"

# Found on first use: importing rlm must not start jax.
_PLACES = {
  "load_checkpoint": "rlm.checkpoint.load",
  "generate": "rlm.sampling.generate",
}


def __getattr__(name: str) -> Any:
  if name not in _PLACES:
    raise AttributeError(f"module 'rlm' has no attribute {name!r}")
  return getattr(importlib.import_module(_PLACES[name]), name)
