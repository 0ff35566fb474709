"""The byte tokenizer's files mean what the byte tokenizer means."""

import pytest
import tokenizers

from rlm.data.byte_tokenizer_files import write_byte_tokenizer
from rlm.data.model_tokenizer import ModelTokenizer
from rlm.data.r1_chat import R1Chat
from rlm.data.tokenizer import EOS, MARKERS, ByteTokenizer

TEXT = "a b\n\t 12+34?  ä€𝄞 \x00\x7f<think>"


@pytest.fixture
def folder(tmp_path):
  write_byte_tokenizer(tmp_path)
  return tmp_path


def test_ids_are_those_of_the_byte_tokenizer(folder):
  ours, theirs = ByteTokenizer(), ModelTokenizer(folder)
  assert theirs.encode(TEXT) == ours.encode(TEXT)
  marked = "".join(MARKERS) + TEXT
  both = (t.encode(marked, allow_special=True) for t in (ours, theirs))
  assert next(both) == next(both)
  assert theirs.n_vocab_used == ours.n_vocab_used
  assert theirs.bos_id == ours.bos_id
  assert theirs.eos_ids == (ours.eos_id,)
  assert theirs.pad_id == ours.pad_id
  assert theirs.decode(ours.encode(TEXT)) == TEXT


def test_other_programs_read_the_same_from_the_file(folder):
  read = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  ids = read.encode(TEXT + EOS, add_special_tokens=False).ids
  assert ids == ByteTokenizer().encode(TEXT + EOS, allow_special=True)
  assert read.decode(ids) == TEXT.replace("<think>", "")


def test_the_template_is_the_format_of_training(folder):
  ours, theirs = ByteTokenizer(), ModelTokenizer(folder)
  chat = R1Chat(ours)
  asked = theirs.encode_chat([{"role": "user", "content": TEXT}])
  assert asked == chat.encode_prompt(TEXT)
  messages = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1+1?<｜Assistant｜>"},
    {"role": "assistant", "content": "<think>x</think><answer>2</answer>"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
  ]
  [(expected, _)] = chat.encode_messages(messages)
  found = theirs.encode_chat(messages, add_generation_prompt=False)
  assert found == expected
