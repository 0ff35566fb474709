import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from rlm.data.documents import Documents
from rlm.data.packing import (
  PackedRows,
  PackingIndex,
  best_fit,
  empty_row,
  pack,
  pack_documents,
  split_long,
)

LAYOUTS = ("isolated", "cross_document", "single")
PAD = 99


def _documents(lengths):
  """Documents whose tokens are all different, from 1000 on."""
  ids = iter(range(1000, 1000 + sum(lengths)))
  return Documents.join(
    ([next(ids) for _ in range(n)], [True] * n) for n in lengths
  )


def test_best_fit_by_hand():
  # T = 10. 7 opens row 0 (room 3), 6 row 1 (4), 4 fills row 1, 3 fills row 0,
  # 2 opens row 2 (8), 1 takes its rest.
  rows = best_fit(np.array([2, 7, 3, 6, 1, 4]), 10)
  assert rows.tolist() == [2, 0, 0, 1, 2, 1]


def test_best_fit_prefers_the_tightest_row():
  # After 8 and 7 the rooms are 2 and 3: a piece of 2 belongs to the first.
  assert best_fit(np.array([8, 7, 2, 3]), 10).tolist() == [0, 1, 0, 1]


@given(st.lists(st.integers(1, 16), max_size=60))
def test_best_fit_never_overflows_and_wastes_little(lengths):
  rows = best_fit(np.array(lengths, np.int64), 16)
  loads = np.bincount(rows, weights=lengths).astype(int)
  assert (loads <= 16).all() and (loads > 0).all()
  # No two rows could have been one.
  assert len(loads) < 2 or sum(sorted(loads)[:2]) > 16


def test_split_long_by_hand():
  document, start, length = split_long(np.array([3, 4, 5, 1, 8, 0]), 4)
  # 5 tokens: 0-3, then 3-4 with token 3 as context. 8: 0-3, 3-6, 6-7.
  assert document.tolist() == [0, 1, 2, 2, 4, 4, 4]
  assert start.tolist() == [0, 0, 0, 3, 0, 3, 6]
  assert length.tolist() == [3, 4, 4, 2, 4, 4, 2]


def test_rows_by_hand():
  documents = Documents.join(
    [
      ([10, 11, 12], [False, True, True]),
      ([20, 21, 22, 23], [False, False, True, True]),
    ]
  )
  index = PackingIndex(
    document=np.array([1, 0]),
    start=np.array([0, 0]),
    length=np.array([4, 3]),
    row_offsets=np.array([0, 2]),
    row_length=8,
  )
  isolated = PackedRows(documents, index, layout="isolated", pad_id=PAD)[0]
  assert isolated["tokens"].tolist() == [20, 21, 22, 23, 10, 11, 12, PAD]
  assert isolated["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
  assert isolated["segment_ids"].tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
  assert isolated["loss_mask"].tolist() == [
    *(False, False, True, True),
    *(False, True, True),
    False,
  ]
  crossed = PackedRows(documents, index, layout="cross_document", pad_id=PAD)[0]
  assert crossed["tokens"].tolist() == isolated["tokens"].tolist()
  assert crossed["positions"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
  assert crossed["segment_ids"].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
  assert crossed["loss_mask"].tolist() == isolated["loss_mask"].tolist()
  assert index.fill_rate == 7 / 8


@given(
  st.lists(st.integers(0, 40), min_size=1, max_size=30),
  st.integers(2, 12),
  st.sampled_from(LAYOUTS),
  st.integers(1, 10),
)
def test_every_token_is_a_target_once(lengths, row_length, layout, window):
  documents = _documents(lengths)
  rows = pack_documents(
    documents,
    row_length=row_length,
    layout=layout,
    window=window,
    seed=7,
    pad_id=PAD,
  )
  targets, contexts = [], {}
  for r in range(len(rows)):
    row = rows[r]
    tokens, segments = row["tokens"], row["segment_ids"]
    for t in np.flatnonzero(row["loss_mask"]):
      assert t > 0 and segments[t] == segments[t - 1] > 0
      targets.append(int(tokens[t]))
      contexts[int(tokens[t])] = int(tokens[t - 1])
    padding = segments == 0
    assert (tokens[padding] == PAD).all()
    assert not row["loss_mask"][padding].any()
    assert not row["positions"][padding].any()
    assert not padding[: len(padding) - padding.sum()].any()  # left aligned
  firsts = [
    int(documents.tokens[documents.offsets[i]])
    for i, n in enumerate(lengths)
    if n
  ]
  expected = set(documents.tokens.tolist()) - set(firsts)
  assert sorted(targets) == sorted(expected)
  # Predicted from the token before it in its own document.
  assert all(context == token - 1 for token, context in contexts.items())


@given(
  st.lists(st.integers(2, 20), min_size=1, max_size=30),
  st.sampled_from(LAYOUTS),
)
def test_positions_restart_with_segments(lengths, layout):
  rows = pack_documents(
    _documents(lengths),
    row_length=16,
    layout=layout,
    window=8,
    seed=0,
    pad_id=PAD,
  )
  for r in range(len(rows)):
    row = rows[r]
    ids = [s for s in np.unique(row["segment_ids"]).tolist() if s]
    assert ids == list(range(1, len(ids) + 1))
    if layout != "isolated":
      assert ids == [1]
    for s in ids:
      positions = row["positions"][row["segment_ids"] == s]
      assert positions.tolist() == list(range(len(positions)))


def test_packing_is_a_function_of_the_seed():
  lengths = np.arange(2, 60) % 13 + 2
  arguments = dict(row_length=16, layout="isolated", window=16)
  a, b, c = (pack(lengths, seed=seed, **arguments) for seed in (1, 1, 2))
  np.testing.assert_array_equal(a.document, b.document)
  np.testing.assert_array_equal(a.row_offsets, b.row_offsets)
  assert a.document.tolist() != c.document.tolist()


def test_single_gives_each_document_a_row():
  index = pack(
    np.array([3, 2, 4]), row_length=8, layout="single", window=1, seed=0
  )
  assert len(index) == 3 and sorted(index.length.tolist()) == [2, 3, 4]
  assert index.fill_rate == 9 / 24


def test_windows_bound_what_meets_in_a_row():
  # 60 documents that pair up perfectly, but only within a window of 2.
  lengths = np.array([6, 10] * 30)
  narrow = pack(lengths, row_length=16, layout="isolated", window=2, seed=0)
  wide = pack(lengths, row_length=16, layout="isolated", window=60, seed=0)
  assert wide.fill_rate == 1.0 and len(wide) == 30
  assert narrow.fill_rate < 1.0


def test_fifty_thousand_documents_fill_their_rows():
  lengths = np.random.default_rng(0).integers(40, 90, 50_000)
  index = pack(lengths, row_length=256, layout="isolated", window=4096, seed=0)
  assert index.length.sum() == lengths.sum()
  assert index.fill_rate > 0.95


def test_repr_has_no_address():
  rows = pack_documents(
    _documents([3, 3]),
    row_length=8,
    layout="isolated",
    window=2,
    seed=0,
    pad_id=PAD,
  )
  assert repr(rows) == (
    "PackedRows(rows=1, row_length=8, documents=2, layout='isolated')"
  )


def test_empty_row_is_padding():
  row = empty_row(3, PAD)
  assert row["tokens"].tolist() == [PAD] * 3
  assert not any(row[k].any() for k in row if k != "tokens")


def test_errors():
  with pytest.raises(ValueError, match=r"row_length=1; a row needs at least 2"):
    pack(np.array([3]), row_length=1, layout="isolated", window=1, seed=0)
  with pytest.raises(ValueError, match="window=0; at least one document"):
    pack(np.array([3]), row_length=4, layout="isolated", window=0, seed=0)
