"""The kinds of data a config can name, each a typed section that loads itself.

  sources = dict(
    stdlib=dict(kind="stdlib", weight=1.0, layout="cross_document", ...),
    sums=dict(kind="task", weight=3.0, layout="isolated", task="addition", ...),
  )

A source's name is the user's own; metrics and the run's record use it.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from rlm.config import build, did_you_mean, plain
from rlm.data import documents as documents_lib
from rlm.data import text as text_lib
from rlm.data.chat import Chat, load_messages
from rlm.data.documents import Documents, Task
from rlm.data.packing import Layout

Split = Literal["train", "heldout"]


@dataclasses.dataclass(frozen=True)
class Loading:
  """What a source needs to turn itself into documents.

  Attributes:
    chat: how the model is written to.
    tasks: the run's tasks by name, for sources of kind "task".
    seed: of this source.
    split: "train" or "heldout".
    row_length: tokens of a row.
  """

  chat: Chat
  tasks: Mapping[str, Task]
  seed: int
  split: Split
  row_length: int


@dataclasses.dataclass(frozen=True)
class Source:
  """Fields of every source.

  Attributes:
    kind: a key of `SOURCES`.
    weight: share of the rows, relative to the other weights; with 0 the source
      is only evaluated on.
    layout: of its rows; see `rlm/data/packing.py`.
  """

  kind: str
  weight: float
  layout: Layout

  def __post_init__(self):
    if self.weight < 0:
      raise ValueError(f"weight={self.weight} must not be negative.")

  def load(self, loading: Loading) -> tuple[Documents, dict[str, Any]]:
    """The documents of a split, and what the run's record says of them."""
    raise NotImplementedError

  def check(self, loading: Loading) -> None:
    """Raises ValueError where `load` would; reads, but spells no text out."""
    self.load(loading)


@dataclasses.dataclass(frozen=True)
class TextSource(Source):
  """Fields of every source of plain text.

  Attributes:
    heldout_fraction: share of the files (JSONL: documents) held out.
    fim_rate: share of the training documents rearranged as
      fill-in-the-middle; held-out ones never are.
  """

  heldout_fraction: float
  fim_rate: float

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.fim_rate <= 1:
      raise ValueError(f"fim_rate={self.fim_rate} is a share, from 0 to 1.")

  def corpus(self) -> text_lib.Corpus:
    """Both splits, as text."""
    raise NotImplementedError

  def load(self, loading: Loading) -> tuple[Documents, dict[str, Any]]:
    corpus = self.corpus()
    train = loading.split == "train"
    texts = [d.text for d in (corpus.train if train else corpus.heldout)]
    documents = documents_lib.text_documents(
      loading.chat.markers,
      texts,
      fim_rate=self.fim_rate if train else 0.0,
      seed=loading.seed,
    )
    return documents, corpus.record

  def check(self, loading: Loading) -> None:
    _ = loading.chat.markers  # or it raises
    self.corpus()


@dataclasses.dataclass(frozen=True)
class StdlibSource(TextSource):
  """The Python standard library's source.

  Attributes:
    max_bytes: cap on its size.
  """

  max_bytes: int

  def corpus(self) -> text_lib.Corpus:
    return text_lib.load_stdlib(
      max_bytes=self.max_bytes, heldout_fraction=self.heldout_fraction
    )


@dataclasses.dataclass(frozen=True)
class FilesSource(TextSource):
  """The user's own text.

  Attributes:
    path: a file, or a folder.
    suffixes: kinds of file taken from a folder, such as [".txt", ".md"].
  """

  path: str
  suffixes: tuple[str, ...]

  def corpus(self) -> text_lib.Corpus:
    return text_lib.load_text(
      self.path,
      suffixes=self.suffixes,
      heldout_fraction=self.heldout_fraction,
    )


@dataclasses.dataclass(frozen=True)
class JsonlSource(TextSource):
  """The user's own JSONL with a `text` field.

  Attributes:
    path: the file.
  """

  path: str

  def corpus(self) -> text_lib.Corpus:
    return text_lib.load_jsonl(
      self.path, heldout_fraction=self.heldout_fraction
    )


@dataclasses.dataclass(frozen=True)
class TaskSource(Source):
  """Worked problems of a procedural task; see `documents.task_documents`.

  Attributes:
    task: name of one of the run's tasks.
    documents: training problems.
    heldout_documents: problems to evaluate the loss on; 0 for none.
    levels: difficulties, a repeated one weighing more.
    author: "clean" or "noisy".
    tagged: share of the problems in the chat format.
  """

  task: str
  documents: int
  heldout_documents: int
  levels: tuple[int, ...]
  author: Literal["clean", "noisy"]
  tagged: float

  def __post_init__(self):
    super().__post_init__()
    if self.documents < 1 or self.heldout_documents < 0:
      raise ValueError(
        f"documents={self.documents} must be at least 1 and"
        f" heldout_documents={self.heldout_documents} at least 0."
      )
    if not self.levels:
      raise ValueError("levels is empty; name at least one difficulty.")
    if not 0 <= self.tagged <= 1:
      raise ValueError(f"tagged={self.tagged} is a share, from 0 to 1.")

  def load(self, loading: Loading) -> tuple[Documents, dict[str, Any]]:
    train = loading.split == "train"
    return self._write(
      loading, self.documents if train else self.heldout_documents
    ), {}

  def check(self, loading: Loading) -> None:
    # So many that every level is met.
    self._write(loading, min(self.documents, 50 * len(self.levels)))

  def _write(self, loading: Loading, count: int) -> Documents:
    if self.task not in loading.tasks:
      raise ValueError(
        f"no task {self.task!r}{did_you_mean(self.task, loading.tasks)} The"
        f" run's tasks are {', '.join(loading.tasks) or 'none'}."
      )
    return documents_lib.task_documents(
      loading.chat,
      loading.tasks[self.task],
      count=count,
      levels=self.levels,
      author=self.author,
      tagged=self.tagged,
      seed=loading.seed,
      split=loading.split,
      row_length=loading.row_length,
    )


@dataclasses.dataclass(frozen=True)
class MessagesSource(Source):
  """Conversations in the `messages` layout; all of them are trained on.

  Attributes:
    path: a JSONL file.
  """

  path: str

  def __post_init__(self):
    super().__post_init__()
    if self.layout == "cross_document":
      raise ValueError(
        "layout='cross_document' would let one conversation read another."
        " Use 'isolated', or 'single' for one to a row."
      )

  def load(self, loading: Loading) -> tuple[Documents, dict[str, Any]]:
    if loading.split == "heldout":
      return Documents.join([]), {}
    conversations = load_messages(
      self.path, loading.chat, row_length=loading.row_length
    )
    # Not the path: a recipe's folder may move, with what its stages wrote.
    content = pathlib.Path(self.path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Documents.join(conversations), {"sha256": digest}


SOURCES: dict[str, type[Source]] = {
  "stdlib": StdlibSource,
  "text": FilesSource,
  "jsonl": JsonlSource,
  "task": TaskSource,
  "messages": MessagesSource,
}


def make_source(section: Any, where: str) -> Source:
  """Builds the typed section of a source from plain data.

  Args:
    section: a mapping with `kind`, a key of `SOURCES`, and that kind's fields.
    where: its path in the config, for messages.

  Raises:
    ValueError: unknown kind or key, wrong type or value.
  """
  if isinstance(section, Source):
    return section
  values = plain(section)
  kind = values.get("kind") if isinstance(values, dict) else None
  if kind not in SOURCES:
    raise ValueError(
      f"{where}: {kind=} is no kind of source{did_you_mean(kind, SOURCES)}"
      f" The kinds are {', '.join(SOURCES)}."
    )
  return build(SOURCES[kind], values, where)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is trained on.

  Attributes:
    row_length: tokens of a row, T.
    packing_window: documents packed together; see `packing.pack`.
    heldout_rows: rows of each source to evaluate on, at most.
    sources: name -> section of a kind in `SOURCES`.
  """

  row_length: int
  packing_window: int
  heldout_rows: int
  sources: dict[str, Any]

  def __post_init__(self):
    sources = {
      name: make_source(section, f"sources.{name}")
      for name, section in sorted(self.sources.items())
    }
    if self.row_length < 2 or self.packing_window < 1 or self.heldout_rows < 0:
      raise ValueError(
        f"row_length={self.row_length} must be at least 2,"
        f" packing_window={self.packing_window} at least 1 and"
        f" heldout_rows={self.heldout_rows} at least 0."
      )
    if not any(source.weight for source in sources.values()):
      raise ValueError(
        "sources has none with a weight above 0; there is nothing to train on."
      )
    object.__setattr__(self, "sources", sources)


def check_sources(
  cfg: DataConfig,
  chat: Chat,
  tasks: Mapping[str, Task],
  *,
  seed: int,
  pending: pathlib.Path | None,
) -> None:
  """Raises ValueError for data that is missing, broken or too long.

  What `pipeline.make_stream` would raise, at a fraction of its time; for a
  recipe, whose later stages read their data long after the first one began.

  Args:
    cfg: the data section.
    chat: how the model is written to.
    tasks: the run's tasks by name.
    seed: of the run.
    pending: a folder whose files are yet to be written: they are not looked at.
      None for none.
  """
  for name, source in cfg.sources.items():
    path = getattr(source, "path", None)
    if not source.weight or (
      path is not None
      and pending is not None
      and pathlib.Path(path).is_relative_to(pending)
    ):
      continue
    loading = Loading(
      chat=chat,
      tasks=tasks,
      seed=seed,
      split="train",
      row_length=cfg.row_length,
    )
    try:
      source.check(loading)
    except ValueError as error:
      raise ValueError(f"data source {name!r}: {error}") from error
