"""Which format a tokenizer's model is written to."""

from rlm.data.chat import Chat
from rlm.data.r1_chat import R1Chat
from rlm.data.template_chat import TemplateChat
from rlm.data.tokenizer import ByteTokenizer, HFTokenizer, missing_markers


def load_chat(name: str) -> Chat:
  """The format of a config's tokenizer: "bytes", or a folder's path.

  A folder whose tokenizer.json has all markers of `rlm.data.tokenizer` is
  written to in R1's format; `add_markers` makes such a copy of any. Another
  one, which is how models are published, by its own chat template.

  Raises:
    ValueError: the folder serves neither.
  """
  if name == "bytes":
    return R1Chat(ByteTokenizer())
  missing = missing_markers(name)
  if not missing:
    return R1Chat(HFTokenizer(name))
  try:
    return TemplateChat(name)
  except ValueError as error:
    raise ValueError(
      f"{name} serves no conversation. R1's format needs the tokens"
      f" {', '.join(missing)}, which rlm.data.tokenizer.add_markers would write"
      f" into a copy. As to the model's own format: {error}"
    ) from error


def load_model_chat(name: str, n_vocab_used: int) -> Chat:
  """The format that a config names beside a model.

  Raises:
    ValueError: see `load_chat`; or the model uses another number of ids.
  """
  chat = load_chat(name)
  if chat.tokenizer.n_vocab_used != n_vocab_used:
    raise ValueError(
      f"config.model.n_vocab_used={n_vocab_used}, but the tokenizer {name!r}"
      f" uses {chat.tokenizer.n_vocab_used} ids. Set it to that."
    )
  return chat
