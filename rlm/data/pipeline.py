"""Sources -> one endless stream of rows -> the batch of every step.

Everything is random access: `stream.rows[j]` and `batches[t]` are pure
functions of the config, the seed and the index. A resumed run therefore needs
no more than its step, and any number of processes reads the same stream, each
the rows of every batch that its devices need (`rlm.parallel.rows`).
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from rlm.data.chat import Chat
from rlm.data.documents import Task
from rlm.data.packing import PackedRows, empty_row, pack_documents
from rlm.data.sources import DataConfig, Loading, Source, Split, TextSource
from rlm.data.text import ngram_entropy
from rlm.data.tokenizer import Vocabulary

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class RowStream:
  """An endless stream of rows.

  Attributes:
    rows: rows[j] is row j, a dict of arrays [T].
    padding: a row of padding, to fill up batches.
    record: for the run's record, what each source holds.
  """

  rows: grain.MapDataset
  padding: Batch
  record: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Heldout:
  """A fixed set of rows to evaluate the loss on.

  bits per byte = (sum of nats over the targets) / ln 2 / num_bytes.

  Attributes:
    batches: dicts of arrays, filled up with padding; whole on every process.
    num_bytes: bytes of text in the tokens that count, over all batches;
      markers have none, but their loss counts.
    unigram_bits_per_byte, bigram_bits_per_byte: entropies of that text, fitted
      on itself (`text.ngram_entropy`); None where it is not plain text.
  """

  batches: list[Batch]
  num_bytes: int
  unigram_bits_per_byte: float | None
  bigram_bits_per_byte: float | None


def make_stream(
  cfg: DataConfig,
  chat: Chat,
  *,
  seed: int,
  tasks: Mapping[str, Task],
) -> RowStream:
  """Loads, tokenizes and packs the training split, and mixes the sources.

  Args:
    cfg: the data section.
    chat: how the model is written to.
    seed: of the run; each source has its own, derived from it and its name.
    tasks: the run's tasks by name.

  Raises:
    ValueError: data that is missing, broken or too long; with its source.
  """
  packed, record = {}, {}
  for name, source in cfg.sources.items():
    if source.weight:
      packed[name], record[name] = _pack_source(
        cfg, name, chat, tasks, seed, "train"
      )
      if not len(packed[name]):
        raise ValueError(
          f"source {name!r} has no document of two tokens or more; there is"
          " nothing to predict in it."
        )
  return mix_rows(
    packed,
    {name: cfg.sources[name].weight for name in packed},
    seed=seed,
    padding=empty_row(cfg.row_length, chat.pad_id),
    record=record,
  )


def mix_rows(
  packed: Mapping[str, PackedRows],
  weights: Mapping[str, float],
  *,
  seed: int,
  padding: Batch,
  record: dict[str, Any],
) -> RowStream:
  """Endlessly repeats packed corpora, shuffled anew each epoch, and mixes them.

  The mixture is interleaved, not drawn: any stretch of rows holds the sources
  in proportion, to within one row each and 1% of the smallest weight.

  Args:
    packed: corpora by name.
    weights: share of each, in proportion to the others; positive.
    seed: of the shuffles.
    padding: a row of padding.
    record: passed on.
  """
  names = sorted(packed)
  datasets = [
    grain.MapDataset.source(packed[name])
    .shuffle(seed=_fold(seed, "rows", name))
    .repeat()
    for name in names
  ]
  rows = datasets[0]
  if len(datasets) > 1:
    rows = grain.MapDataset.mix(datasets, [weights[name] for name in names])
  return RowStream(rows, padding, record)


def make_batches(
  stream: RowStream,
  *,
  batch_size: int,
  row_counts: Sequence[int],
  positions: Sequence[int] | None = None,
) -> grain.MapDataset:
  """The batches of a run: batches[t] is that of step t.

  Step t takes the next `row_counts[t]` rows of the stream; padding rows fill
  the batch up to `batch_size`, so that a growing batch keeps its shape.

  Args:
    stream: the rows.
    batch_size: B, rows of a batch over all processes.
    row_counts: int [steps], each in 1..B.
    positions: int [n] in 0..B-1, the rows of every batch to read; None is all.

  Returns:
    batches[t]: tokens, positions, segment_ids int32 and loss_mask bool, each
    [n, T].

  Raises:
    ValueError: counts above the batch size, or positions beyond it.
  """
  counts = np.asarray(row_counts, np.int64)
  places = range(batch_size) if positions is None else list(positions)
  if not places or min(places) < 0 or max(places) >= batch_size:
    raise ValueError(
      f"positions {places} must name rows of a batch, 0..{batch_size - 1}."
    )
  if counts.size == 0 or counts.min() < 1 or counts.max() > batch_size:
    raise ValueError(
      f"row_counts run from {counts.min(initial=0)} to"
      f" {counts.max(initial=0)} over {counts.size} steps; each must lie in"
      f" 1..{batch_size=}."
    )
  ends = np.cumsum(counts)

  def batch(t: int) -> Batch:
    end = int(ends[t])
    start = end - int(counts[t])
    mine = [start + place for place in places]
    return _stack([stream.rows[j] if j < end else stream.padding for j in mine])

  return grain.MapDataset.range(len(counts)).map(batch)


def iterate_batches(
  batches: grain.MapDataset, start: int, *, prefetch: int
) -> grain.DatasetIterator:
  """Iterates from step `start`, made ahead of time in another thread.

  Args:
    batches: from `make_batches`.
    start: the first step to yield; the last one ends the iteration.
    prefetch: batches to hold ready. It changes no result.

  Returns:
    An iterator; `close()` it when leaving early.
  """
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
  iterator = iter(batches[start:].to_iter_dataset(options))
  iterator.start_prefetch()
  return iterator


def load_heldout(
  cfg: DataConfig,
  chat: Chat,
  *,
  seed: int,
  tasks: Mapping[str, Task],
  batch_size: int,
) -> dict[str, Heldout]:
  """The held-out rows of each source that has any, by its name.

  Args:
    cfg: the data section.
    chat: how the model is written to.
    seed: of the run, the one that `make_stream` is given.
    tasks: the run's tasks by name.
    batch_size: B, rows of a batch.
  """
  heldout = {}
  for name, source in cfg.sources.items():
    packed, _ = _pack_source(cfg, name, chat, tasks, seed, "heldout")
    rng = np.random.default_rng(_fold(seed, "heldout", name))
    chosen = rng.permutation(len(packed))[: cfg.heldout_rows].tolist()
    if not chosen:
      continue
    rows = [packed[r] for r in chosen]
    texts = _target_bytes(rows, chat.tokenizer)
    is_text = isinstance(source, TextSource)
    rows += [empty_row(cfg.row_length, chat.pad_id)] * (-len(rows) % batch_size)
    heldout[name] = Heldout(
      batches=[
        _stack(rows[begin : begin + batch_size])
        for begin in range(0, len(rows), batch_size)
      ],
      num_bytes=sum(map(len, texts)),
      unigram_bits_per_byte=ngram_entropy(texts, 1) if is_text else None,
      bigram_bits_per_byte=ngram_entropy(texts, 2) if is_text else None,
    )
  return heldout


def _pack_source(
  cfg: DataConfig,
  name: str,
  chat: Chat,
  tasks: Mapping[str, Task],
  seed: int,
  split: Split,
) -> tuple[PackedRows, dict[str, Any]]:
  """One source's rows, in packing order, and its part of the run's record."""
  source: Source = cfg.sources[name]
  try:
    documents, about = source.load(
      Loading(
        chat=chat,
        tasks=tasks,
        seed=_fold(seed, "documents", name),
        split=split,
        row_length=cfg.row_length,
      )
    )
  except ValueError as error:
    raise ValueError(f"data source {name!r}: {error}") from error
  packed = pack_documents(
    documents,
    row_length=cfg.row_length,
    layout=source.layout,
    window=cfg.packing_window,
    seed=_fold(seed, "packing", name),
    pad_id=chat.pad_id,
  )
  return packed, {
    "kind": source.kind,
    "documents": len(documents),
    "tokens": len(documents.tokens),
    "targets": int(documents.loss_mask.sum()),
    "rows": len(packed),
    "fill_rate": packed.fill_rate,
    **about,
  }


def _target_bytes(rows: Sequence[Batch], tokenizer: Vocabulary) -> list[bytes]:
  """The text among the targets, one piece per unbroken run of it."""
  has_text = tokenizer.text_lengths() > 0
  pieces = []
  for row in rows:
    places = np.flatnonzero(row["loss_mask"] & has_text[row["tokens"]])
    if places.size:
      breaks = np.flatnonzero(np.diff(places) > 1) + 1
      pieces += np.split(row["tokens"][places], breaks)
  return [tokenizer.decode_bytes(piece.tolist()) for piece in pieces]


def _stack(rows: Sequence[Batch]) -> Batch:
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _fold(seed: int, *names: str) -> int:
  """A 32-bit seed of its own for each use of the run's seed."""
  key = "/".join([str(seed), *names])
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
