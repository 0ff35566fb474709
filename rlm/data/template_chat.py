r"""The format of a published model: its own chat template, trained as sampled.

A document is what the sampler sees: the rendered prompt, which the template
ends where the assistant's turn begins, and after it what the assistant writes,
up to the token that ends a turn. So every assistant turn is a document of its
own, behind the conversation as the template shows it at that moment; R1's
leaves earlier thinking out. Rendering a whole conversation and looking for the
assistant's part would lose the very thinking that is to be learned.

Some templates open thinking themselves (R1's ends with `<think>` and a
newline). The assistant's content is written as the model would have it from
the start, `<think>..</think>` and then the answer; what is open is taken off.

The final answer to a problem stands in \boxed{}, which the question asks for in
the words that DeepSeek's and Qwen's model cards recommend.
"""

import datetime
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rlm.data.chat import Chat, Turn, content_of
from rlm.data.model_tokenizer import ModelTokenizer
from rlm.data.thinking import opens_thinking
from rlm.data.tokenizer import END_THINK, THINK

INSTRUCTION = (
  r"Please reason step by step, and put your final answer within \boxed{}."
)
# For templates that write the date: the same text on whichever day a run is
# continued. This is the one that Llama 3's has where no clock is given.
_TODAY = datetime.datetime(2024, 7, 26)
_PROBE = [{"role": "user", "content": "?"}]
_SAID = "!"


class TemplateChat(Chat):
  r"""See `Chat`.

  Args:
    folder: of the tokenizer's files; see `ModelTokenizer`.

  Attributes:
    opened: how the template's prompt begins the assistant's turn, if by
      thinking: "<think>\n", say; else "".

  Raises:
    ValueError: a file is missing or broken, there is no chat template, or it
      ends the assistant's turn by no token that ends a completion.
  """

  tokenizer: ModelTokenizer
  answer_format = "boxed"

  def __init__(self, folder: str | os.PathLike):
    self.tokenizer = t = ModelTokenizer(folder, now=lambda: _TODAY)
    self.pad_id = t.pad_id
    prompt = t.decode(t.encode_chat(_PROBE))
    opens = opens_thinking(prompt)
    self.opened = prompt[prompt.rindex(THINK) :] if opens else ""
    self._closed = prompt.rstrip().endswith(END_THINK)
    turn = t.encode_chat(
      [*_PROBE, {"role": "assistant", "content": _SAID}],
      add_generation_prompt=False,
    )
    ends = [i for i, token in enumerate(turn) if token in t.eos_ids]
    if not ends:
      names = [t.decode([token]) for token in t.eos_ids]
      raise ValueError(
        f"{folder}: its chat template ends the assistant's turn by none of"
        f" {', '.join(names)}, so a response could not be taught to end. Name"
        " the token that does as eos_token_id in generation_config.json."
      )
    self.stop_tokens = tuple(dict.fromkeys((turn[ends[-1]], *t.eos_ids)))
    # What the template writes around the content by itself, such as the space
    # after "Assistant:".
    whole = t.decode(turn[: ends[-1]])
    at = whole.rindex(_SAID)
    self._before = whole[len(prompt) : at] if whole.startswith(prompt) else ""
    self._after = whole[at + len(_SAID) :]

  def question(self, prompt: str) -> str:
    r"""The prompt and, unless it speaks of \boxed itself, `INSTRUCTION`."""
    return prompt if r"\boxed" in prompt else f"{prompt}\n{INSTRUCTION}"

  def encode_question(self, question: str) -> list[int]:
    """As the template writes a conversation of this one message."""
    return self.tokenizer.encode_chat([{"role": "user", "content": question}])

  def encode_response(self, thinking: str, answer: str) -> list[int]:
    r"""The thinking, then the answer in \boxed{}."""
    boxed = f"\\boxed{{{answer}}}"
    return self._encode_said(_after_thinking(thinking, boxed), 0)

  def encode_messages(self, messages: Sequence[dict[str, Any]]) -> list[Turn]:
    """A document for each assistant turn; see `Chat`.

    Args:
      messages: as the template takes them, with texts as content.
    """
    roles = [message.get("role") for message in messages]
    if roles[-1:] != ["assistant"] or roles[0] == "assistant":
      raise ValueError(
        f"roles are {', '.join(map(str, roles)) or 'none'}; needed: a"
        " conversation that begins with another role and ends with assistant."
      )
    turns = []
    for i, message in enumerate(messages):
      if message["role"] != "assistant":
        continue
      thinking, content = content_of(message, i)
      if thinking is not None:
        content = _after_thinking(thinking, content)
      said = self._encode_said(content, i)
      asked = self.tokenizer.encode_chat(messages[:i])
      mask = [False] * len(asked) + [True] * len(said)
      turns.append((asked + said, mask))
    return turns

  def response_text(self, tokens: Iterable[int]) -> str:
    """The text of the tokens behind what the prompt opened."""
    return self.opened + self.tokenizer.decode(tokens)

  def _encode_said(self, content: str, index: int) -> list[int]:
    """An assistant's content behind the prompt, and the end of the turn."""
    text = content.strip()
    thinks = text.count(THINK), text.count(END_THINK)
    if thinks not in ((0, 0), (1, 1)) or (thinks[0] and text.find(THINK) != 0):
      raise ValueError(
        f"message {index} (assistant) has broken markup. Needed: plain text, or"
        f" {THINK}..{END_THINK} and then plain text."
      )
    if self.opened:
      if not thinks[0]:
        raise ValueError(
          f"message {index} (assistant) does not think, but the model's"
          f" template begins its turn with {THINK}. Put {THINK}..{END_THINK}"
          " before the answer; it may be empty."
        )
      given = self.opened.removeprefix(THINK)
      text = text.removeprefix(THINK)
      text = text.removeprefix(given) if given else text
    elif self._closed and thinks[0]:
      raise ValueError(
        f"message {index} (assistant) thinks, but the model's template closes"
        f" thinking by {END_THINK} before its turn. Leave the thinking out."
      )
    ids: list[int] = []
    before = self._before
    if thinks[0]:  # Qwen3's puts empty thinking before what has none
      before = before.partition(THINK)[0]
    for part in self._split(f"{before}{text}{self._after}"):
      token = self.tokenizer.special_ids.get(part)
      ids += self.tokenizer.encode(part) if token is None else [token]
    return [*ids, self.stop_tokens[0]]

  def _split(self, text: str) -> list[str]:
    """The text cut at those markers that are tokens of the model."""
    special = self.tokenizer.special_ids
    markers = [m for m in (THINK, END_THINK) if m in special]
    return re.split(f"({'|'.join(markers)})", text) if markers else [text]

  def __repr__(self) -> str:
    return f"TemplateChat({self.tokenizer!r})"


def _after_thinking(thinking: str, text: str) -> str:
  """As R1 and Qwen3 write it."""
  return f"{THINK}\n{thinking}\n{END_THINK}\n\n{text}"
