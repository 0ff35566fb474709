"""Any checkpoint, asked and answering, up to the last token of its context.

  checkpoint = open_checkpoint(folder)  # no weights are read
  ids = checkpoint.prompts.encode_prompt("What is 2 + 2?")
  checkpoint.room_after(ids)  # a ValueError where there is none
  answerer = Answerer(checkpoint, checkpoint.load(), sampling)
  for token in answerer.stream(ids, key): ...

A slot has room for one length of prompt and one of completion, so that a short
prompt beside a long one could not use the whole context. The slots are
therefore made longer than the context, and what is drawn past its end is thrown
away: no token before depends on it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax

from rlm import files
from rlm.checkpoint.load import load_checkpoint
from rlm.config import build
from rlm.data.prompts import Prompts, load_prompts
from rlm.models.config import ModelConfig
from rlm.models.published_config import read_published_config
from rlm.models.transformer import Transformer
from rlm.parallel.config import replicas
from rlm.sampling.config import SamplingConfig
from rlm.sampling.sampler import Sampler, bucket_length

FinishReason = Literal["stop", "length"]

_STREAMED = 4  # tokens decoded before they are shown: 1 would stream slower
# Prompts longer than this are prefilled in parts of it: the scores of a whole
# long one against itself would not fit.
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A folder whose weights are not read yet.

  Attributes:
    folder: a published one, a converted one, or a run's.
    prompts: how its model is asked.
    cfg: its sizes; ids that its tokenizer lacks are not in use.
    stop_tokens: ids that end a completion.
    dtype: of `load_checkpoint`.
    quantize: likewise.
  """

  folder: pathlib.Path
  prompts: Prompts
  cfg: ModelConfig
  stop_tokens: tuple[int, ...]
  dtype: str | None
  quantize: str | None

  @property
  def context(self) -> int:
    """Tokens of prompt and completion together, at most."""
    return self.cfg.max_position_embeddings

  def room_after(self, ids: Sequence[int]) -> int:
    """Tokens that the context has room for after a prompt.

    Raises:
      ValueError: none, or the prompt is empty or holds an unknown id.
    """
    if not ids:
      raise ValueError("the prompt has no tokens. Begin it with one.")
    if not 0 <= min(ids) <= max(ids) < self.cfg.n_vocab_used:
      raise ValueError(
        f"the prompt holds an id outside 0..{self.cfg.n_vocab_used - 1}, the"
        " ids of this model. Was it made by another tokenizer?"
      )
    if len(ids) >= self.context:
      raise ValueError(
        f"the prompt has {len(ids)} tokens with its markers; the model's"
        f" context of {self.context} has no room to answer. Shorten it."
      )
    return self.context - len(ids)

  def load(
    self, on_read: Callable[[int, int], None] = lambda done, total: None
  ) -> Any:
    """The variables; see `load_checkpoint`."""
    _, variables = load_checkpoint(
      self.folder,
      dtype=self.dtype,
      quantize=self.quantize,
      mtp=False,
      on_read=on_read,
    )
    return variables


def open_checkpoint(
  folder: str | os.PathLike,
  *,
  dtype: str | None = None,
  quantize: str | None = None,
) -> Checkpoint:
  """Reads everything but the weights.

  Args:
    folder: any that `load_checkpoint` reads.
    dtype: of parameters and activations; None keeps what the folder says.
    quantize: "int8" for a quarter of the memory, or None.

  Raises:
    ValueError: the folder is none of these, or its tokenizer belongs to
      another model.
  """
  root = pathlib.Path(folder)
  prompts = load_prompts(root)
  config = files.read_json(root / "config.json")
  if "model_type" in config:
    cfg = read_published_config(root, dtype=dtype, param_dtype=dtype)
  else:
    cfg = build(ModelConfig, config["model"], "config.model")
    if dtype is not None:
      changes: Any = {"dtype": dtype, "param_dtype": dtype}
      cfg = dataclasses.replace(cfg, **changes)
  known = prompts.tokenizer.n_vocab_used
  if known > cfg.vocab_size:
    raise ValueError(
      f"{folder}: the tokenizer has {known} ids and the model"
      f" vocab_size={cfg.vocab_size}. The files belong to different models."
    )
  # Published embeddings are padded; a draw from the padding has no text.
  used = min(known, cfg.n_vocab_used)
  stops = dict.fromkeys([*prompts.stop_tokens, *cfg.eos_token_id])
  cfg = dataclasses.replace(cfg, n_vocab_used=used, num_nextn_predict_layers=0)
  return Checkpoint(
    folder=root,
    prompts=prompts,
    cfg=cfg,
    stop_tokens=tuple(token for token in stops if token < used),
    dtype=dtype,
    quantize=quantize,
  )


class Answerer:
  """Completes prompts of a loaded checkpoint.

  Args:
    checkpoint: the folder.
    variables: what `checkpoint.load` gave.
    sampling: how to draw; its stop tokens are added to the checkpoint's.
  """

  def __init__(
    self, checkpoint: Checkpoint, variables: Any, sampling: SamplingConfig
  ):
    self.checkpoint = checkpoint
    self.sampling = dataclasses.replace(
      sampling,
      stop_tokens=tuple(
        dict.fromkeys([*checkpoint.stop_tokens, *sampling.stop_tokens])
      ),
    )
    self._variables = variables
    self._streamers: dict[int, Sampler] = {}

  def stream(self, ids: Sequence[int], key: jax.Array) -> Iterator[int]:
    """Yields the tokens of one completion, the one that ends it included.

    Compiles once for all prompts between two powers of two.

    Raises:
      ValueError: see `Checkpoint.room_after`.
    """
    left = self.checkpoint.room_after(ids)
    length = max(64, 1 << (len(ids) - 1).bit_length())
    if length not in self._streamers:
      context = self.checkpoint.context
      self._streamers[length] = self.make_sampler(
        slots=1,
        prompt_length=length,
        longest=context - 1,
        steps_per_call=_STREAMED,
      )
    for part in self._streamers[length].stream(self._variables, ids, key):
      yield from part[:left]
      left -= len(part)
      if left <= 0:
        return

  def complete(
    self, sampler: Sampler, prompts: Sequence[Sequence[int]], keys: Any
  ) -> list[tuple[list[int], FinishReason]]:
    """Tokens of each prompt's completion, and why it ended.

    Args:
      sampler: of `make_sampler`; its shape fixes the bits.
      prompts: token ids of each.
      keys: one per prompt.

    Raises:
      ValueError: see `Checkpoint.room_after`.
    """
    rooms = [self.checkpoint.room_after(ids) for ids in prompts]
    drawn = sampler.generate(self._variables, prompts, keys)
    completions: list[tuple[list[int], FinishReason]] = []
    for row, length, room in zip(
      drawn.tokens, drawn.lengths, rooms, strict=True
    ):
      tokens = row[: min(length, room)].tolist()
      stopped = tokens[-1] in self.sampling.stop_tokens
      completions.append((tokens, "stop" if stopped else "length"))
    return completions

  def make_sampler(
    self,
    *,
    slots: int,
    prompt_length: int,
    longest: int,
    steps_per_call: int | None = None,
  ) -> Sampler:
    """A sampler of which `complete` cuts what passes the context.

    Args:
      slots: rows decoded together.
      prompt_length: room for prompts, of `batch_prompt_length` or a power of 2.
      longest: tokens that any of the prompts leaves room for.
      steps_per_call: see `Sampler`.
    """
    sampling = dataclasses.replace(
      self.sampling,
      max_new_tokens=min(self.sampling.max_new_tokens, longest),
    )
    cfg = dataclasses.replace(
      self.checkpoint.cfg,
      max_position_embeddings=prompt_length + sampling.max_new_tokens,
      attention_chunk=_CHUNK if prompt_length > _CHUNK else 0,
    )
    return Sampler(
      Transformer(cfg),
      sampling,
      slots=slots,
      prompt_length=prompt_length,
      mesh=replicas(1),
      eos_token=None,
      pad_token=0,  # fed to ended rows, and seen nowhere
      steps_per_call=steps_per_call,
    )


def batch_prompt_length(longest: int) -> int:
  """Room for the prompts of a batch whose longest has so many tokens."""
  return bucket_length(longest, 32 if longest <= _CHUNK else _CHUNK)
