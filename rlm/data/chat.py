"""How a model is written to: conversations <-> token ids and loss masks.

`Chat` is the face that data, rewards and sampling know. Two formats have it:
`rlm.data.r1_chat`, the one our recipe trains, and `rlm.data.template_chat`,
that of a published model. `rlm.data.chat_formats` picks one by a tokenizer.
"""

import abc
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rlm import files
from rlm.data.chat_template import REASONING
from rlm.data.jsonl import read_jsonl
from rlm.data.tokenizer import Tokenizer, Vocabulary

# Tokens of a document, and its loss mask: True where the model learns to write.
Turn = tuple[list[int], list[bool]]


@dataclasses.dataclass(frozen=True)
class Trace:
  """One worked turn: what supervised fine-tuning learns from.

  Attributes:
    question: what the user said.
    response: what the assistant answered, thinking included.
  """

  question: str
  response: str


class Chat(abc.ABC):
  """The format of a conversation.

  Attributes:
    tokenizer: spells text; its `special_ids` are the control tokens.
    stop_tokens: ids that end a completion, the one that a response is taught to
      end with first.
    pad_id: fills rows.
    answer_format: where a response has its answer; a key of
      `rlm.rewards.answers.PARSERS`.
  """

  tokenizer: Vocabulary
  stop_tokens: tuple[int, ...]
  pad_id: int
  answer_format: Literal["tags", "boxed"]

  @property
  def markers(self) -> Tokenizer:
    """The tokenizer, for text that is no conversation.

    Raises:
      ValueError: it lacks markers.
    """
    if not isinstance(self.tokenizer, Tokenizer):
      raise ValueError(
        "text outside a conversation needs the markers of rlm.data.tokenizer,"
        f" which {self.tokenizer!r} lacks. Write a copy that has them with"
        " rlm.data.tokenizer.add_markers, or train on conversations alone"
        " (messages, or tasks with tagged=1.0)."
      )
    return self.tokenizer

  @abc.abstractmethod
  def question(self, prompt: str) -> str:
    """What the user says to have a problem solved."""

  @abc.abstractmethod
  def encode_question(self, question: str) -> list[int]:
    """What a sampler is given: a user's message, up to the assistant's turn."""

  @abc.abstractmethod
  def encode_response(self, thinking: str, answer: str) -> list[int]:
    """A worked solution as the completion of a prompt, its end included."""

  @abc.abstractmethod
  def encode_messages(self, messages: Sequence[dict[str, Any]]) -> list[Turn]:
    """A conversation, as documents to learn from.

    Args:
      messages: {"role", "content"} each, ending with the assistant. Its
        thinking stands in the content as `<think>..</think>`, or apart from it
        under one of `chat_template.REASONING`.

    Raises:
      ValueError: wrong order of roles, empty content, or broken markup.
    """

  @abc.abstractmethod
  def response_text(self, tokens: Iterable[int]) -> str:
    """The text of a response, without its end, as rewards read it.

    Args:
      tokens: of the completion; what the prompt opened is put before them.
    """

  def encode_prompt(self, prompt: str) -> list[int]:
    """A problem, as the sampler is asked it."""
    return self.encode_question(self.question(prompt))

  def encode_turn(self, prompt: str, thinking: str, answer: str) -> Turn:
    """A problem with a worked solution, True on the response."""
    asked = self.encode_prompt(prompt)
    said = self.encode_response(thinking, answer)
    return asked + said, [False] * len(asked) + [True] * len(said)


def load_messages(
  path: str | os.PathLike, chat: Chat, *, row_length: int
) -> list[Turn]:
  """Conversations of a JSONL file, `{"messages": [{"role", "content"}...]}`.

  Args:
    path: the file, a conversation per line.
    chat: how they are written.
    row_length: tokens of a row; a conversation is never cut.

  Returns:
    (tokens, loss mask) of each document that `chat` makes of the lines.

  Raises:
    ValueError: see `read_jsonl` and `Chat.encode_messages`, or a conversation
      longer than a row; each with file and line.
  """
  documents = []
  for number, record in read_jsonl(path):
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(
      isinstance(message, dict) for message in messages
    ):
      raise ValueError(
        f'{path}:{number}: needs a list of objects under "messages", has the'
        f" keys {', '.join(record) or 'none'}."
      )
    try:
      for tokens, mask in chat.encode_messages(messages):
        check_fits(len(tokens), row_length, "this conversation")
        documents.append((tokens, mask))
    except ValueError as error:
      raise ValueError(f"{path}:{number}: {error}") from error
  return documents


def save_messages(path: str | os.PathLike, traces: Iterable[Trace]) -> None:
  """Writes a messages file that `load_messages` reads, atomically."""
  lines = []
  for trace in traces:
    messages = [
      {"role": "user", "content": trace.question},
      {"role": "assistant", "content": trace.response},
    ]
    lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
  text = "".join(line + "\n" for line in lines)
  files.write_bytes(path, text.encode("utf-8"))


def content_of(message: dict[str, Any], index: int) -> tuple[str | None, str]:
  """What a message says: its thinking if it stands apart, and its content.

  Raises:
    ValueError: one is no text, it says nothing, or it calls tools, which is not
      learned.
  """
  what = f"message {index} ({message.get('role')})"
  if message.get("tool_calls"):
    raise ValueError(
      f"{what} has tool_calls, which are not learned. Remove the conversation,"
      " or write the calls into the content."
    )
  content = message.get("content")
  thinking = [message[name] for name in REASONING if message.get(name)]
  for text in (content, *thinking):
    if not isinstance(text, str) or not text.strip():
      raise ValueError(
        f"{what} has empty content, or none that is a text. Remove the"
        " conversation or fill the message."
      )
    check_characters(text)
  return (thinking[0] if thinking else None), str(content)


def check_characters(text: str) -> None:
  """Half a surrogate pair is a string in Python and JSON, but is no text."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(
      f"character {error.start + 1} of the text is half a surrogate pair"
      f" ({text[error.start]!a}), which no tokenizer reads. Remove it."
    ) from error


def check_fits(length: int, row_length: int, what: str) -> None:
  """Raises ValueError if a document that is never cut exceeds a row."""
  if length > row_length:
    raise ValueError(
      f"{what} is {length} tokens long, but a row has {row_length=}. Shorten"
      f" it, or set row_length to at least {length}."
    )
