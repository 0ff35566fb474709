import pytest

from rlm.data.r1_chat import R1Chat
from rlm.data.tokenizer import ByteTokenizer

CHAT = R1Chat(ByteTokenizer())
BOS, EOS, USER, ASSISTANT = 256, 257, 259, 260
THINK, END_THINK, ANSWER, END_ANSWER = 264, 265, 266, 267


def _messages(*turns):
  return [{"role": role, "content": content} for role, content in turns]


def test_one_turn_by_hand():
  assert CHAT.encode_prompt("a") == [BOS, USER, 97, ASSISTANT]
  said = [THINK, 98, END_THINK, ANSWER, 99, END_ANSWER, EOS]
  assert CHAT.encode_response("b", "c") == said
  tokens, mask = CHAT.encode_turn("a", "b", "c")
  assert tokens == [BOS, USER, 97, ASSISTANT, *said]
  assert mask == [False] * 4 + [True] * 7  # EOS in the loss


def test_several_turns_by_hand():
  [(tokens, mask)] = CHAT.encode_messages(
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
  [(tokens, _)] = CHAT.encode_messages(
    _messages(("user", "u"), ("assistant", "<think>t</think>a b"))
  )
  assert tokens[4:] == [THINK, 116, END_THINK, 97, 32, 98, EOS]


def test_thinking_that_stands_apart():
  said = {"role": "assistant", "reasoning_content": "t", "content": "a"}
  [(tokens, _)] = CHAT.encode_messages([*_messages(("user", "u")), said])
  assert tokens[4:] == [THINK, 116, END_THINK, 97, EOS]


def test_markers_in_a_users_text_stay_text():
  [(tokens, mask)] = CHAT.encode_messages(
    _messages(("user", "<think>x</think>"), ("assistant", "a"))
  )
  assert THINK not in tokens and END_THINK not in tokens
  assert sum(mask) == 2


def test_response_text_undoes_encode_response():
  said = CHAT.encode_response("b é", "c")
  assert CHAT.response_text(said[:-1]) == "<think>b é</think><answer>c</answer>"


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (
      _messages(("assistant", "a"), ("user", "u")),
      "roles are assistant, user; needed: an optional system,",
    ),
    (_messages(("user", "u")), "roles are user; needed"),
    (_messages(("system", "s")), "roles are system; needed"),
    ([], "roles are none; needed"),
    (
      _messages(("user", " "), ("assistant", "a")),
      r"message 0 \(user\) has empty content",
    ),
    (
      [{"role": "user"}, {"role": "assistant", "content": "a"}],
      r"message 0 \(user\) has empty content",
    ),
    (
      _messages(("user", "u"), ("assistant", "<think>a")),
      r"message 1 \(assistant\) has broken markup",
    ),
    (
      _messages(
        ("user", "u"), ("assistant", "<answer>a</answer><think>t</think>")
      ),
      r"message 1 \(assistant\) has broken markup",
    ),
  ],
)
def test_errors(bad, message):
  with pytest.raises(ValueError, match=message):
    CHAT.encode_messages(bad)
