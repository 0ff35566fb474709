import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from rlm.data.chat import Trace, load_messages, save_messages
from rlm.data.r1_chat import R1Chat
from rlm.data.tokenizer import ByteTokenizer

CHAT = R1Chat(ByteTokenizer())
GOOD = [
  {"role": "user", "content": "u"},
  {"role": "assistant", "content": "a"},
]


def _write(path, *conversations):
  path.write_text(
    "".join(json.dumps({"messages": c}) + "\n" for c in conversations),
    encoding="utf-8",
  )
  return path


plain = st.text(max_size=20).filter(lambda s: "<" not in s and s.strip())


@given(prompt=plain, thinking=plain, answer=plain)
def test_a_saved_trace_loads_as_its_turn(
  tmp_path_factory, prompt, thinking, answer
):
  path = tmp_path_factory.mktemp("messages") / "t.jsonl"
  said = CHAT.encode_response(thinking, answer)[:-1]
  save_messages(path, [Trace(prompt, CHAT.response_text(said))])
  [turn] = load_messages(path, CHAT, row_length=10_000)
  assert turn == CHAT.encode_turn(prompt, thinking, answer)


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (GOOD[:1], r"m\.jsonl:2: roles are user; needed"),
    (
      [GOOD[0], {"role": "assistant", "content": "x" * 20}],
      r"m\.jsonl:2: this conversation is 25 tokens long, but a row has"
      r" row_length=16.*at least 25",
    ),
    ("u", r'm\.jsonl:2: needs a list of objects under "messages", has the key'),
  ],
)
def test_errors_name_file_and_line(tmp_path, bad, message):
  path = _write(tmp_path / "m.jsonl", GOOD, bad)
  with pytest.raises(ValueError, match=message):
    load_messages(path, CHAT, row_length=16)


def test_unreadable_files(tmp_path):
  with pytest.raises(ValueError, match=r"no file .*none\.jsonl"):
    load_messages(tmp_path / "none.jsonl", CHAT, row_length=16)
  empty = tmp_path / "empty.jsonl"
  empty.touch()
  with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
    load_messages(empty, CHAT, row_length=16)
