import hashlib
import json
import math
import pathlib
import sysconfig

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from rlm.data.text import load_jsonl, load_stdlib, load_text, ngram_entropy


def _names(documents):
  return {d.name for d in documents}


def test_stdlib_is_split_by_file_and_recorded():
  corpus = load_stdlib(max_bytes=500_000, heldout_fraction=0.2)
  train, heldout = _names(corpus.train), _names(corpus.heldout)
  assert train and heldout and not train & heldout
  assert all(name.endswith(".py") for name in train | heldout)
  assert not any(
    part in ("test", "tests", "site-packages", "__pycache__")
    for name in train | heldout
    for part in name.split("/")
  )
  for side, documents in (("train", corpus.train), ("heldout", corpus.heldout)):
    record = corpus.record[side]
    assert record["documents"] == len(documents) == len(record["files"])
    assert record["bytes"] == sum(len(d.text.encode()) for d in documents)
    assert [line.split("  ", 1)[1] for line in record["files"]] == [
      d.name for d in documents
    ]
    for line in record["files"][:3]:
      digest, name = line.split("  ", 1)
      file = pathlib.Path(sysconfig.get_path("stdlib")) / name
      assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
  total = corpus.record["train"]["bytes"] + corpus.record["heldout"]["bytes"]
  assert 400_000 < total <= 500_000
  assert load_stdlib(max_bytes=500_000, heldout_fraction=0.2) == corpus
  json.dumps(corpus.record)


def test_stdlib_cap_too_small():
  with pytest.raises(ValueError, match=r"within max_bytes=0; at least 2 are"):
    load_stdlib(max_bytes=0, heldout_fraction=0.1)


def _folder(tmp_path, count=10):
  for i in range(count):
    (tmp_path / f"sub{i % 2}").mkdir(exist_ok=True)
    (tmp_path / f"sub{i % 2}" / f"{i}.md").write_text(f"file {i}\n")
  (tmp_path / "data.bin").write_bytes(b"\xff\xfe")
  (tmp_path / "empty.md").touch()
  return tmp_path


def test_folder_is_split_by_file(tmp_path):
  corpus = load_text(_folder(tmp_path), suffixes=(".md",), heldout_fraction=0.3)
  assert len(corpus.train) == 7 and len(corpus.heldout) == 3
  assert not _names(corpus.train) & _names(corpus.heldout)
  again = load_text(tmp_path, suffixes=(".md",), heldout_fraction=0.3)
  assert again == corpus
  whole = load_text(tmp_path, suffixes=(".md",), heldout_fraction=0.0)
  assert len(whole.train) == 10 and not whole.heldout


def test_one_file_is_split_by_line(tmp_path):
  path = tmp_path / "book.txt"
  path.write_text("".join(f"line {i}\n" for i in range(10)))
  corpus = load_text(path, suffixes=(), heldout_fraction=0.2)
  assert [d.text for d in corpus.heldout] == ["line 8\nline 9\n"]
  assert corpus.train[0].text.endswith("line 7\n")


def test_text_errors(tmp_path):
  with pytest.raises(ValueError, match=r"no file or folder .*none"):
    load_text(tmp_path / "none", suffixes=(".md",), heldout_fraction=0.1)
  with pytest.raises(ValueError, match=r"no file ending in \.md; it has none"):
    load_text(tmp_path, suffixes=(".md",), heldout_fraction=0.1)
  _folder(tmp_path)
  with pytest.raises(ValueError, match=r"ending in \.txt; it has \.bin, \.md"):
    load_text(tmp_path, suffixes=(".txt",), heldout_fraction=0.1)
  with pytest.raises(ValueError, match=r"data\.bin:1: byte 0xff is not UTF-8"):
    load_text(tmp_path, suffixes=(".md", ".bin"), heldout_fraction=0.1)
  with pytest.raises(ValueError, match=r"heldout_fraction=1\.0 must be"):
    load_text(tmp_path, suffixes=(".md",), heldout_fraction=1.0)


def test_undecodable_line_is_counted(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"one\ntwo\nthr\xe9e\n")
  with pytest.raises(ValueError, match=r"a\.txt:3: byte 0xe9"):
    load_text(path, suffixes=(), heldout_fraction=0.1)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", "every one of the 1 files in .* is empty"),
    ("x", r"1 distinct document, which cannot be split .* with held"),
  ],
)
def test_folder_of_nothing_and_of_one(tmp_path, content, message):
  (tmp_path / "a.md").write_text(content)
  with pytest.raises(ValueError, match=message):
    load_text(tmp_path, suffixes=(".md",), heldout_fraction=0.1)


def test_jsonl_keeps_copies_on_one_side(tmp_path):
  path = tmp_path / "t.jsonl"
  lines = [{"text": f"t{i % 5}"} for i in range(20)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  corpus = load_jsonl(path, heldout_fraction=0.4)
  train = {d.text for d in corpus.train}
  heldout = {d.text for d in corpus.heldout}
  assert len(train) == 3 and len(heldout) == 2 and not train & heldout
  assert len(corpus.train) == 12 and "files" not in corpus.record["train"]


def test_jsonl_errors(tmp_path):
  path = tmp_path / "t.jsonl"
  path.write_text('{"text": "a"}\n{"txt": "b", "id": 1}\n')
  with pytest.raises(
    ValueError, match=r't\.jsonl:2: needs a non-empty .*"text", .* txt, id'
  ):
    load_jsonl(path, heldout_fraction=0.0)


def test_entropies_by_hand():
  # a b a b a c: unigram (3, 2, 1)/6; after a: b b c, after b: a a.
  expected = -sum(p * math.log2(p) for p in (3 / 6, 2 / 6, 1 / 6))
  assert ngram_entropy([b"ababac"], 1) == pytest.approx(expected)
  after_a = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
  assert ngram_entropy([b"ababac"], 2) == pytest.approx(3 / 5 * after_a)


def test_bigrams_do_not_cross_pieces():
  # Inside the pieces a is always followed by b, and nothing follows b.
  assert ngram_entropy([b"ab", b"", b"ab", b"ab", b""], 2) == 0.0
  assert ngram_entropy([b"", b"", b"aa"], 2) == 0.0


@given(st.binary(min_size=2, max_size=400))
def test_no_model_of_its_order_beats_it(data):
  unigram, bigram = ngram_entropy([data], 1), ngram_entropy([data], 2)
  assert -1e-9 <= bigram and unigram <= math.log2(256) + 1e-9
  # The uniform model over the distinct bytes is one such model.
  assert unigram <= math.log2(len(np.unique(list(data)))) + 1e-9


def test_entropy_errors():
  with pytest.raises(ValueError, match="order=3; orders 1"):
    ngram_entropy([b"abc"], 3)
  with pytest.raises(ValueError, match="no piece has the 2 bytes"):
    ngram_entropy([b"a", b"b"], 2)
