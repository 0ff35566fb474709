"""The chat with a published model, or any other checkpoint, turn by turn."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from experiments import launch
from experiments.terminal import (
  ask,
  interruptible,
  loading_bar,
  note,
  offer_history,
  show_piece,
)
from rlm import files
from rlm.data.prompts import Conversation
from rlm.data.thinking import ThinkingParser, opens_thinking
from rlm.data.tokenizer import StreamDecoder
from rlm.report.text import visible
from rlm.sampling.config import SamplingConfig
from rlm.sampling.generation_config import (
  GenerationConfig,
  read_generation_config,
)

NEW = "/new"  # what starts another conversation

MakeSampling = Callable[[flags.FlagValues, GenerationConfig], SamplingConfig]


def open_model(
  values: flags.FlagValues, make_sampling: MakeSampling, console: Any
) -> tuple[Any, SamplingConfig]:
  """The Checkpoint that the flags name, and how to draw from it.

  What a user should know of the two is printed; no weights are read.
  """
  folder = pathlib.Path(values.checkpoint)
  if "model_type" not in files.read_json(folder / "config.json"):
    launch.keep_compiled(values.checkpoint)  # a folder of ours, not a download
  from rlm.sampling.answering import open_checkpoint

  checkpoint = open_checkpoint(
    folder, dtype=values.dtype, quantize=values.quantize
  )
  defaults = GenerationConfig()
  if checkpoint.prompts.folder is not None:
    defaults = read_generation_config(checkpoint.prompts.folder)
  if defaults.not_applied:
    note(
      console,
      f"(generation_config.json asks for {', '.join(defaults.not_applied)},"
      " which is not applied.)",
    )
  if not checkpoint.prompts.has_messages:
    note(
      console,
      "(No chat template: a base model. It continues each prompt as text.)",
    )
  return checkpoint, make_sampling(values, defaults)


def run(values: flags.FlagValues, make_sampling: MakeSampling) -> None:
  """Answers --prompt, or converses."""
  from rich.console import Console

  console = Console(highlight=False)
  with interruptible():
    checkpoint, sampling = open_model(values, make_sampling, console)
    conversation = Conversation(checkpoint.prompts, values.system)
    if values.prompt is not None:  # what cannot be asked needs no weights
      checkpoint.room_after(conversation.encode(values.prompt))
    chat = Chat(checkpoint, sampling, conversation, values.seed)
    with loading_bar(console) as on_read:
      chat.load(on_read)
    if values.prompt is not None:
      chat.answer(values.prompt, console)
      return
    offer_history()
    chat.converse(console)


class Chat:
  """A conversation with a checkpoint.

  Args:
    checkpoint: rlm.sampling.answering.Checkpoint.
    sampling: how to draw.
    conversation: what was said so far.
    seed: the same seed and prompts give the same answers.
  """

  def __init__(
    self,
    checkpoint: Any,
    sampling: SamplingConfig,
    conversation: Conversation,
    seed: int,
  ):
    self.checkpoint = checkpoint
    self.conversation = conversation
    self._sampling = sampling
    self._seed = seed
    self._turn = 0  # prompts that came before; draws differ from turn to turn

  def load(self, on_read: Callable[[int, int], None]) -> None:
    """Reads the weights; `on_read` is told how far it is."""
    from rlm.sampling.answering import Answerer

    variables = self.checkpoint.load(on_read)
    self._answerer = Answerer(self.checkpoint, variables, self._sampling)

  def converse(self, console: Any) -> None:
    """Reads prompts and answers them until the input ends."""
    note(
      console,
      f"{self.checkpoint.folder} answers. {NEW} starts a new conversation,"
      " Ctrl-D ends.",
    )
    while (text := ask(console)) is not None:
      if not text:
        continue
      if text == NEW:
        self.conversation.restart()
        note(console, "(a new conversation)")
        continue
      try:
        self.answer(text, console)
      except KeyboardInterrupt:
        note(console, "(stopped; this turn is left out of the conversation)")
      except ValueError as error:
        note(console, f"error: {error}")
        if not self.conversation.is_new:
          note(console, f"({NEW} starts a new conversation.)")

  def answer(self, text: str, console: Any) -> None:
    """Streams one answer and adds the turn to the conversation.

    Raises:
      ValueError: the template refuses it, or it leaves no room in the context;
        the conversation is as it was.
    """
    import jax

    ids = self.conversation.encode(text)
    room = self.checkpoint.room_after(ids)
    key = jax.random.fold_in(jax.random.key(self._seed), self._turn)
    self._turn += 1
    tokens: list[int] = []

    def noted() -> Iterator[int]:
      for token in self._answerer.stream(ids, key):
        tokens.append(token)
        yield token

    tokenizer = self.checkpoint.prompts.tokenizer
    stops = self._answerer.sampling.stop_tokens
    inside = opens_thinking(tokenizer.decode(ids))
    try:
      for piece, style in styled(tokenizer, noted(), stops, inside):
        show_piece(console, piece, style)
    finally:
      console.print()
    stopped = tokens[-1] in stops
    if not stopped and len(tokens) == room:
      note(console, f"(cut: the context of {self.checkpoint.context} is full)")
    elif not stopped:
      note(console, f"(cut after {len(tokens)} tokens: --max_new_tokens)")
    said = tokenizer.decode(tokens[:-1] if stopped else tokens)
    self.conversation.add(text, said)


def styled(
  tokenizer: Any, tokens: Iterator[int], stops: tuple[int, ...], inside: bool
) -> Iterator[tuple[str, str]]:
  """Pieces of a completion to show, safe for a terminal, and their styles.

  Args:
    tokenizer: spells the tokens.
    tokens: of the completion; those in `stops` are left out.
    stops: ids that end it.
    inside: the prompt has opened thinking.

  Yields:
    (text, style): "dim" for thinking, "" for the answer.
  """
  stream, parser = StreamDecoder(tokenizer), ThinkingParser(inside)
  for token in tokens:
    if token not in stops:
      yield from _pieces(parser.push(stream.push(token)))
  yield from _pieces(parser.push(stream.finish()))
  yield from _pieces(parser.finish())


def _pieces(parts: list[tuple[Any, str]]) -> Iterator[tuple[str, str]]:
  for kind, text in parts:
    yield visible(text), "dim" if kind == "thinking" else ""
