"""Text <-> token ids, with DeepSeek's special tokens as single ids.

Two tokenizers share one face. `ByteTokenizer` needs no file: ids 0-255 are the
bytes of UTF-8 and the markers follow, so that `encode` is the identity on
bytes. `HFTokenizer` reads a published `tokenizer.json`.

User text never becomes a marker: `encode` spells `<think>` as seven bytes, and
only `allow_special=True`, which our own templates use, makes it one token.
Markers are always found by their string, since their ids moved between
DeepSeek's releases.

`read_byte_level` is what `HFTokenizer` shares with `model_tokenizer`, which
reads the file of any published model for use as it is.
"""

import abc
import codecs
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"
THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"

MARKERS = (
  *(BOS, EOS, PAD, USER, ASSISTANT, FIM_BEGIN, FIM_HOLE, FIM_END),
  *(THINK, END_THINK, ANSWER, END_ANSWER),
)


class Vocabulary(abc.ABC):
  """What ids stand for, and how their bytes are put together.

  Args:
    special_ids: string -> id of every control token.
    token_bytes: of each id.

  Attributes:
    special_ids: as given.
    n_vocab_used: ids at or above it never occur; the head masks them.
  """

  def __init__(self, special_ids: dict[str, int], token_bytes: Sequence[bytes]):
    self.special_ids = special_ids
    self.n_vocab_used = len(token_bytes)
    self._token_bytes = token_bytes
    self._id_is_special = frozenset(special_ids.values())

  @abc.abstractmethod
  def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
    """Token ids of a text, without BOS or EOS.

    Args:
      text: any text.
      allow_special: control tokens spelt in the text become their single ids;
        for text of our own making, never for a user's.
    """

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 [length] of each text, as `encode` gives them, faster."""

  def is_special(self, token: int) -> bool:
    """Whether an id is a control token's."""
    return int(token) in self._id_is_special

  def text_lengths(self) -> np.ndarray:
    """int32 [n_vocab_used]: bytes of text per id, 0 for control tokens.

    Bits per byte divides by their sum over the targets.
    """
    return np.array(
      [
        0 if self.is_special(i) else len(self._token_bytes[i])
        for i in range(self.n_vocab_used)
      ],
      np.int32,
    )

  def token_bytes(self, token: int) -> bytes:
    """The bytes that one id stands for; a marker's are its string's."""
    if not 0 <= token < self.n_vocab_used:
      raise ValueError(
        f"token id {token} is outside the vocabulary in use,"
        f" 0..{self.n_vocab_used - 1}. Mask the head with n_vocab_used."
      )
    return self._token_bytes[token]

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """The bytes of all ids in order: exact, `encode` undone."""
    return b"".join(self.token_bytes(int(i)) for i in ids)

  def decode(self, ids: Iterable[int]) -> str:
    """Text to read; bytes that are no UTF-8 become the replacement sign."""
    return self.decode_bytes(ids).decode("utf-8", errors="replace")


class Tokenizer(Vocabulary):
  """A vocabulary with markers: all that our own recipe writes with.

  Attributes:
    special_ids: marker string -> id, for each of `MARKERS`.
    bos_id, eos_id, pad_id, user_id, assistant_id, fim_begin_id, fim_hole_id,
      fim_end_id, think_id, end_think_id, answer_id, end_answer_id: int.
  """

  def __init__(self, special_ids: dict[str, int], token_bytes: Sequence[bytes]):
    super().__init__(special_ids, token_bytes)
    self.bos_id = special_ids[BOS]
    self.eos_id = special_ids[EOS]
    self.pad_id = special_ids[PAD]
    self.user_id = special_ids[USER]
    self.assistant_id = special_ids[ASSISTANT]
    self.fim_begin_id = special_ids[FIM_BEGIN]
    self.fim_hole_id = special_ids[FIM_HOLE]
    self.fim_end_id = special_ids[FIM_END]
    self.think_id = special_ids[THINK]
    self.end_think_id = special_ids[END_THINK]
    self.answer_id = special_ids[ANSWER]
    self.end_answer_id = special_ids[END_ANSWER]


class ByteTokenizer(Tokenizer):
  """Ids 0-255 are bytes, 256-267 the markers in the order of `MARKERS`."""

  def __init__(self):
    super().__init__(
      {marker: 256 + i for i, marker in enumerate(MARKERS)},
      [bytes([b]) for b in range(256)] + [m.encode() for m in MARKERS],
    )
    self._split = re.compile("(" + "|".join(map(re.escape, MARKERS)) + ")")

  def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
    if not allow_special:
      return list(text.encode("utf-8"))
    ids: list[int] = []
    for part in self._split.split(text):
      if part in self.special_ids:
        ids.append(self.special_ids[part])
      else:
        ids.extend(part.encode("utf-8"))
    return ids

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [
      np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
      for text in texts
    ]

  def __repr__(self) -> str:
    return "ByteTokenizer()"


class HFTokenizer(Tokenizer):
  """A byte-level BPE of the `tokenizers` library: DeepSeek, Qwen, Llama 3.

  Args:
    folder: holds `tokenizer.json`.

  Raises:
    ValueError: no such file, not byte-level, or markers missing; the message
      names every missing one.
  """

  def __init__(self, folder: str | os.PathLike):
    pair = read_byte_level(folder)
    self._path = pair.path
    missing = [marker for marker in MARKERS if marker not in pair.ids]
    if missing:
      raise ValueError(
        f"{self._path} lacks the single tokens {', '.join(missing)}. Write a"
        " copy that has them: rlm.data.tokenizer.add_markers(folder, new)."
      )
    self._with_special, self._plain = pair.with_special, pair.plain
    super().__init__({m: pair.ids[m] for m in MARKERS}, pair.token_bytes)
    leaks = [m for m in MARKERS if self._id_is_special & set(self.encode(m))]
    if leaks:
      raise ValueError(
        f"{self._path}: its model spells {', '.join(leaks)} as a marker even"
        " in plain text, so a user's text could end a turn. Remove the merges"
        " that form it."
      )

  def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
    tokenizer = self._with_special if allow_special else self._plain
    # Never the file's own template: DeepSeek's adds a second BOS.
    return tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    encoded = self._plain.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encoded]

  def __repr__(self) -> str:
    return f"HFTokenizer({str(self._path.parent)!r})"


@dataclasses.dataclass(frozen=True)
class ByteLevelBPE:
  """A published tokenizer.json, read twice.

  Attributes:
    path: the file.
    with_special: serves templates: added tokens in the text become their ids.
    plain: serves user text: nothing that looks like a control token is matched.
    ids: string -> id, of all tokens.
    control_ids: string -> id, of those that `plain` never gives.
    token_bytes: of each id; a control token's are its string's.
  """

  path: pathlib.Path
  with_special: tokenizers.Tokenizer
  plain: tokenizers.Tokenizer
  ids: dict[str, int]
  control_ids: dict[str, int]
  token_bytes: list[bytes]


def read_byte_level(folder: str | os.PathLike) -> ByteLevelBPE:
  """Reads the tokenizer.json of a folder.

  Raises:
    ValueError: there is none, or it is not byte-level.
  """
  path = _tokenizer_json(folder)
  spec = _read_spec(path)
  # Some files ask for a cut or for padding, which would go unnoticed. Control
  # tokens are matched as spelt: another spelling is no way to write them.
  spec |= {
    "truncation": None,
    "padding": None,
    "added_tokens": [
      token | {"normalized": False} if _is_control(token) else token
      for token in spec["added_tokens"]
    ],
  }
  with_special = tokenizers.Tokenizer.from_str(json.dumps(spec))
  ids = with_special.get_vocab(with_added_tokens=True)
  # `plain` has no control tokens. The library's own switch for that
  # (encode_special_tokens) would leave <think> and <｜User｜>, which DeepSeek's
  # file does not flag as special. They stay words of the model, without
  # merges, so that no id moves.
  added = {token["content"]: token["id"] for token in spec["added_tokens"]}
  plain = spec | {
    "added_tokens": [t for t in spec["added_tokens"] if not _is_control(t)],
    "model": spec["model"] | {"vocab": spec["model"]["vocab"] | added},
  }
  token_bytes = [b""] * (max(ids.values()) + 1)
  for token, i in ids.items():
    token_bytes[i] = token.encode() if token in added else _from_unicode(token)
  return ByteLevelBPE(
    path=path,
    with_special=with_special,
    plain=tokenizers.Tokenizer.from_str(json.dumps(plain)),
    ids=ids,
    control_ids={
      t["content"]: t["id"] for t in spec["added_tokens"] if _is_control(t)
    },
    token_bytes=token_bytes,
  )


def missing_markers(folder: str | os.PathLike) -> list[str]:
  """Those of `MARKERS` that are no single tokens of a folder's tokenizer.json.

  Raises:
    ValueError: there is no such file, or it is not byte-level.
  """
  path = _tokenizer_json(folder)
  spec = _read_spec(path)
  known = {token["content"] for token in spec["added_tokens"]}
  known.update(spec["model"]["vocab"])
  return [marker for marker in MARKERS if marker not in known]


_COMPANIONS = (
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "generation_config.json",
)


def add_markers(folder: str | os.PathLike, new: str | os.PathLike) -> list[str]:
  """Copies a tokenizer.json, with the missing markers as new ids at the end.

  No existing id changes. DeepSeek-R1's file lacks `<answer>`; its embedding
  has 129280 rows for 128815 tokens, so that the new ids have rows already.

  The files that come with it (config, chat template) are copied.

  Args:
    folder: holds `tokenizer.json`.
    new: folder to write to; made if absent.

  Returns:
    The markers that were added.
  """
  tokenizer = tokenizers.Tokenizer.from_file(str(_tokenizer_json(folder)))
  known = tokenizer.get_vocab(with_added_tokens=True)
  missing = [marker for marker in MARKERS if marker not in known]
  tokenizer.add_special_tokens(missing)
  pathlib.Path(new).mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(pathlib.Path(new) / "tokenizer.json"))
  for name in _COMPANIONS:
    if (pathlib.Path(folder) / name).is_file():
      shutil.copyfile(pathlib.Path(folder) / name, pathlib.Path(new) / name)
  return missing


class StreamDecoder:
  """Decodes one token at a time, holding back half a UTF-8 character.

  text = "".join(map(stream.push, ids)) + stream.finish()
  """

  def __init__(self, tokenizer: Vocabulary):
    self._tokenizer = tokenizer
    self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, token: int) -> str:
    """The text that this token completes; may be empty."""
    return self._utf8.decode(self._tokenizer.token_bytes(int(token)))

  def finish(self) -> str:
    """What was held back, as a replacement sign; ready for the next text."""
    rest = self._utf8.decode(b"", final=True)
    self._utf8.reset()
    return rest


def _tokenizer_json(folder: str | os.PathLike) -> pathlib.Path:
  path = pathlib.Path(folder) / "tokenizer.json"
  if not path.is_file():
    raise ValueError(
      f'no file {path}. The tokenizer is "bytes" or a folder that holds a'
      " tokenizer.json."
    )
  return path


def _read_spec(path: pathlib.Path) -> dict:
  try:
    spec = json.loads(path.read_bytes())
    tokenizers.Tokenizer.from_str(json.dumps(spec))
  except Exception as error:  # the library raises bare Exception
    raise ValueError(
      f"{path} is no tokenizer file that the tokenizers library reads: {error}"
    ) from error
  decoders = _decoder_types(spec.get("decoder"))
  if "ByteLevel" not in decoders:
    raise ValueError(
      f"{path}: the decoder is {decoders or None}, not ByteLevel, so tokens do"
      " not map to bytes. Use a byte-level BPE (DeepSeek, Qwen, Llama 3) or"
      ' tokenizer="bytes".'
    )
  return spec


def _decoder_types(decoder: dict | None) -> list[str]:
  """Types of a decoder and of those it chains."""
  if decoder is None:
    return []
  inner = [_decoder_types(d) for d in decoder.get("decoders", [])]
  return [decoder["type"], *(name for names in inner for name in names)]


def _is_control(token: dict) -> bool:
  content = token["content"]
  return token["special"] or (content.startswith("<") and content.endswith(">"))


def byte_alphabet() -> dict[str, int]:
  """The characters that byte-level BPE writes bytes with -> the byte.

  Printable Latin-1 stands for itself; the other 68 bytes follow from U+0100.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  return {chr(b): b for b in printable} | {
    chr(256 + i): b for i, b in enumerate(others)
  }


_BYTE_OF = byte_alphabet()


def _from_unicode(token: str) -> bytes:
  if all(c in _BYTE_OF for c in token):
    return bytes(_BYTE_OF[c] for c in token)
  return token.encode()  # a model's own word for something that is no text
