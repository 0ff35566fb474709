import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from rlm.data.chat import (
  Trace,
  encode_messages,
  encode_prompt,
  encode_response,
  encode_turn,
  load_messages,
  save_messages,
)
from rlm.data.tokenizer import ByteTokenizer

TOK = ByteTokenizer()
BOS, EOS, USER, ASSISTANT = 256, 257, 259, 260
THINK, END_THINK, ANSWER, END_ANSWER = 264, 265, 266, 267


def _write(path, *conversations):
  path.write_text(
    "".join(json.dumps({"messages": c}) + "\n" for c in conversations),
    encoding="utf-8",
  )
  return path


def _messages(*turns):
  return [{"role": role, "content": content} for role, content in turns]


def test_one_turn_by_hand():
  assert encode_prompt(TOK, "a") == [BOS, USER, 97, ASSISTANT]
  said = [THINK, 98, END_THINK, ANSWER, 99, END_ANSWER, EOS]
  assert encode_response(TOK, "b", "c") == said
  tokens, mask = encode_turn(TOK, "a", "b", "c")
  assert tokens == [BOS, USER, 97, ASSISTANT, *said]
  assert mask == [False] * 4 + [True] * 7  # EOS in the loss


def test_several_turns_by_hand():
  tokens, mask = encode_messages(
    TOK,
    _messages(
      ("system", "s"),
      ("user", "u"),
      ("assistant", "a"),
      ("user", "v"),
      ("assistant", "<think>t</think>\n<answer>b</answer>\n"),
    ),
  )
  expected = [
    (BOS, 0), (ord("s"), 0),
    (USER, 0), (ord("u"), 0), (ASSISTANT, 0),
    (ord("a"), 1), (EOS, 1),
    (USER, 0), (ord("v"), 0), (ASSISTANT, 0),
    (THINK, 1), (ord("t"), 1), (END_THINK, 1),
    (ANSWER, 1), (ord("b"), 1), (END_ANSWER, 1), (EOS, 1),
  ]  # fmt: skip
  assert list(zip(tokens, mask, strict=True)) == [
    (token, bool(counts)) for token, counts in expected
  ]


def test_thinking_then_plain_text():
  tokens, _ = encode_messages(
    TOK, _messages(("user", "u"), ("assistant", "<think>t</think>a b"))
  )
  assert tokens[4:] == [THINK, 116, END_THINK, 97, 32, 98, EOS]


def test_markers_in_a_users_text_stay_text():
  tokens, mask = encode_messages(
    TOK, _messages(("user", "<think>x</think>"), ("assistant", "a"))
  )
  assert THINK not in tokens and END_THINK not in tokens
  assert sum(mask) == 2


plain = st.text(max_size=20).filter(lambda s: "<" not in s and s.strip())


@given(trace=st.builds(Trace, plain, plain, plain))
def test_a_saved_trace_loads_as_its_turn(tmp_path_factory, trace):
  path = tmp_path_factory.mktemp("messages") / "t.jsonl"
  save_messages(path, [trace])
  [(tokens, mask)] = load_messages(path, TOK, row_length=10_000)
  expected = encode_turn(TOK, trace.prompt, trace.thinking, trace.answer)
  assert (tokens, mask) == expected


def test_a_trace_that_spells_a_marker_is_not_saved(tmp_path):
  traces = [Trace("p", "t", "a"), Trace("p", "</think>", "a")]
  with pytest.raises(ValueError, match="trace 1 spells a marker in its text"):
    save_messages(tmp_path / "t.jsonl", traces)
  assert not (tmp_path / "t.jsonl").exists()


GOOD = _messages(("user", "u"), ("assistant", "a"))


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (
      _messages(("assistant", "a"), ("user", "u")),
      r"m\.jsonl:2: roles are assistant, user; needed: an optional system,",
    ),
    (_messages(("user", "u")), r"m\.jsonl:2: roles are user; needed"),
    (_messages(("system", "s")), r"m\.jsonl:2: roles are system; needed"),
    ([], r"m\.jsonl:2: roles are none; needed"),
    (
      _messages(("user", " "), ("assistant", "a")),
      r"m\.jsonl:2: message 0 \(user\) has empty content",
    ),
    (
      [{"role": "user"}, {"role": "assistant", "content": "a"}],
      r"m\.jsonl:2: message 0 \(user\) has empty content",
    ),
    (
      _messages(("user", "u"), ("assistant", "<think>a")),
      r"m\.jsonl:2: message 1 \(assistant\) has broken markup",
    ),
    (
      _messages(
        ("user", "u"), ("assistant", "<answer>a</answer><think>t</think>")
      ),
      r"m\.jsonl:2: message 1 \(assistant\) has broken markup",
    ),
    (
      _messages(("user", "u"), ("assistant", "x" * 20)),
      r"m\.jsonl:2: this conversation is 25 tokens long, but a row has"
      r" row_length=16.*at least 25",
    ),
    ("u", r'm\.jsonl:2: needs a list of objects under "messages", has the key'),
  ],
)
def test_errors_name_file_and_line(tmp_path, bad, message):
  path = _write(tmp_path / "m.jsonl", GOOD, bad)
  with pytest.raises(ValueError, match=message):
    load_messages(path, TOK, row_length=16)


def test_unreadable_files(tmp_path):
  with pytest.raises(ValueError, match=r"no file .*none\.jsonl"):
    load_messages(tmp_path / "none.jsonl", TOK, row_length=16)
  empty = tmp_path / "empty.jsonl"
  empty.touch()
  with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
    load_messages(empty, TOK, row_length=16)
