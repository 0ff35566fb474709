"""`ByteTokenizer` as the files of a published model.

So that a model trained here goes to transformers with its tokenizer:
a byte-level BPE without merges, whose ids are those of `ByteTokenizer`, and the
chat template of `rlm.data.chat`.
"""

import os
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rlm import files
from rlm.data.tokenizer import (
  ASSISTANT,
  BOS,
  EOS,
  MARKERS,
  PAD,
  USER,
  byte_alphabet,
)

CHAT_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}"
  "{% if message['role'] == 'system' %}{{ message['content'] }}"
  "{% elif message['role'] == 'user' %}"
  f"{{{{ '{USER}' + message['content'] }}}}"
  "{% else %}"
  f"{{{{ '{ASSISTANT}' + message['content'] + eos_token }}}}"
  "{% endif %}{% endfor %}"
  f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)


def write_byte_tokenizer(folder: str | os.PathLike) -> None:
  """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

  Args:
    folder: exists.

  Raises:
    DiskFullError: no room.
  """
  path = pathlib.Path(folder)
  vocabulary = dict(byte_alphabet().items())
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(list(MARKERS))  # ids 256 and on, in order
  files.write_bytes(path / "tokenizer.json", tokenizer.to_str().encode())
  files.write_json(
    path / "tokenizer_config.json",
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "bos_token": BOS,
      "eos_token": EOS,
      "pad_token": PAD,
      "add_bos_token": False,
      "clean_up_tokenization_spaces": False,
    },
  )
  files.write_bytes(path / "chat_template.jinja", CHAT_TEMPLATE.encode())
