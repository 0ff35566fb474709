"""The format of DeepSeek-R1, which our recipe trains from scratch.

One turn, markers being single tokens and nothing standing between them:

  BOS User prompt Assistant <think> thinking </think><answer> answer </answer>
  EOS

The loss falls on what the assistant writes, EOS included, and on nothing else.
A completion starts at `<think>`. Further turns follow without another BOS;
each assistant turn ends with EOS.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rlm.data.chat import Chat, Turn, content_of
from rlm.data.tokenizer import ANSWER, END_ANSWER, END_THINK, THINK, Tokenizer

_REASONING = (THINK, END_THINK, ANSWER, END_ANSWER)
# <think>..</think>, then <answer>..</answer> or plain text, and no more.
_RESPONSE = re.compile(
  rf"\s*{THINK}(?P<thinking>.*?){END_THINK}\s*"
  rf"(?:{ANSWER}(?P<answer>.*?){END_ANSWER}\s*|(?P<plain>.*))",
  re.DOTALL,
)


class R1Chat(Chat):
  """See `Chat`.

  Args:
    tokenizer: has the markers.
  """

  tokenizer: Tokenizer
  answer_format = "tags"

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self.stop_tokens = (tokenizer.eos_id,)
    self.pad_id = tokenizer.pad_id

  def question(self, prompt: str) -> str:
    """The prompt itself: the format asks for the answer."""
    return prompt

  def encode_question(self, question: str) -> list[int]:
    """BOS User question Assistant."""
    t = self.tokenizer
    return [t.bos_id, t.user_id, *t.encode(question), t.assistant_id]

  def encode_response(self, thinking: str, answer: str) -> list[int]:
    """From `<think>` to EOS."""
    t = self.tokenizer
    return [
      *self._encode_thinking(thinking),
      t.answer_id,
      *t.encode(answer),
      t.end_answer_id,
      t.eos_id,
    ]

  def encode_messages(self, messages: Sequence[dict[str, Any]]) -> list[Turn]:
    """One document; see `Chat`.

    Args:
      messages: an optional "system" first, then "user" and "assistant" in turn.
        The assistant's content is plain text, or `<think>..</think>` followed
        by `<answer>..</answer>` or by plain text; its markers become tokens.
        The same strings in other roles stay text.
    """
    _check_roles(messages)
    t = self.tokenizer
    tokens, mask = [t.bos_id], [False]
    for i, message in enumerate(messages):
      thinking, content = content_of(message, i)
      if thinking is not None:
        content = f"{THINK}{thinking}{END_THINK}{content}"
      if message["role"] == "system":
        ids = t.encode(content)
      elif message["role"] == "user":
        ids = self.encode_question(content)[1:]  # BOS stands once
      else:
        ids = [*self._encode_content(content, i), t.eos_id]
      tokens += ids
      mask += [message["role"] == "assistant"] * len(ids)
    return [(tokens, mask)]

  def response_text(self, tokens: Iterable[int]) -> str:
    """The text of the tokens; a prompt opens nothing."""
    return self.tokenizer.decode(tokens)

  def _encode_thinking(self, thinking: str) -> list[int]:
    t = self.tokenizer
    return [t.think_id, *t.encode(thinking), t.end_think_id]

  def _encode_content(self, content: str, index: int) -> list[int]:
    """An assistant's content; its four markers become tokens."""
    t = self.tokenizer
    if not any(marker in content for marker in _REASONING):
      return t.encode(content)
    match = _RESPONSE.fullmatch(content)
    parts = match.groupdict() if match else {}
    inside = [part for part in parts.values() if part is not None]
    if not match or any(m in part for m in _REASONING for part in inside):
      raise ValueError(
        f"message {index} (assistant) has broken markup. Needed: plain text, or"
        f" {THINK}..{END_THINK} and then {ANSWER}..{END_ANSWER} or plain text."
      )
    if parts["answer"] is None:
      ids = self._encode_thinking(parts["thinking"])
      return ids + t.encode(parts["plain"])
    return self.encode_response(parts["thinking"], parts["answer"])[:-1]

  def __repr__(self) -> str:
    return f"R1Chat({self.tokenizer!r})"


def _check_roles(messages: Sequence[dict[str, Any]]) -> None:
  roles = [message.get("role") for message in messages]
  turns = roles[1:] if roles[:1] == ["system"] else roles
  expected = ["user", "assistant"] * (len(turns) // 2)
  if not turns or turns != expected:
    raise ValueError(
      f"roles are {', '.join(map(str, roles)) or 'none'}; needed: an optional"
      " system, then user and assistant in turn, ending with assistant."
    )
