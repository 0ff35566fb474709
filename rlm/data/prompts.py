"""What a checkpoint is asked: text or messages -> the ids its model was given.

A folder brings its own way of asking. A published one (and one converted from
it, which keeps the files in `published/`) has a tokenizer and a chat template;
a base model has no template and continues plain text; a run of ours has the
tokenizer that its config names and the format of `rlm.data.chat_formats`.

  prompts = load_prompts(folder)
  ids = prompts.encode_prompt("What is 2 + 2?")
  ids = prompts.encode_messages([{"role": "user", "content": "..."}])

`Conversation` is what a chat asks turn by turn.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlm import files
from rlm.data.chat import check_characters
from rlm.data.chat_formats import load_chat
from rlm.data.chat_template import Message, read_tokenizer_config
from rlm.data.model_tokenizer import ModelTokenizer
from rlm.data.r1_chat import R1Chat
from rlm.data.thinking import opens_thinking
from rlm.data.tokenizer import (
  ANSWER,
  END_ANSWER,
  END_THINK,
  THINK,
)

_MARKUP = re.compile(f"({THINK}|{END_THINK}|{ANSWER}|{END_ANSWER})")


class PublishedPrompts:
  """Of a published model, by its tokenizer and its chat template.

  Args:
    folder: holds the tokenizer's files.

  Attributes:
    folder: where generation_config.json lies, if there is one.
    tokenizer: spells the ids.
    stop_tokens: ids that end a completion.
    has_messages: whether messages can be encoded; a base model continues text.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder: pathlib.Path | None = pathlib.Path(folder)
    self.tokenizer = ModelTokenizer(folder)
    self.stop_tokens = self.tokenizer.eos_ids
    config = read_tokenizer_config(folder)
    self.has_messages = _has_template(self.folder, config)
    if self.has_messages:
      _ = self.tokenizer.chat_template  # an unreadable one is told here
    # Llama 3's file leaves the key out and adds BOS by other means.
    self._adds_bos = config.get("add_bos_token", True)

  def encode_prompt(self, text: str) -> list[int]:
    """A user's message; BOS and the text itself where there is no template."""
    if self.has_messages:
      return self.encode_messages([{"role": "user", "content": text}])
    check_characters(text)
    ids = self.tokenizer.encode(text)
    bos = self.tokenizer.bos_id
    return ids if bos is None or not self._adds_bos else [bos, *ids]

  def encode_messages(self, messages: Sequence[Message]) -> list[int]:
    """A conversation, up to where the assistant's turn begins."""
    _check_messages(messages)
    if not self.has_messages:
      raise ValueError(
        f"{self.folder} has no chat template: it is a base model, which"
        " continues text. Give a prompt instead of messages."
      )
    return self.tokenizer.encode_chat(messages)


class RunPrompts:
  """Of a run of ours, in the format of R1.

  Args:
    chat: the run's.

  Attributes: as `PublishedPrompts`.
  """

  folder: pathlib.Path | None = None
  has_messages = True

  def __init__(self, chat: R1Chat):
    self._chat = chat
    self.tokenizer = chat.tokenizer
    self.stop_tokens = chat.stop_tokens

  def encode_prompt(self, text: str) -> list[int]:
    """A user's message."""
    check_characters(text)
    return self._chat.encode_question(text)

  def encode_messages(self, messages: Sequence[Message]) -> list[int]:
    """A conversation, up to where the assistant's turn begins.

    Of what the assistant said, markers become tokens wherever they stand: a
    completion that was cut is no less part of the conversation.
    """
    _check_messages(messages)
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(turns)
    if len(turns) % 2 == 0 or turns != expected[: len(turns)]:
      raise ValueError(
        f"roles are {', '.join(roles)}; this run was trained on an optional"
        " system, then user and assistant in turn. End with user."
      )
    t = self.tokenizer
    ids = [t.bos_id]
    for i, message in enumerate(messages):
      content = message.get("content")
      if not isinstance(content, str):
        raise ValueError(f"message {i} needs a text under 'content'.")
      if message["role"] == "user":
        ids += self._chat.encode_question(content)[1:]  # BOS stands once
      elif message["role"] == "system":
        ids += t.encode(content)
      else:
        for part in _MARKUP.split(content):
          special = t.special_ids.get(part)
          ids += t.encode(part) if special is None else [special]
        ids.append(t.eos_id)
    return ids


Prompts = PublishedPrompts | RunPrompts


def load_prompts(folder: str | os.PathLike) -> Prompts:
  """How the model in a folder is asked; no weights are read.

  Args:
    folder: any that `rlm.load_checkpoint` reads.

  Raises:
    ValueError: it is none of these, or its tokenizer or template is not usable.
  """
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise ValueError(f"{folder}: there is no such folder.")
  if not (root / "config.json").is_file():
    raise ValueError(
      f"{folder} holds no config.json: it is neither a published model's folder"
      " nor a run's."
    )
  config = files.read_json(root / "config.json")
  if not isinstance(config, dict):
    raise ValueError(f"{root / 'config.json'} holds no JSON object.")
  if "model_type" in config:
    return PublishedPrompts(root)
  if "order" in config:
    stages = [str(root / stage) for stage in config["order"]]
    raise ValueError(
      f"{folder} is a recipe's folder. Name one of its stages:"
      f" {', '.join(stages)}."
    )
  if (root / "published" / "tokenizer.json").is_file():
    return PublishedPrompts(root / "published")
  for key in ("model", "tokenizer"):
    if key not in config:
      raise ValueError(
        f"{root / 'config.json'} has no {key!r}: it is no published model's"
        " folder, which has model_type, and no training run's. A converted one"
        " has its tokenizer's files in published/."
      )
  chat = load_chat(config["tokenizer"])
  if isinstance(chat, R1Chat):
    return RunPrompts(chat)
  return PublishedPrompts(config["tokenizer"])


class Conversation:
  """The messages of a chat so far; without a template, each prompt by itself.

  Args:
    prompts: how the model is asked.
    system: text of a system message, or None.

  Raises:
    ValueError: the model takes no system message.
  """

  def __init__(self, prompts: Prompts, system: str | None = None):
    self._prompts = prompts
    self._messages: list[dict[str, Any]] = []
    if system is not None:
      self._messages = [{"role": "system", "content": system}]
      self.encode("?")  # what the template refuses is told before any weights
    self._first = len(self._messages)

  @property
  def is_new(self) -> bool:
    """Whether nothing was said yet."""
    return len(self._messages) == self._first

  def encode(self, text: str) -> list[int]:
    """Token ids of the conversation with what the user says next."""
    if not self._prompts.has_messages and not self._messages:
      return self._prompts.encode_prompt(text)
    return self._prompts.encode_messages(
      [*self._messages, {"role": "user", "content": text}]
    )

  def add(self, text: str, completion: str) -> None:
    """Adds a turn: what the user said and the model answered to it.

    The thinking stays in the assistant's content, for templates to strip;
    what the prompt opened belongs to it.
    """
    if not self._prompts.has_messages:
      return
    prompt = self._prompts.tokenizer.decode(self.encode(text))
    if opens_thinking(prompt):
      completion = prompt[prompt.rindex(THINK) :] + completion
    self._messages += [
      {"role": "user", "content": text},
      {"role": "assistant", "content": completion},
    ]

  def restart(self) -> None:
    """Forgets all turns; the system message stays."""
    del self._messages[self._first :]


def _has_template(folder: pathlib.Path, config: Mapping[str, Any]) -> bool:
  """Whether there is a template at all, readable or not."""
  return (
    (folder / "chat_template.jinja").is_file()
    or any((folder / "additional_chat_templates").glob("*.jinja"))
    or bool(config.get("chat_template"))
  )


def _check_messages(messages: Any) -> None:
  if not isinstance(messages, list) or not messages:
    raise ValueError(
      "messages must be a list of at least one object such as"
      ' {"role": "user", "content": "..."}.'
    )
  for i, message in enumerate(messages):
    if not isinstance(message, dict) or not isinstance(
      message.get("role"), str
    ):
      raise ValueError(
        f"message {i} is no object with a text under 'role', such as"
        ' {"role": "user", "content": "..."}.'
      )
    for value in message.values():
      if isinstance(value, str):
        check_characters(value)
