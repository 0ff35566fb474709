import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from rlm.data.thinking import ThinkingParser, opens_thinking, split_thinking
from rlm.data.tokenizer import ByteTokenizer, StreamDecoder


def merged(pieces):
  """The pieces with neighbours of one kind joined."""
  out = []
  for kind, text in pieces:
    assert text, "an empty piece"
    if out and out[-1][0] == kind:
      out[-1] = (kind, out[-1][1] + text)
    else:
      out.append((kind, text))
  return out


def parse(parts, starts_inside):
  parser = ThinkingParser(starts_inside)
  pieces = [piece for part in parts for piece in parser.push(part)]
  return merged(pieces + parser.finish())


def test_r1_starts_inside():
  assert parse(["two and two\n</think>\n\nFour."], True) == [
    ("thinking", "two and two\n"),
    ("answer", "\n\nFour."),
  ]


def test_r1_0528_opens_thinking_itself():
  assert parse(["<think>\nhm</think>Four."], False) == [
    ("thinking", "\nhm"),
    ("answer", "Four."),
  ]


def test_thinking_between_answers():
  text = "a<think>b</think>c<think>d</think>e"
  assert [t for _, t in parse([text], False)] == list("abcde")
  assert split_thinking(text) == ("bd", "ace")


@pytest.mark.parametrize(
  ("text", "inside", "expected"),
  [
    ("no marker", False, ("", "no marker")),
    ("no end", True, ("no end", "")),
    ("a<think>b", True, ("a<think>b", "")),  # within thinking: text
    ("a</think>b", False, ("", "a</think>b")),  # nothing to close: text
    ("1 < 2 <thin", False, ("", "1 < 2 <thin")),
    ("<<think>x", False, ("x", "<")),
    ("<think><think>x</think>", False, ("<think>x", "")),
    ("", True, ("", "")),
  ],
)
def test_edges(text, inside, expected):
  assert split_thinking(text, starts_inside=inside) == expected
  assert ("", "") == split_thinking("", inside)


def test_only_a_possible_marker_is_held_back():
  parser = ThinkingParser(True)
  assert parser.push("a <") == [("thinking", "a ")]
  assert parser.push("b </thin") == [("thinking", "<b ")]
  assert parser.inside
  assert parser.push("k>c") == [("answer", "c")]
  assert not parser.inside
  assert parser.push("</") == [("answer", "</")]  # no marker begins so here
  assert parser.push("<thi") == []
  assert parser.finish() == [("answer", "<thi")]
  assert parser.push("x") == [("thinking", "x")]  # ready again


texts = st.lists(
  st.sampled_from(["<think>", "</think>", "<", "</", "think>", "a", "é\n"])
).map("".join)


@given(texts, st.booleans(), st.data())
def test_any_chunks_give_the_same(text, inside, data):
  cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
  bounds = [0, *cuts, len(text)]
  parts = [text[a:b] for a, b in itertools.pairwise(bounds)]
  whole = parse([text], inside)
  assert parse(parts, inside) == whole
  assert parse(list(text), inside) == whole
  thinking, answer = split_thinking(text, inside)
  assert thinking == "".join(t for kind, t in whole if kind == "thinking")
  assert answer == "".join(t for kind, t in whole if kind == "answer")


@given(texts, st.booleans())
def test_behind_a_stream_of_tokens(text, inside):
  tok = ByteTokenizer()
  stream = StreamDecoder(tok)
  parts = [*map(stream.push, tok.encode(text)), stream.finish()]
  assert parse(parts, inside) == parse([text], inside)


def test_what_the_prompt_says():
  assert opens_thinking("<｜User｜>hi<｜Assistant｜><think>\n")
  assert not opens_thinking("<｜User｜><think> what?<｜Assistant｜>")
  assert not opens_thinking("<｜User｜>hi<｜Assistant｜></think>")
