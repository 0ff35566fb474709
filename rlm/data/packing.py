"""Documents -> rows of one length: an index made once, rows cut from it.

A document longer than a row is split into pieces of a whole row and a rest;
a piece repeats the last token of the one before it, outside the loss, so that
every token but a document's first is a target exactly once. Pieces are packed
by best fit in decreasing length within a window of shuffled documents (best
fit truncates nothing else: Ding et al., arXiv:2404.10830).

Three layouts of a row:

| layout | a row holds | segments and positions |
|---|---|---|
| `isolated` | several documents | one segment each, positions restart |
| `cross_document` | several documents | one segment, positions run on |
| `single` | one document | one segment |

DeepSeek-V3 pretrains with `cross_document` (its 2.1) and fine-tunes with
`isolated` (5.1).
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np

from rlm.data.documents import Documents

Layout = Literal["isolated", "cross_document", "single"]


@dataclasses.dataclass(frozen=True, eq=False)
class PackingIndex:
  """Which pieces make up each row.

  Row r holds the pieces [row_offsets[r], row_offsets[r + 1]) in that order.

  Attributes:
    document: int64 [pieces], the document a piece is from.
    start: int64 [pieces], its first token inside that document.
    length: int64 [pieces], in tokens.
    row_offsets: int64 [rows + 1].
    row_length: tokens of a row, T.
  """

  document: np.ndarray
  start: np.ndarray
  length: np.ndarray
  row_offsets: np.ndarray
  row_length: int

  def __len__(self) -> int:
    return len(self.row_offsets) - 1

  @property
  def fill_rate(self) -> float:
    """Share of the rows' places that hold a token."""
    return float(self.length.sum() / max(len(self) * self.row_length, 1))


def split_long(
  lengths: np.ndarray, row_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cuts documents into pieces of at most a row, overlapping by one token.

  Args:
    lengths: int64 [documents], in tokens.
    row_length: T, at least 2.

  Returns:
    document, start and length of each piece, int64 [pieces] each; documents
    in order. A document of one token has no target and gives no piece.
  """
  step = row_length - 1  # new targets of a full piece
  counts = np.maximum(-(-(lengths - 1) // step), 0)
  document = np.repeat(np.arange(len(lengths)), counts)
  first = np.cumsum(counts) - counts
  start = (np.arange(len(document)) - first[document]) * step
  return document, start, np.minimum(lengths[document] - start, row_length)


def best_fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
  """Best-fit-decreasing bin packing.

  Each piece, longest first, goes to the row with the least room that still
  holds it. The rows' room is kept as bits of one integer, so that finding the
  row is one shift, whatever the number of rows.

  Args:
    lengths: int64 [pieces], each in 1..row_length.
    row_length: T.

  Returns:
    int64 [pieces], the row of each piece; rows are numbered as opened.
  """
  rows = np.empty(len(lengths), np.int64)
  with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
  occupied = 0  # bit k: some row has room for exactly k
  opened = 0
  order = np.argsort(-lengths, kind="stable")
  for piece, length in zip(
    order.tolist(), lengths[order].tolist(), strict=True
  ):
    fits = occupied >> length
    if fits:
      room = length + (fits & -fits).bit_length() - 1
      row = with_room[room].pop()
      if not with_room[room]:
        occupied ^= 1 << room
    else:
      room, row = row_length, opened
      opened += 1
    rows[piece] = row
    left = room - length
    if left:
      with_room[left].append(row)
      occupied |= 1 << left
  return rows


def pack(
  lengths: np.ndarray,
  *,
  row_length: int,
  layout: Layout,
  window: int,
  seed: int,
) -> PackingIndex:
  """The packing index of a corpus: a pure function of its arguments.

  Args:
    lengths: int64 [documents], in tokens.
    row_length: T, at least 2.
    layout: "single" gives each piece a row; the others pack.
    window: documents packed together. A larger one fills rows better; a
      smaller one keeps rows a fairer sample of the corpus.
    seed: of the shuffle of documents, and of pieces inside a row.

  Returns:
    The index; its rows come in the order of the windows, so shuffle them.

  Raises:
    ValueError: `row_length` below 2 or `window` below 1.
  """
  if row_length < 2:
    raise ValueError(
      f"{row_length=}; a row needs at least 2 tokens, one to predict the other."
    )
  if window < 1:
    raise ValueError(f"{window=}; at least one document is packed at a time.")
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(lengths))
  place, start, length = split_long(lengths[order], row_length)
  row = np.empty(len(place), np.int64)
  if layout == "single":
    row[:] = np.arange(len(place))
  else:
    rows_before = 0
    edges = np.searchsorted(
      place, np.arange(0, len(order) + window, window)
    ).tolist()
    for begin, end in itertools.pairwise(edges):
      if begin < end:
        row[begin:end] = best_fit(length[begin:end], row_length) + rows_before
        rows_before = int(row[begin:end].max()) + 1
  # By row; inside a row at random, or the longest would always come first.
  by_row = np.lexsort((rng.random(len(row)), row))
  offsets = np.concatenate([[0], np.cumsum(np.bincount(row))])
  return PackingIndex(
    order[place[by_row]], start[by_row], length[by_row], offsets, row_length
  )


class PackedRows:
  """Random access to the rows of a packed corpus.

  `rows[r]` is a dict of arrays [T], as a batch has them in [B, T]:
  tokens, positions, segment_ids int32 and loss_mask bool. `loss_mask[t]` marks
  a target that is predicted from t - 1, so the first token of a piece never
  is one. Padding: pad token, position 0, segment 0, no loss.
  """

  def __init__(
    self,
    documents: Documents,
    index: PackingIndex,
    *,
    layout: Layout,
    pad_id: int,
  ):
    self._documents = documents
    self._index = index
    self._layout = layout
    self._pad_id = pad_id

  def __len__(self) -> int:
    return len(self._index)

  @property
  def fill_rate(self) -> float:
    """Share of the rows' places that hold a token."""
    return self._index.fill_rate

  def __getitem__(self, r: int) -> dict[str, np.ndarray]:
    index, documents = self._index, self._documents
    row = empty_row(index.row_length, self._pad_id)
    filled = 0
    pieces = range(*index.row_offsets[r : r + 2].tolist())
    for segment, piece in enumerate(pieces, 1):
      length = int(index.length[piece])
      begin = int(documents.offsets[index.document[piece]] + index.start[piece])
      here = slice(filled, filled + length)
      row["tokens"][here] = documents.tokens[begin : begin + length]
      row["loss_mask"][here] = documents.loss_mask[begin : begin + length]
      row["loss_mask"][filled] = False
      row["segment_ids"][here] = segment
      row["positions"][here] = np.arange(length)
      filled += length
    if self._layout == "cross_document":
      row["segment_ids"][:filled] = 1
      row["positions"][:filled] = np.arange(filled)
    return row

  def __repr__(self) -> str:
    # No address in it: grain compares representations when it resumes.
    return (
      f"PackedRows(rows={len(self)}, row_length={self._index.row_length},"
      f" documents={len(self._documents)}, layout={self._layout!r})"
    )


def pack_documents(
  documents: Documents,
  *,
  row_length: int,
  layout: Layout,
  window: int,
  seed: int,
  pad_id: int,
) -> PackedRows:
  """Packs a corpus; see `pack` for the arguments."""
  index = pack(
    documents.lengths,
    row_length=row_length,
    layout=layout,
    window=window,
    seed=seed,
  )
  return PackedRows(documents, index, layout=layout, pad_id=pad_id)


def empty_row(row_length: int, pad_id: int) -> dict[str, np.ndarray]:
  """A row of padding: what fills up a batch."""
  return {
    "tokens": np.full(row_length, pad_id, np.int32),
    "positions": np.zeros(row_length, np.int32),
    "segment_ids": np.zeros(row_length, np.int32),
    "loss_mask": np.zeros(row_length, bool),
  }
