import dataclasses

import numpy as np
import pytest

from rlm.data.documents import Documents, task_documents, text_documents
from rlm.data.r1_chat import R1Chat
from rlm.data.tokenizer import ByteTokenizer

TOK = ByteTokenizer()
BOS, EOS = TOK.bos_id, TOK.eos_id


@dataclasses.dataclass
class _Problem:
  prompt: str


@dataclasses.dataclass
class _Solution:
  thinking: str
  answer: str


class _Echo:
  """A task whose texts say what they were asked with."""

  def problem(self, seed, index, level, split):
    return _Problem(f"{split} {index} {level}?")

  def worked_solution(self, problem):
    return _Solution("t", "a")

  def authored_solution(self, problem, rng):
    return _Solution("t", "b" if rng.random() < 0.5 else "a")


def _document(documents, i):
  begin, end = documents.offsets[i : i + 2]
  return documents.tokens[begin:end], documents.loss_mask[begin:end]


def _texts(documents):
  return [TOK.decode(_document(documents, i)[0]) for i in range(len(documents))]


def _make(**changes):
  arguments = dict(
    count=60,
    levels=(2, 3, 3),
    author="clean",
    tagged=0.5,
    seed=0,
    split="train",
    row_length=64,
  )
  return task_documents(R1Chat(TOK), _Echo(), **(arguments | changes))


def test_join_by_hand():
  documents = Documents.join([([1, 2], [False, True]), ([3], [True])])
  assert documents.offsets.tolist() == [0, 2, 3]
  assert documents.tokens.tolist() == [1, 2, 3]
  assert documents.loss_mask.tolist() == [False, True, True]
  assert documents.lengths.tolist() == [2, 1] and len(documents) == 2
  assert documents.tokens.dtype == np.int32
  assert len(Documents.join([])) == 0


def test_text_by_hand():
  documents = text_documents(TOK, ["ab", "é"], fim_rate=0.0, seed=0)
  tokens, mask = _document(documents, 0)
  assert tokens.tolist() == [BOS, 97, 98, EOS]
  assert mask.tolist() == [False, True, True, True]
  assert _document(documents, 1)[0].tolist() == [BOS, 0xC3, 0xA9, EOS]


def test_fim_rearranges_its_share_and_nothing_else():
  texts = [f"document number {i}" for i in range(400)]
  documents = text_documents(TOK, texts, fim_rate=0.1, seed=3)
  begins = [int(_document(documents, i)[0][0]) for i in range(len(texts))]
  share = begins.count(TOK.fim_begin_id) / len(texts)
  assert 0.05 < share < 0.15
  for i, (text, begin) in enumerate(zip(texts, begins, strict=True)):
    tokens, mask = _document(documents, i)
    assert mask.tolist() == [False] + [True] * (len(tokens) - 1)
    if begin == BOS:
      assert TOK.decode(tokens[1:-1]) == text
    else:
      hole = tokens.tolist().index(TOK.fim_hole_id)
      end = tokens.tolist().index(TOK.fim_end_id)
      prefix, suffix = tokens[1:hole], tokens[hole + 1 : end]
      middle = tokens[end + 1 : -1]
      assert TOK.decode([*prefix, *middle, *suffix]) == text
      assert tokens[-1] == EOS


def test_fim_is_a_function_of_seed_and_index():
  texts = [f"document number {i}" for i in range(50)]
  whole = text_documents(TOK, texts, fim_rate=0.5, seed=3)
  again = text_documents(TOK, texts[:20], fim_rate=0.5, seed=3)
  np.testing.assert_array_equal(whole.tokens[: len(again.tokens)], again.tokens)
  other = text_documents(TOK, texts, fim_rate=0.5, seed=4)
  assert whole.tokens.tolist() != other.tokens.tolist()


def test_plain_problem_by_hand():
  documents = _make(count=1, levels=(2,), tagged=0.0)
  tokens, mask = _document(documents, 0)
  assert TOK.decode(tokens[1:-1]) == "train 0 2?\nt\na"
  assert (tokens[0], tokens[-1]) == (BOS, EOS)
  asked = 1 + len("train 0 2?\n")
  assert mask.tolist() == [False] * asked + [True] * len("t\na") + [True]


def test_tagged_problem_is_a_chat_turn():
  documents = _make(count=1, levels=(2,), tagged=1.0)
  tokens, mask = _document(documents, 0)
  expected, expected_mask = R1Chat(TOK).encode_turn("train 0 2?", "t", "a")
  assert tokens.tolist() == expected and mask.tolist() == expected_mask


def test_shares_of_levels_tags_and_authors():
  documents = _make(count=3000, tagged=0.25, author="noisy", split="heldout")
  texts = _texts(documents)
  assert all("heldout" in text for text in texts)
  tagged = np.mean(["<think>" in text for text in texts])
  hard = np.mean([" 3?" in text for text in texts])
  noisy = np.mean(["\nb" in text or ">b<" in text for text in texts])
  assert abs(tagged - 0.25) < 0.03
  assert abs(hard - 2 / 3) < 0.03
  assert abs(noisy - 0.5) < 0.03


def test_problems_are_a_function_of_seed_and_index():
  assert _texts(_make(count=20)) == _texts(_make(count=60))[:20]
  assert _texts(_make(seed=1)) != _texts(_make())


def test_too_long_for_a_row():
  with pytest.raises(
    ValueError, match=r"level=2 is 16 tokens long, but a row has row_length=8"
  ):
    _make(levels=(2,), tagged=0.0, row_length=8)
