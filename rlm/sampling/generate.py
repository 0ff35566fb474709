"""Completions in one call, for importers; experiments use `Sampler`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from rlm.models.transformer import Transformer
from rlm.parallel.config import replicas
from rlm.sampling.config import SamplingConfig
from rlm.sampling.sampler import Sampler, bucket_length, request_keys

MAX_SLOTS = 64  # rows decoded together at most; further prompts wait


@dataclasses.dataclass(frozen=True)
class Generated:
  """What `generate` gives, one entry per prompt.

  Attributes:
    tokens: ids drawn, the one that ended the completion included.
    logprobs: float32 [len(tokens)] of each, under the distribution drawn from.
    finish_reasons: "stop" after a stop token, "length" at max_new_tokens.
  """

  tokens: list[list[int]]
  logprobs: list[np.ndarray]
  finish_reasons: list[Literal["stop", "length"]]


def generate(
  model: Transformer,
  variables: Any,
  prompts: Sequence[Sequence[int]],
  key: jax.Array,
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  stop_tokens: Sequence[int] | None = None,
  devices: int = 1,
) -> Generated:
  """Completes prompts by the model's own distribution.

  A prompt's completion depends on its place in the list and not on the other
  prompts. Compiles once for near lengths and numbers of prompts.

  Args:
    model: of `load_checkpoint`, say.
    variables: its variables.
    prompts: token ids of each.
    key: of the whole call.
    max_new_tokens: longest completion.
    temperature: divides the logits; 0 takes the likeliest token each time.
    top_k: tokens kept at each step; 0 keeps all.
    top_p: probability kept at each step, in (0, 1].
    stop_tokens: ids that end a completion; None takes `cfg.eos_token_id`.
    devices: of jax, that share the work.

  Raises:
    ValueError: a setting is out of range, or a prompt is empty, holds an
      unknown id or does not fit the context together with its completion.
  """
  c = model.cfg
  if not prompts:
    raise ValueError("no prompts: give at least one.")
  longest = max(len(prompt) for prompt in prompts)
  if longest + max_new_tokens > c.max_position_embeddings:
    raise ValueError(
      f"the longest prompt has {longest} tokens, which with {max_new_tokens=}"
      f" exceeds the model's context of {c.max_position_embeddings}"
      " (max_position_embeddings). Shorten one of them."
    )
  if stop_tokens is None:
    stop_tokens = c.eos_token_id
  room = min(
    bucket_length(max(longest, 1)), c.max_position_embeddings - max_new_tokens
  )
  if c.attention_chunk and room > c.attention_chunk:
    # Chunks must divide the room; where that exceeds the context, none.
    rounded = bucket_length(room, c.attention_chunk)
    if rounded + max_new_tokens <= c.max_position_embeddings:
      room = rounded
    else:
      model = Transformer(dataclasses.replace(c, attention_chunk=0))
  sampler = Sampler(
    model,
    SamplingConfig(
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      max_new_tokens=max_new_tokens,
      stop_tokens=tuple(int(token) for token in stop_tokens),
    ),
    slots=_slots(len(prompts), devices),
    prompt_length=room,
    mesh=replicas(devices),
    eos_token=None,
    pad_token=0,
  )
  keys = request_keys(key, len(prompts))
  done = sampler.generate(variables, prompts, keys)
  reasons: dict[bool, Literal["stop", "length"]]
  reasons = {True: "stop", False: "length"}
  return Generated(
    tokens=[
      row[:length].tolist()
      for row, length in zip(done.tokens, done.lengths, strict=True)
    ],
    logprobs=[
      row[:length]
      for row, length in zip(done.logprobs, done.lengths, strict=True)
    ],
    finish_reasons=[reasons[bool(finished)] for finished in done.finished],
  )


def _slots(prompts: int, devices: int) -> int:
  """A power of two per device, so that few numbers are ever compiled."""
  share = -(-prompts // devices)
  rounded = 1 << max(share - 1, 0).bit_length()
  return devices * max(min(rounded, MAX_SLOTS // devices), 1)
