"""Plain text corpora: the standard library's source, and a user's own files.

Every machine that runs rlm holds some ten megabytes of real text, the source
of Python's standard library. A corpus is split by file (JSONL: by document)
into train and held-out, and records a digest, so that a run can say what it
was trained on.
"""

import dataclasses
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlm.data.jsonl import read_jsonl

# Not the library's own prose and code: other people's packages, tests (as large
# as the rest together), character tables and generated help.
_NOT_STDLIB = frozenset(
  {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test", "encodings", "pydoc_data"),
  }
)


@dataclasses.dataclass(frozen=True)
class TextDocument:
  """One text and where it is from: a path, or `path:line`."""

  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A split corpus.

  Attributes:
    train: documents to train on, in a fixed order.
    heldout: documents to evaluate on; shares no file with `train`.
    record: for the run's record: counts, bytes, digests.
  """

  train: tuple[TextDocument, ...]
  heldout: tuple[TextDocument, ...]
  record: dict[str, Any]


def load_stdlib(*, max_bytes: int, heldout_fraction: float) -> Corpus:
  """The source of this Python's standard library.

  Files are taken in the order of the hash of their path, leaving out those that
  would exceed `max_bytes`, so that no folder is favoured.

  Args:
    max_bytes: cap on the total, train and held-out together.
    heldout_fraction: share of the files held out.

  Returns:
    The corpus; its record lists every file with its SHA-256.

  Raises:
    ValueError: the folder holds no source (a stripped Python).
  """
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  chosen, total = [], 0
  for path in _by_hash(_find(root, (".py",), _NOT_STDLIB), root):
    size = path.stat().st_size
    if 0 < size <= max_bytes - total:
      text = _read_or_none(path)
      if text is not None:
        chosen.append(TextDocument(path.relative_to(root).as_posix(), text))
        total += size
  if len(chosen) < 2:
    raise ValueError(
      f"the standard library at {root} yields {len(chosen)} source files"
      f" within {max_bytes=}; at least 2 are needed. Raise max_bytes, or use a"
      ' Python that ships its source, or a source of kind "text".'
    )
  chosen.sort(key=lambda d: d.name)
  return _split(chosen, heldout_fraction, str(root), by_text=False)


def load_text(
  path: str | os.PathLike,
  *,
  suffixes: Sequence[str],
  heldout_fraction: float,
) -> Corpus:
  """A file, or every file of some kinds in a folder and below.

  A folder is split by file; of a single file the last lines are held out.

  Args:
    path: file or folder.
    suffixes: kinds of file taken from a folder, such as (".txt", ".md").
    heldout_fraction: share of the files, or of the one file's lines.

  Raises:
    ValueError: missing path, no file of these kinds, only empty files, or a
      file that is not UTF-8 (named with its line).
  """
  root = pathlib.Path(path)
  if not root.exists():
    raise ValueError(f"no file or folder {root}. Check the path in the config.")
  if root.is_file():
    return _split_file(root, heldout_fraction)
  paths = _find(root, tuple(suffixes), frozenset())
  if not paths:
    found = sorted({p.suffix for p in root.rglob("*") if p.is_file()})
    raise ValueError(
      f"folder {root} holds no file ending in {', '.join(suffixes)}; it has"
      + (f" {', '.join(s or 'none' for s in found)}." if found else " none.")
      + " Set suffixes, or another path."
    )
  documents = [
    TextDocument(p.relative_to(root).as_posix(), _read(p))
    for p in sorted(paths)
  ]
  documents = [d for d in documents if d.text]
  if not documents:
    raise ValueError(f"every one of the {len(paths)} files in {root} is empty.")
  return _split(documents, heldout_fraction, str(root), by_text=False)


def load_jsonl(path: str | os.PathLike, *, heldout_fraction: float) -> Corpus:
  """A JSONL file with a `text` field per line, one document each.

  Equal texts fall on the same side of the split.

  Raises:
    ValueError: see `read_jsonl`; or a line without a non-empty `text`.
  """
  documents = []
  for number, record in read_jsonl(path):
    text = record.get("text")
    if not isinstance(text, str) or not text:
      raise ValueError(
        f"{path}:{number}: needs a non-empty string under"
        f' "text", has the keys {", ".join(record) or "none"}.'
      )
    documents.append(TextDocument(f"{path}:{number}", text))
  return _split(documents, heldout_fraction, str(path), by_text=True)


def ngram_entropy(pieces: Sequence[bytes], order: int) -> float:
  """Empirical entropy of a text: what a model must beat to do more than count.

  The n-gram model is fitted on the very text that it predicts, so no n-gram
  model over bytes of this order, however trained, does better on it.

  Args:
    pieces: the text; n-grams do not reach from one piece into the next.
    order: 1, the unigram entropy H(x_t); 2, the bigram's H(x_t | x_{t-1}).

  Returns:
    Bits per byte.

  Raises:
    ValueError: another order, or no piece of at least `order` bytes.
  """
  if order not in (1, 2):
    raise ValueError(f"{order=}; orders 1 (unigram) and 2 (bigram) exist.")
  if max(map(len, pieces), default=0) < order:
    raise ValueError(f"no piece has the {order} bytes that {order=} needs.")
  x = np.frombuffer(b"".join(pieces), np.uint8).astype(np.int64)
  if order == 1:
    return _entropy(np.bincount(x))
  pairs = x[:-1] * 256 + x[1:]
  last = np.cumsum([len(piece) for piece in pieces])[:-1] - 1
  inside = np.ones(len(pairs), bool)
  inside[last[(last >= 0) & (last < len(pairs))]] = False
  counts = np.bincount(pairs[inside], minlength=65536).reshape(256, 256)
  # H(x_t | x_{t-1}) = H(x_{t-1}, x_t) - H(x_{t-1})
  return _entropy(counts.ravel()) - _entropy(counts.sum(axis=1))


def _entropy(counts: np.ndarray) -> float:
  """Entropy in bits of the distribution that the counts give."""
  p = counts[counts > 0] / counts.sum()
  return float(-(p * np.log2(p)).sum())


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _find(
  root: pathlib.Path, suffixes: tuple[str, ...], skip: frozenset[str]
) -> list[pathlib.Path]:
  """Files below `root` of some kinds, outside the folders named in `skip`."""
  found: list[pathlib.Path] = []
  for folder, folders, files in os.walk(root):
    folders[:] = [f for f in folders if f not in skip]
    found.extend(pathlib.Path(folder, f) for f in files if f.endswith(suffixes))
  return found


def _by_hash(
  paths: Sequence[pathlib.Path], root: pathlib.Path
) -> list[pathlib.Path]:
  return sorted(paths, key=lambda p: _hash(p.relative_to(root).as_posix()))


def _read(path: pathlib.Path) -> str:
  raw = path.read_bytes()
  try:
    return raw.decode("utf-8")
  except UnicodeDecodeError as error:
    line = raw.count(b"\n", 0, error.start) + 1
    raise ValueError(
      f"{path}:{line}: byte {raw[error.start]:#04x} is not UTF-8. Convert the"
      " file to UTF-8, or leave its kind out of suffixes."
    ) from error


def _read_or_none(path: pathlib.Path) -> str | None:
  try:
    return path.read_bytes().decode("utf-8")
  except UnicodeDecodeError:
    return None  # a few files in old encodings; not the user's mistake


def _split(
  documents: Sequence[TextDocument],
  heldout_fraction: float,
  source: str,
  *,
  by_text: bool,
) -> Corpus:
  """Holds out the documents with the smallest hashes; at least one if any.

  Args:
    documents: all of them.
    heldout_fraction: share to hold out.
    source: for the record and for messages.
    by_text: hash the text, so that copies stay together (and a record of every
      line would be as long as the file); otherwise the name, a file's path.
  """
  _check_fraction(heldout_fraction)
  keys = [_hash(d.text if by_text else d.name) for d in documents]
  distinct = sorted(set(keys))
  count = 0
  if heldout_fraction:
    if len(distinct) < 2:
      raise ValueError(
        f"{source} has {len(distinct)} distinct document, which cannot be split"
        f" into train and held-out with {heldout_fraction=}. Add documents, or"
        " set heldout_fraction=0.0."
      )
    count = round(heldout_fraction * len(distinct))
    count = min(max(count, 1), len(distinct) - 1)
  held = set(distinct[:count])
  return _corpus(
    [d for d, key in zip(documents, keys, strict=True) if key not in held],
    [d for d, key in zip(documents, keys, strict=True) if key in held],
    source,
    list_files=not by_text,
  )


def _split_file(path: pathlib.Path, heldout_fraction: float) -> Corpus:
  """Holds out the last lines of one file."""
  _check_fraction(heldout_fraction)
  lines = _read(path).splitlines(keepends=True)
  if not lines:
    raise ValueError(f"{path} is empty.")
  count = round(heldout_fraction * len(lines))
  if heldout_fraction:
    count = max(count, 1)
  if len(lines) == count:
    raise ValueError(
      f"{path} has {len(lines)} line, which leaves none to train on with"
      f" {heldout_fraction=}. Add lines, or set heldout_fraction=0.0."
    )
  cut = len(lines) - count
  train = TextDocument(f"{path.name}[:{cut}]", "".join(lines[:cut]))
  heldout = TextDocument(f"{path.name}[{cut}:]", "".join(lines[cut:]))
  return _corpus([train], [heldout] if count else [], str(path), True)


def _corpus(
  train: Sequence[TextDocument],
  heldout: Sequence[TextDocument],
  source: str,
  list_files: bool,
) -> Corpus:
  record: dict[str, Any] = {"source": source}
  for side, documents in (("train", train), ("heldout", heldout)):
    digests = [f"{_hash(d.text)}  {d.name}" for d in documents]
    record[side] = {
      "documents": len(documents),
      "bytes": sum(len(d.text.encode("utf-8")) for d in documents),
      "sha256": _hash("\n".join(digests)),
    }
    if list_files:
      record[side]["files"] = digests
  return Corpus(tuple(train), tuple(heldout), record)


def _check_fraction(heldout_fraction: float) -> None:
  if not 0 <= heldout_fraction < 1:
    raise ValueError(
      f"{heldout_fraction=} must be at least 0 and below 1: the share held out."
    )
