import json

import pytest

from rlm.data.r1_chat import R1Chat
from rlm.data.sources import SOURCES, Loading, make_source
from rlm.data.tokenizer import ByteTokenizer

TOK = ByteTokenizer()
STDLIB = dict(
  kind="stdlib",
  weight=1.0,
  layout="cross_document",
  heldout_fraction=0.2,
  fim_rate=0.5,
  max_bytes=200_000,
)
TASK = dict(
  kind="task",
  weight=1.0,
  layout="isolated",
  task="sums",
  documents=4,
  heldout_documents=2,
  levels=[2, 3],
  author="clean",
  tagged=0.5,
)


def _load(source, split="train", **changes):
  loading = (
    dict(chat=R1Chat(TOK), tasks={}, seed=0, split=split, row_length=32)
    | changes
  )
  return source.load(Loading(**loading))


def test_every_kind_builds_its_section(tmp_path):
  text = dict(weight=1, layout="isolated", heldout_fraction=0.1, fim_rate=0.0)
  sections = {
    "stdlib": STDLIB,
    "text": text | dict(kind="text", path="p", suffixes=[".md"]),
    "jsonl": text | dict(kind="jsonl", path="p"),
    "task": TASK,
    "messages": dict(
      kind="messages", weight=1.0, layout="single", path="m.jsonl"
    ),
  }
  assert sections.keys() == SOURCES.keys()
  for kind, section in sections.items():
    source = make_source(section, kind)
    assert isinstance(source, SOURCES[kind])
    assert make_source(source, kind) is source  # built before


def test_text_is_rearranged_in_training_only():
  source = make_source(STDLIB, "s")
  train, record = _load(source)
  heldout, _ = _load(source, "heldout")
  assert (train.tokens == TOK.fim_begin_id).any()
  assert not (heldout.tokens == TOK.fim_begin_id).any()
  assert record["heldout"]["documents"] == len(heldout)
  # BOS and EOS (or the three markers and EOS) around each file's bytes.
  assert heldout.lengths.sum() == record["heldout"]["bytes"] + 2 * len(heldout)


def test_messages_train_only(tmp_path):
  path = tmp_path / "m.jsonl"
  turn = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
  ]
  path.write_text(json.dumps({"messages": turn}))
  source = make_source(
    dict(kind="messages", weight=1.0, layout="isolated", path=str(path)), "m"
  )
  train, _ = _load(source)
  assert train.loss_mask.tolist() == [False] * 4 + [True] * 2
  assert len(_load(source, "heldout")[0]) == 0


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({"kind": "stdlb"}, r"s: kind='stdlb' is no kind .* did you mean 'stdlib'"),
    ({"weight": 1.0}, r"s: kind=None is no kind .*stdlib, text, jsonl, task"),
    (3, r"s: kind=None is no kind of source"),
    (STDLIB | {"fim_rat": 0.1}, r"s: unknown key 'fim_rat'.*'fim_rate'"),
    (STDLIB | {"fim_rate": 1.5}, r"s: fim_rate=1\.5 is a share"),
    (STDLIB | {"weight": -1.0}, r"s: weight=-1\.0 must not be negative"),
    (STDLIB | {"layout": "cross"}, r"s\.layout: expected one of 'isolated'"),
    (TASK | {"documents": 0}, r"s: documents=0 must be at least 1"),
    (TASK | {"levels": []}, r"s: levels is empty"),
    (TASK | {"tagged": 2.0}, r"s: tagged=2\.0 is a share"),
    (TASK | {"author": "sloppy"}, r"s\.author: expected one of 'clean'"),
    (
      dict(kind="messages", weight=1.0, layout="cross_document", path="p"),
      r"s: layout='cross_document' would let one conversation read another",
    ),
  ],
)
def test_section_errors(section, message):
  with pytest.raises(ValueError, match=message):
    make_source(section, "s")


def test_unknown_task():
  with pytest.raises(
    ValueError, match=r"no task 'sums'; did you mean 'sum'\? .* are sum"
  ):
    _load(make_source(TASK, "s"), tasks={"sum": None})
