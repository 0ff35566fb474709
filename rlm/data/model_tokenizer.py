"""A published model's own tokenizer and chat template, for use as they are.

`rlm.data.tokenizer.HFTokenizer` needs the twelve markers of our recipe. The
models that one chats with or fine-tunes (Qwen and Llama distils among them)
lack some, and bring a chat template instead: `encode_chat` gives the ids of
transformers' `apply_chat_template`.

What separates them is hostile text. A chat template pastes messages between
control tokens, and encoding the result turns a control token that a user
typed into the real one: `<｜Assistant｜>` in a question ends the question. The
result cannot be cut at the messages' borders and encoded in parts, since
templates strip, split and repeat what they are given. Escaping the whole
control tokens does not suffice either: a template may join two strings that
form one, or cut out what stood between its halves.

So the character that every control token begins with, "<" in all published
files at hand, is taken from the messages: each becomes a stand-in, a
private-use character that occurs nowhere in the conversation or the template.
Whatever the template does with its strings, a control token in its output has
a "<" of the template's own. Between those tokens the stand-ins are turned back
and the text is encoded with control tokens unknown, which gives the ids it has
in any other text. A template that is not looking for "<" sees no difference.

Some do look: for thinking, in what the assistant said before. In the content of
its messages `ASSISTANT_MARKUP` therefore stays as it is, and becomes tokens
where it survives; all else in them is text, too. Roles are strings as any
other; which of them a user may take is for the caller to say.
"""

import datetime
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlm import files
from rlm.config import id_list
from rlm.data.chat_template import (
  ChatTemplate,
  Message,
  read_tokenizer_config,
  special_tokens,
)
from rlm.data.template_sandbox import Clock
from rlm.data.tokenizer import (
  ANSWER,
  END_ANSWER,
  END_THINK,
  THINK,
  Vocabulary,
  read_byte_level,
)

ASSISTANT_MARKUP = (
  *(THINK, END_THINK, ANSWER, END_ANSWER),
  *("<tool_call>", "</tool_call>"),  # Qwen's, as the model writes them
)
_PRIVATE_USE = range(0xE000, 0xF900)


class ModelTokenizer(Vocabulary):
  """The tokenizer in a published model's folder: a byte-level BPE.

  Args:
    folder: holds tokenizer.json and tokenizer_config.json; a
      generation_config.json may name further tokens that end a completion.
    now: the time that the chat template is told if it asks.

  Attributes:
    special_ids: string -> id of every control token: those flagged special,
      and all that are spelt <...>.
    n_vocab_used: ids at or above it never occur; mask the head from there.
    bos_id: int, or None where the model has no such token.
    eos_ids: the ids that end a completion, generation_config.json's first.
    pad_id: the padding token, or the first of `eos_ids` where there is none.

  Raises:
    ValueError: a file is missing or unreadable, the tokenizer is not
      byte-level, or a named token is not in it.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    now: Clock = datetime.datetime.now,
  ):
    self._now = now
    self._folder = pathlib.Path(folder)
    pair = read_byte_level(folder)
    super().__init__(pair.control_ids, pair.token_bytes)
    self._with_special, self._plain = pair.with_special, pair.plain
    leaks = [
      token
      for token in self.special_ids
      if self._id_is_special & set(self.encode(token))
    ]
    if leaks:
      raise ValueError(
        f"{pair.path}: its model spells {', '.join(leaks)} as control tokens"
        " even in plain text, so a user's text could end a turn. Remove the"
        " merges that form them."
      )
    config = read_tokenizer_config(folder)
    named = special_tokens(config)
    for key in ("bos_token", "eos_token"):
      if key in named and named[key] not in pair.ids:
        raise ValueError(
          f"{self._folder / 'tokenizer_config.json'} names {key}="
          f"{named[key]!r}, which {pair.path} lacks. The two files belong to"
          " different models, or one was changed."
        )
    ends = _generation_ends(self._folder)
    if "eos_token" in named:
      ends.append(pair.ids[named["eos_token"]])
    if not ends:
      raise ValueError(
        f"{self._folder} names no token that ends a completion: neither"
        ' "eos_token" in tokenizer_config.json nor "eos_token_id" in'
        " generation_config.json."
      )
    bos = named.get("bos_token")
    self.bos_id: int | None = None if bos is None else pair.ids[bos]
    self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
    self.pad_id: int = pair.ids.get(named.get("pad_token", ""), ends[0])
    self._adds_bos = bos is not None and bool(config.get("add_bos_token"))

  @functools.cached_property
  def chat_template(self) -> ChatTemplate:
    """The folder's template; a ValueError where there is none."""
    return ChatTemplate(self._folder, self._now)

  def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
    tokenizer = self._with_special if allow_special else self._plain
    return tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    encoded = self._plain.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encoded]

  def encode_chat(
    self,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **extra: Any,
  ) -> list[int]:
    """Token ids of a conversation, as the model's template writes it.

    No text of the messages, the tools or `extra` becomes a control token, save
    `ASSISTANT_MARKUP` in the assistant's content. BOS comes first once: the
    template's, or else one of ours if tokenizer_config.json has add_bos_token.

    Args:
      messages: see `ChatTemplate.render`.
      tools: JSON schemas of the functions that the model may call.
      add_generation_prompt: end where the assistant's turn begins.
      **extra: further variables of the template, such as `enable_thinking`.

    Raises:
      ValueError: see `ChatTemplate.render`.
    """
    template = self.chat_template
    given = [list(messages), tools, extra]
    stand_ins = _stand_ins(
      self._openers, "\0".join(_strings([given, _texts_of(template, tools)]))
    )
    taken = str.maketrans(stand_ins)
    text = template.render(
      [_message_from(message, taken) for message in messages],
      tools=_taken_from(tools, taken),
      add_generation_prompt=add_generation_prompt,
      **_taken_from(extra, taken),
    )
    ids = self._encode_rendered(text, stand_ins)
    if self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
      return [self.bos_id, *ids]
    return ids

  def _encode_rendered(self, text: str, stand_ins: dict[str, str]) -> list[int]:
    """Ids of a rendered text: control tokens first, then what is between."""
    encoding = self._with_special.encode(text, add_special_tokens=False)
    if _given_back(text, stand_ins) == text:
      return encoding.ids
    ids: list[int] = []
    end = 0
    for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
      if i in self._id_is_special:
        ids += self.encode(_given_back(text[end:start], stand_ins))
        ids.append(i)
        end = stop
    return ids + self.encode(_given_back(text[end:], stand_ins))

  @functools.cached_property
  def _openers(self) -> str:
    """One character of every control token, its first unless that is a letter.

    Letters and spaces stay in the messages: templates do look at those.
    """
    openers: set[str] = set()
    for token in self.special_ids:
      marks = [c for c in token if not (c.isalnum() or c.isspace())]
      if not marks:
        raise ValueError(
          f"the control token {token!r} of {self._folder} is spelt like a word,"
          " so a message that has the word could not be told from it. Remove"
          " the token from tokenizer.json, or its flag special."
        )
      if not openers & set(marks):
        openers.add(marks[0])
    return "".join(sorted(openers))

  def __repr__(self) -> str:
    return f"ModelTokenizer({str(self._folder)!r})"


def _generation_ends(folder: pathlib.Path) -> list[int]:
  """`eos_token_id` of generation_config.json, one or several; [] if absent."""
  path = folder / "generation_config.json"
  if not path.is_file():
    return []
  config = files.read_json(path)
  ends = config.get("eos_token_id") if isinstance(config, dict) else None
  return list(id_list(ends, f"{path}: eos_token_id"))


def _texts_of(template: ChatTemplate, tools: Any) -> list[Any]:
  """All that a template may write by itself."""
  source = template.source(with_tools=tools is not None)
  return [source, template.special_tokens]


def _strings(value: Any) -> Iterable[str]:
  """Every string in nested lists and mappings."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    for key, item in value.items():
      yield from _strings(key)
      yield from _strings(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from _strings(item)


def _stand_ins(characters: str, used: str) -> dict[str, str]:
  """Each character -> a private one that no text has, nor its JSON escape."""
  letters, lower = set(used), used.lower()
  free = (
    chr(code)
    for code in _PRIVATE_USE
    if chr(code) not in letters and _json_escape(chr(code)) not in lower
  )
  found = dict(zip(characters, free, strict=False))
  if len(found) < len(characters):
    raise ValueError(
      "the messages use every private-use character from U+E000 to U+F8FF, so"
      " that none is left to keep their text apart. Remove one."
    )
  return found


_MARKUP = re.compile("(" + "|".join(map(re.escape, ASSISTANT_MARKUP)) + ")")


def _message_from(message: Any, taken: dict[int, str]) -> Any:
  """A message with stand-ins; the assistant's content keeps its markup."""
  changed = _taken_from(message, taken)
  if isinstance(message, Mapping) and message.get("role") == "assistant":
    changed["content"] = _taken_from(message.get("content"), taken, _MARKUP)
  return changed


def _taken_from(
  value: Any, taken: dict[int, str], markup: re.Pattern | None = None
) -> Any:
  """A value whose strings have stand-ins, except within `markup`."""
  if isinstance(value, str):
    parts = markup.split(value) if markup else [value]
    parts[::2] = [part.translate(taken) for part in parts[::2]]  # else: markup
    return "".join(parts)
  if isinstance(value, Mapping):
    return {
      _taken_from(key, taken): _taken_from(item, taken, markup)
      for key, item in value.items()
    }
  if isinstance(value, list | tuple):
    return [_taken_from(item, taken, markup) for item in value]
  return value


def _given_back(text: str, stand_ins: dict[str, str]) -> str:
  """The text without stand-ins, those that JSON escaped included."""
  for character, stand_in in stand_ins.items():
    text = text.replace(stand_in, character)
    text = text.replace(_json_escape(stand_in), character)
  return text


def _json_escape(character: str) -> str:
  return f"\\u{ord(character):04x}"
