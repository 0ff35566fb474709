r"""The format of a published model: its own chat template, trained as sampled.

A document is what the sampler sees: the rendered prompt, which the template
ends where the assistant's turn begins, and after it what the assistant writes,
up to the token that ends a turn. So every assistant turn is a document of its
own, behind the conversation as the template shows it at that moment; R1's
leaves earlier thinking out. Rendering a whole conversation and looking for the
assistant's part would lose the very thinking that is to be learned. The price:
n turns make n documents, the last as long as all of the conversation.

Some templates open thinking themselves (R1's ends with `<think>` and a
newline). The assistant's content is written as the model would have it from
the start, `<think>..</think>` and then the answer; what is open is taken off.

The final answer to a problem stands in \boxed{}, which the question asks for in
the words that DeepSeek's and Qwen's model cards recommend.
"""

import datetime
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlm.data.chat import Chat, Turn, content_of
from rlm.data.model_tokenizer import ASSISTANT_MARKUP, ModelTokenizer
from rlm.data.thinking import opens_thinking
from rlm.data.tokenizer import END_THINK, THINK

INSTRUCTION = (
  r"Please reason step by step, and put your final answer within \boxed{}."
)
# For templates that write the date: the same text on whichever day a run is
# continued. This is the one that Llama 3's has where no clock is given.
_TODAY = datetime.datetime(2024, 7, 26)
_PROBE = [{"role": "user", "content": "?"}]
_SAID = "a probe of rlm"


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
    silent = t.decode(t.encode_chat(_PROBE, add_generation_prompt=False))
    prompt = t.decode(t.encode_chat(_PROBE))
    follows = prompt.startswith(silent)
    self._begins = prompt.removeprefix(silent) if follows else ""
    opens = opens_thinking(prompt)
    self.opened = prompt[prompt.rindex(THINK) :] if opens else ""
    self._closed = prompt.rstrip().endswith(END_THINK)
    whole, end = self._probe_turn()
    self.stop_tokens = tuple(dict.fromkeys((end, *t.eos_ids)))
    # What the template writes around the content by itself, such as the space
    # after "Assistant:". What it writes around thinking is known.
    before, _, self._after = whole.partition(_SAID)
    self._before = ""
    if before.startswith(prompt) and not self.opened:
      self._before = before.removeprefix(prompt)

  def _probe_turn(self) -> tuple[str, int]:
    """A rendered turn up to the token that ends it, and that token."""
    t = self.tokenizer
    turn = t.encode_chat(
      [*_PROBE, {"role": "assistant", "content": _SAID}],
      add_generation_prompt=False,
    )
    for i, token in enumerate(turn):
      whole = t.decode(turn[:i])
      if token in t.eos_ids and _SAID in whole:
        return whole, token
    names = [t.decode([token]) for token in t.eos_ids]
    raise ValueError(
      f"the chat template of {t!r} ends the assistant's turn by none of"
      f" {', '.join(names)}, so a response could not be taught to end. Name the"
      " token that does as eos_token_id in generation_config.json."
    )

  def question(self, prompt: str) -> str:
    r"""The prompt and, unless it speaks of \boxed itself, `INSTRUCTION`."""
    return prompt if r"\boxed" in prompt else f"{prompt}\n{INSTRUCTION}"

  def encode_question(self, question: str) -> list[int]:
    """As the template writes a conversation of this one message."""
    return self.tokenizer.encode_chat([{"role": "user", "content": question}])

  def encode_response(self, thinking: str, answer: str) -> list[int]:
    r"""The thinking, then the answer in \boxed{}.

    Where the template closes thinking, the steps are part of the answer.
    """
    boxed = f"\\boxed{{{answer}}}"
    if self._closed:
      return self._encode_said(f"{thinking}\n\n{boxed}", "the solution")
    return self._encode_said(_after_thinking(thinking, boxed), "the solution")

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
      thinking, content = content_of(message, i)
      if message["role"] != "assistant":
        continue
      if thinking is not None:
        content = _after_thinking(thinking, content)
      said = self._encode_said(content, f"message {i} (assistant)")
      asked = self.tokenizer.encode_chat(messages[:i])
      if not self.tokenizer.decode(asked).endswith(self._begins):
        raise ValueError(
          f"message {i} (assistant) follows the role {roles[i - 1]!r}, after"
          " which the model's template begins no turn of the assistant. Leave"
          " the conversation out, or end it before."
        )
      mask = [False] * len(asked) + [True] * len(said)
      turns.append((asked + said, mask))
    return turns

  def response_text(self, tokens: Iterable[int]) -> str:
    """The text of the tokens behind what the prompt opened."""
    return self.opened + self.tokenizer.decode(tokens)

  def _encode_said(self, content: str, what: str) -> list[int]:
    """An assistant's content behind the prompt, and the end of the turn."""
    text = content.strip()
    thinks = text.startswith(THINK)
    if not text.count(THINK) == text.count(END_THINK) == int(thinks):
      raise ValueError(
        f"{what} has broken markup. Needed: plain text, or"
        f" {THINK}..{END_THINK} and then plain text."
      )
    if self.opened and not thinks:
      raise ValueError(
        f"{what} does not think, but the model's template begins a turn with"
        f" {THINK}. Put {THINK}..{END_THINK} before the answer, even if empty."
      )
    if self._closed and thinks:
      raise ValueError(
        f"{what} thinks, but the model's template closes thinking by"
        f" {END_THINK} before its turn. Leave the thinking out."
      )
    if self.opened:
      text = text.removeprefix(THINK)
      text = text.removeprefix(self.opened.removeprefix(THINK))
    before = self._before
    if thinks:  # Qwen3's puts empty thinking before what has none
      before = before.partition(THINK)[0]
    t = self.tokenizer
    ids: list[int] = []
    for part, token in _joined(
      [
        *_cut(before, t.special_ids),
        *_cut(text, {m: t.special_ids.get(m) for m in ASSISTANT_MARKUP}),
        *_cut(self._after, t.special_ids),
      ]
    ):
      ids += t.encode(part) if token is None else [token]
    return [*ids, self.stop_tokens[0]]

  def __repr__(self) -> str:
    return f"TemplateChat({self.tokenizer!r})"


def _after_thinking(thinking: str, text: str) -> str:
  """As R1 and Qwen3 write it."""
  thinking, text = thinking.strip("\n"), text.lstrip("\n")
  return f"{THINK}\n{thinking}\n{END_THINK}\n\n{text}"


Piece = tuple[str, int | None]  # a text, and its id if it is a control token


def _cut(text: str, tokens: Mapping[str, int | None]) -> list[Piece]:
  """The text cut at those of some control tokens that a model has."""
  known = {name: token for name, token in tokens.items() if token is not None}
  if not known:
    return [(text, None)]
  pattern = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
  parts = re.split(f"({pattern})", text)
  return [(part, known.get(part)) for part in parts]


def _joined(pieces: Iterable[Piece]) -> Iterable[Piece]:
  """Neighbouring texts as one: a token may span what the template wrote."""
  for is_text, group in itertools.groupby(pieces, lambda p: p[1] is None):
    if is_text:
      yield "".join(text for text, _ in group), None
    else:
      yield from group
