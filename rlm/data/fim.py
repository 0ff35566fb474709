"""Fill-in-the-middle: a share of the documents, rearranged before packing.

DeepSeek-V3 2.2.1 (arXiv:2412.19437), prefix-suffix-middle order at rate 0.1:

  begin prefix hole suffix end middle eos

The cuts fall between characters, not tokens, as a user's cursor does.
"""

import random

from rlm.data.tokenizer import Tokenizer


def split_text(text: str, rng: random.Random) -> tuple[str, str, str]:
  """Cuts a text at two uniform places into prefix, middle and suffix."""
  a = int(rng.random() * (len(text) + 1))
  b = int(rng.random() * (len(text) + 1))
  a, b = min(a, b), max(a, b)
  return text[:a], text[a:b], text[b:]


def fim_tokens(
  tokenizer: Tokenizer, prefix: str, middle: str, suffix: str
) -> list[int]:
  """Prefix-suffix-middle token ids of a cut text, with EOS and without BOS."""
  return [
    tokenizer.fim_begin_id,
    *tokenizer.encode(prefix),
    tokenizer.fim_hole_id,
    *tokenizer.encode(suffix),
    tokenizer.fim_end_id,
    *tokenizer.encode(middle),
    tokenizer.eos_id,
  ]
