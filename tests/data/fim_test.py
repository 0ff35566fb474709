import random

import hypothesis.strategies as st
from hypothesis import given

from rlm.data.fim import fim_tokens, split_text
from rlm.data.tokenizer import ByteTokenizer

TOK = ByteTokenizer()


def test_prefix_suffix_middle_by_hand():
  tokens = fim_tokens(TOK, "ab", "c", "de")
  begin, hole, end, eos = 261, 262, 263, 257
  assert tokens == [begin, 97, 98, hole, 100, 101, end, 99, eos]


@given(st.text(), st.integers())
def test_the_cuts_lose_nothing(text, seed):
  prefix, middle, suffix = split_text(text, random.Random(seed))
  assert prefix + middle + suffix == text


def test_every_cut_of_a_short_text_occurs():
  rng = random.Random(0)
  seen = {split_text("ab", rng) for _ in range(200)}
  assert seen == {
    ("", "", "ab"),
    ("", "a", "b"),
    ("", "ab", ""),
    ("a", "", "b"),
    ("a", "b", ""),
    ("ab", "", ""),
  }
