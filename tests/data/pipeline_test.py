import dataclasses
import itertools
import math

import numpy as np
import pytest

from rlm.config import build
from rlm.data.packing import empty_row
from rlm.data.pipeline import (
  DataConfig,
  iterate_batches,
  load_heldout,
  make_batches,
  make_stream,
)
from rlm.data.r1_chat import R1Chat
from rlm.data.text import load_stdlib
from rlm.data.tokenizer import ByteTokenizer
from rlm.tasks.registry import make_task

TOK = ByteTokenizer()
CHAT = R1Chat(TOK)
TASKS = {
  "addition": make_task(
    dict(
      name="column_addition",
      heldout_fraction=0.2,
      letters="abcdef",
      forget_carry=0.5,
      slip=0.02,
    )
  )
}
ROW_LENGTH = 64
KEYS = {"tokens", "positions", "segment_ids", "loss_mask"}


def _sections(stdlib_weight=1.0, sums_weight=3.0):
  return {
    "stdlib": dict(
      kind="stdlib",
      weight=stdlib_weight,
      layout="cross_document",
      heldout_fraction=0.2,
      fim_rate=0.0,
      max_bytes=60_000,
    ),
    "sums": dict(
      kind="task",
      weight=sums_weight,
      layout="isolated",
      task="addition",
      documents=90,
      heldout_documents=40,
      levels=[2, 3],
      author="noisy",
      tagged=0.25,
    ),
  }


def _config(**changes):
  section = dict(
    row_length=ROW_LENGTH,
    packing_window=64,
    heldout_rows=10,
    sources=_sections(),
  )
  return build(DataConfig, section | changes)


def _stream(seed=0, **changes):
  return make_stream(_config(**changes), CHAT, seed=seed, tasks=TASKS)


@pytest.fixture(scope="module")
def stream():
  return _stream()


def _batches(stream, steps=12, positions=None, batch_size=8):
  return make_batches(
    stream,
    batch_size=batch_size,
    row_counts=[batch_size] * steps,
    positions=positions,
  )


def _assert_equal(a, b):
  assert a.keys() == b.keys() == KEYS
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def _is_text(row):
  """Whether a row is of the standard library: its loss is on all but starts."""
  return row["segment_ids"].max() == 1 and row["loss_mask"].mean() > 0.9


def test_a_batch_has_the_agreed_arrays(stream):
  batch = _batches(stream)[0]
  assert batch.keys() == KEYS
  for key, value in batch.items():
    assert value.shape == (8, ROW_LENGTH)
    assert value.dtype == (bool if key == "loss_mask" else np.int32)


def test_a_step_is_a_function_of_seed_and_step(stream):
  batches, again = _batches(stream), _batches(_stream())
  for t in (7, 0, 11, 7):  # in any order, in another process
    _assert_equal(batches[t], again[t])
  other = _batches(_stream(seed=1))[0]
  assert (batches[0]["tokens"] != other["tokens"]).any()


def test_iteration_from_any_step_is_the_same_stream(stream):
  batches = _batches(stream)
  for start in (0, 5):
    with_threads = list(iterate_batches(batches, start, prefetch=3))
    assert len(with_threads) == 12 - start
    for t, batch in enumerate(with_threads, start):
      _assert_equal(batch, batches[t])
  assert not list(iterate_batches(batches, 12, prefetch=3))
  left_early = iterate_batches(batches, 2, prefetch=3)
  _assert_equal(next(left_early), batches[2])
  left_early.close()


def test_a_process_reads_its_rows_of_every_batch(stream):
  whole = _batches(stream)
  for positions in ([0, 1, 4, 5], [7], np.array([2, 3])):
    part = _batches(stream, positions=positions)
    for t in range(12):
      _assert_equal(
        part[t], {key: value[positions] for key, value in whole[t].items()}
      )


def test_rows_of_others_are_not_read(stream):
  class Rows:
    def __init__(self):
      self.read = []

    def __getitem__(self, j):
      self.read.append(j)
      return stream.rows[j]

  rows = Rows()
  counting = dataclasses.replace(stream, rows=rows)
  batches = make_batches(
    counting, batch_size=6, row_counts=[4, 6, 6], positions=[1, 4, 5]
  )
  for t, read in enumerate(([1], [5, 8, 9], [11, 14, 15])):
    rows.read.clear()
    assert batches[t]["tokens"].shape == (3, ROW_LENGTH)
    assert rows.read == read


def test_weights_are_honoured(stream):
  rows = [stream.rows[j] for j in range(400)]
  text = np.array([_is_text(row) for row in rows])
  assert abs(text.mean() - 1 / 4) < 0.01
  # Interleaved: every stretch has its share, not only the whole.
  assert (text.reshape(-1, 8).sum(axis=1) == 2).all()


def test_a_source_of_weight_zero_is_only_evaluated(stream):
  cfg = dict(sources=_sections(stdlib_weight=0.0))
  only = _stream(**cfg)
  assert only.record.keys() == {"sums"}
  assert not any(_is_text(only.rows[j]) for j in range(50))
  heldout = load_heldout(
    _config(**cfg),
    CHAT,
    seed=0,
    tasks=TASKS,
    batch_size=4,
  )
  assert heldout.keys() == {"stdlib", "sums"}


def test_each_epoch_has_every_row_once_in_its_own_order():
  only = _stream(sources=_sections(stdlib_weight=0.0))
  n = only.record["sums"]["rows"]
  epochs = [
    [only.rows[e * n + j]["tokens"].tobytes() for j in range(n)]
    for e in range(2)
  ]
  assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
  assert len(set(epochs[0])) == n


def test_a_growing_batch_skips_no_row_and_keeps_its_shape(stream):
  batches = make_batches(
    stream,
    batch_size=6,
    row_counts=[2, 4, 6],
  )
  live = []
  for t, count in enumerate((2, 4, 6)):
    assert batches[t]["tokens"].shape == (6, ROW_LENGTH)
    live += list(batches[t]["tokens"][:count])
    for row in range(count, 6):
      _assert_equal(
        {key: value[row] for key, value in batches[t].items()},
        empty_row(ROW_LENGTH, TOK.pad_id),
      )
  expected = [stream.rows[j]["tokens"] for j in range(12)]
  np.testing.assert_array_equal(live, expected)


def test_masks_of_both_kinds(stream):
  for batch in itertools.islice(_batches(stream), 6):
    tokens, mask = batch["tokens"], batch["loss_mask"]
    segments = batch["segment_ids"]
    same = np.zeros_like(mask)
    same[:, 1:] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    assert not (mask & ~same).any()  # every target inside its own segment
    assert not mask[tokens == TOK.pad_id].any()
    assert mask[tokens == TOK.eos_id].all()
    assert not mask[np.isin(tokens, (TOK.bos_id, TOK.user_id))].any()


def test_record_says_what_was_read(stream):
  record = stream.record
  assert record["sums"]["documents"] == 90
  assert 0.5 < record["sums"]["fill_rate"] <= 1
  assert record["stdlib"]["train"]["sha256"]
  assert record["stdlib"]["tokens"] == (
    record["stdlib"]["train"]["bytes"] + 2 * record["stdlib"]["documents"]
  )


def _heldout(**changes):
  return load_heldout(
    _config(**changes),
    CHAT,
    seed=0,
    tasks=TASKS,
    batch_size=4,
  )


def test_heldout_rows_are_fixed_and_counted():
  heldout = _heldout()
  text = heldout["stdlib"]
  assert len(text.batches) == 3  # 10 rows, and 2 of padding
  tokens = np.concatenate([b["tokens"] for b in text.batches])
  mask = np.concatenate([b["loss_mask"] for b in text.batches])
  segments = np.concatenate([b["segment_ids"] for b in text.batches])
  assert (segments[10:] == 0).all() and (segments[:10, 0] == 1).all()
  assert text.num_bytes == (tokens[mask] < 256).sum()
  for a, b in zip(text.batches, _heldout()["stdlib"].batches, strict=True):
    _assert_equal(a, b)
  assert 0 < text.bigram_bits_per_byte < text.unigram_bits_per_byte < 8
  counts = np.bincount(tokens[mask & (tokens < 256)])
  p = counts[counts > 0] / counts.sum()
  assert text.unigram_bits_per_byte == pytest.approx(-(p @ np.log2(p)))
  assert heldout["sums"].unigram_bits_per_byte is None


def test_heldout_text_is_in_no_training_file():
  corpus = load_stdlib(max_bytes=60_000, heldout_fraction=0.2)
  training = "\n".join(d.text for d in corpus.train)
  for batch in _heldout()["stdlib"].batches:
    for tokens in batch["tokens"]:
      line = max(
        TOK.decode(tokens[tokens < 256]).split("\n")[1:-1], key=len, default=""
      )
      if len(line) > 40:
        assert line not in training


def sums_of(tokens, segment_ids):
  """The two-digit sums of packed rows, as the task names them."""
  for row, segments in zip(tokens, segment_ids, strict=True):
    for s in range(1, segments.max() + 1):
      text = TOK.decode(t for t in row[segments == s] if t < 256)
      # Letter, upper and lower digit of each column, highest first.
      digits = [c for c in text.split("?")[0] if c.isdigit()]
      a, b = sorted(("".join(digits[::2]), "".join(digits[1::2])))
      if len(a) == 2:
        yield f"{a}+{b}"


def test_heldout_problems_are_of_the_heldout_split():
  only = _stream(sources=_sections(stdlib_weight=0.0))
  rows = [only.rows[j] for j in range(only.record["sums"]["rows"])]
  trained = set(
    sums_of(
      np.stack([row["tokens"] for row in rows]),
      np.stack([row["segment_ids"] for row in rows]),
    )
  )
  held_out = {
    name
    for batch in _heldout()["sums"].batches
    for name in sums_of(batch["tokens"], batch["segment_ids"])
  }
  assert len(trained) > 20 and len(held_out) > 3
  assert not trained & held_out
  # By the task's own hash, too: these names are its identities.
  task = TASKS["addition"]
  drawn = {
    split: {task.problem(5, i, 2, split).identity for i in range(3000)}
    for split in ("train", "heldout")
  }
  assert trained & drawn["train"] and held_out & drawn["heldout"]
  assert not trained & drawn["heldout"] and not held_out & drawn["train"]


def test_no_heldout_rows_asked():
  assert _heldout(heldout_rows=0) == {}


def test_shares_of_a_weight_that_is_no_integer(stream):
  mixed = _stream(sources=_sections(stdlib_weight=0.1, sums_weight=0.7))
  text = [_is_text(mixed.rows[j]) for j in range(800)]
  assert math.isclose(np.mean(text), 1 / 8, abs_tol=0.005)


def test_config_errors():
  with pytest.raises(ValueError, match=r"config: sources\.a: kind=None is no"):
    _config(sources={"a": {}})
  with pytest.raises(ValueError, match="none with a weight above 0"):
    _config(sources=_sections(0.0, 0.0))
  with pytest.raises(ValueError, match="row_length=1 must be at least 2"):
    _config(row_length=1)
  with pytest.raises(ValueError, match="unknown key 'row_lenght'"):
    _config(row_lenght=1)


def test_data_errors_name_the_source(tmp_path):
  missing = _sections()["stdlib"] | dict(
    kind="text", path=str(tmp_path / "none"), suffixes=[".txt"]
  )
  del missing["max_bytes"]
  with pytest.raises(ValueError, match="data source 'mine': no file or folder"):
    _stream(sources={"mine": missing})
  with pytest.raises(ValueError, match=r"data source 'sums': .*row_length=20"):
    _stream(row_length=20, sources={"sums": _sections()["sums"]})


def test_batch_errors(stream):
  arguments = dict(batch_size=6, row_counts=[6])
  for positions in ([], [6], [-1]):
    with pytest.raises(
      ValueError, match=r"must name rows of a batch, 0\.\.5\."
    ):
      make_batches(stream, **arguments, positions=positions)
  with pytest.raises(ValueError, match=r"run from 0 to 7 .* 1\.\.batch_size=6"):
    make_batches(stream, **(arguments | dict(row_counts=[0, 7])))
