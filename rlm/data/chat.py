"""Conversations <-> token ids and loss masks, in the format of DeepSeek-R1.

One turn, markers being single tokens and nothing standing between them:

  BOS User prompt Assistant <think> thinking </think><answer> answer </answer>
  EOS

The loss falls on what the assistant writes, EOS included, and on nothing else.
A completion starts at `<think>`. Further turns follow without another BOS;
each assistant turn ends with EOS.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rlm import files
from rlm.data.jsonl import read_jsonl
from rlm.data.tokenizer import ANSWER, END_ANSWER, END_THINK, THINK, Tokenizer

_REASONING = (THINK, END_THINK, ANSWER, END_ANSWER)
# <think>..</think>, then <answer>..</answer> or plain text, and no more.
_RESPONSE = re.compile(
  rf"\s*{THINK}(?P<thinking>.*?){END_THINK}\s*"
  rf"(?:{ANSWER}(?P<answer>.*?){END_ANSWER}\s*|(?P<plain>.*))",
  re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Trace:
  """One worked turn: what supervised fine-tuning learns from."""

  prompt: str
  thinking: str
  answer: str


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
  """BOS User prompt Assistant: what a sampler is given."""
  return [
    tokenizer.bos_id,
    tokenizer.user_id,
    *tokenizer.encode(prompt),
    tokenizer.assistant_id,
  ]


def encode_response(
  tokenizer: Tokenizer, thinking: str, answer: str
) -> list[int]:
  """The completion, from `<think>` to EOS."""
  return [
    tokenizer.think_id,
    *tokenizer.encode(thinking),
    tokenizer.end_think_id,
    tokenizer.answer_id,
    *tokenizer.encode(answer),
    tokenizer.end_answer_id,
    tokenizer.eos_id,
  ]


def encode_turn(
  tokenizer: Tokenizer, prompt: str, thinking: str, answer: str
) -> tuple[list[int], list[bool]]:
  """Tokens of one turn and their loss mask, True on the response."""
  asked = encode_prompt(tokenizer, prompt)
  said = encode_response(tokenizer, thinking, answer)
  return asked + said, [False] * len(asked) + [True] * len(said)


def encode_messages(
  tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]
) -> tuple[list[int], list[bool]]:
  """Tokens and loss mask of a conversation of several turns.

  Args:
    tokenizer: spells the markers.
    messages: {"role", "content"} each: an optional "system" first, then "user"
      and "assistant" in turn, the last by the assistant. The assistant's
      content is plain text, or `<think>..</think>` followed by
      `<answer>..</answer>` or by plain text; its markers become tokens. The
      same strings in other roles stay text.

  Returns:
    token ids, and the mask that is True on assistant turns and their EOS.

  Raises:
    ValueError: wrong order of roles, empty content, or broken markup.
  """
  _check_roles(messages)
  tokens, mask = [tokenizer.bos_id], [False]
  for i, message in enumerate(messages):
    role, content = message["role"], message.get("content")
    if not isinstance(content, str) or not content.strip():
      raise ValueError(
        f"message {i} ({role}) has empty content. Remove the conversation or"
        " fill the message."
      )
    if role == "system":
      ids = tokenizer.encode(content)
    elif role == "user":
      ids = [
        tokenizer.user_id,
        *tokenizer.encode(content),
        tokenizer.assistant_id,
      ]
    else:
      ids = [*_encode_content(tokenizer, content, i), tokenizer.eos_id]
    tokens += ids
    mask += [role == "assistant"] * len(ids)
  return tokens, mask


def load_messages(
  path: str | os.PathLike, tokenizer: Tokenizer, *, row_length: int
) -> list[tuple[list[int], list[bool]]]:
  """Conversations of a JSONL file, `{"messages": [{"role", "content"}...]}`.

  Args:
    path: the file, a conversation per line.
    tokenizer: spells the markers.
    row_length: tokens of a row; a conversation is never cut.

  Returns:
    (tokens, loss mask) of each line, as `encode_messages` gives them.

  Raises:
    ValueError: see `read_jsonl` and `encode_messages`, or a conversation
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
      tokens, mask = encode_messages(tokenizer, messages)
      check_fits(len(tokens), row_length, "this conversation")
    except ValueError as error:
      raise ValueError(f"{path}:{number}: {error}") from error
    documents.append((tokens, mask))
  return documents


def save_messages(path: str | os.PathLike, traces: Iterable[Trace]) -> None:
  """Writes traces, atomically, as a messages file that `load_messages` reads.

  Raises:
    ValueError: a trace spells one of the four markers in its own text, which
      the file could not tell from its markup. Nothing is written then.
  """
  lines = []
  for i, trace in enumerate(traces):
    if any(marker in trace.thinking + trace.answer for marker in _REASONING):
      raise ValueError(
        f"trace {i} spells a marker in its text: {trace.thinking[:40]!r}."
        " Leave it out; a response has each marker once."
      )
    content = (
      f"{THINK}{trace.thinking}{END_THINK}{ANSWER}{trace.answer}{END_ANSWER}"
    )
    messages = [
      {"role": "user", "content": trace.prompt},
      {"role": "assistant", "content": content},
    ]
    lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
  text = "".join(line + "\n" for line in lines)
  files.write_bytes(path, text.encode("utf-8"))


def check_fits(length: int, row_length: int, what: str) -> None:
  """Raises ValueError if a document that is never cut exceeds a row."""
  if length > row_length:
    raise ValueError(
      f"{what} is {length} tokens long, but a row has {row_length=}. Shorten"
      f" it, or set row_length to at least {length}."
    )


def _check_roles(messages: Sequence[dict[str, Any]]) -> None:
  roles = [message.get("role") for message in messages]
  turns = roles[1:] if roles[:1] == ["system"] else roles
  expected = ["user", "assistant"] * (len(turns) // 2)
  if not turns or turns != expected:
    raise ValueError(
      f"roles are {', '.join(map(str, roles)) or 'none'}; needed: an optional"
      " system, then user and assistant in turn, ending with assistant."
    )


def _encode_content(
  tokenizer: Tokenizer, content: str, index: int
) -> list[int]:
  """An assistant's content; its four markers become tokens."""
  if not any(marker in content for marker in _REASONING):
    return tokenizer.encode(content)
  match = _RESPONSE.fullmatch(content)
  parts = match.groupdict() if match else {}
  inside = [part for part in parts.values() if part is not None]
  if not match or any(m in part for m in _REASONING for part in inside):
    raise ValueError(
      f"message {index} (assistant) has broken markup. Needed: plain text, or"
      f" {THINK}..{END_THINK} and then {ANSWER}..{END_ANSWER} or plain text."
    )
  ids = [
    tokenizer.think_id,
    *tokenizer.encode(parts["thinking"]),
    tokenizer.end_think_id,
  ]
  if parts["answer"] is None:
    return ids + tokenizer.encode(parts["plain"])
  return [
    *ids,
    tokenizer.answer_id,
    *tokenizer.encode(parts["answer"]),
    tokenizer.end_answer_id,
  ]
