"""Completions of the same problem before and after RL, side by side."""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence

from rlm.report.lineage import rl_pair
from rlm.report.run_folder import Record, Run, read_traces, stage_label
from rlm.report.text import shorten

_LIMIT = 4000  # characters of a completion that a page shows
_MARKER = re.compile(r"</?(?:think|answer)>|<[|｜][^<>]{1,40}[|｜]>")
_KINDS = ("wrong", "marker", "answer", "text")  # the first that applies
# What became of a problem: (right before, right after) -> heading, how to
# count it, how many to show. Most room for the changes that RL made and for
# what it left wrong.
_FATES = {
  (False, True): ("Wrong, then right", "went from wrong to right", 3),
  (False, False): ("Wrong both times", "stayed wrong", 2),
  (True, False): ("Right, then wrong", "went from right to wrong", 2),
  (True, True): ("Right both times", "stayed right", 1),
}


@dataclasses.dataclass(frozen=True)
class Piece:
  """A run of a completion's text: kind is text, marker, answer or wrong."""

  kind: str
  text: str


@dataclasses.dataclass(frozen=True)
class Shown:
  """One completion as the page shows it; plain text, not yet escaped."""

  stage: str
  verdict: str
  good: bool
  notes: list[str]
  pieces: list[Piece]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One problem and its answers: before and after, or one."""

  fate: str
  task: str
  level: str
  prompt: str
  expected: str
  sides: tuple[Shown, ...]


@dataclasses.dataclass(frozen=True)
class Comparisons:
  """What the page says about a pair of stages.

  Attributes:
    before, after: the stages' labels.
    counts: what became of them -> number of problems, of all both answered.
    shown: a few of each fate.
  """

  before: str
  after: str
  counts: dict[str, int]
  shown: list[Comparison]

  @property
  def has_marks(self) -> bool:
    """Whether some wrong place is marked."""
    return any(
      piece.kind == "wrong"
      for problem in self.shown
      for side in problem.sides
      for piece in side.pieces
    )


def stage_traces(run: Run) -> dict[str, list[Record]]:
  """Held-out traces by stage; without an evaluation, the stage's own."""
  if not run.is_recipe:
    return {run.stages[0].name: read_traces(run.path)}
  found = {
    stage.name: traces
    for stage in run.stages
    if (traces := read_traces(stage.path))
  }
  for name in run.evaluations:
    if traces := read_traces(run.path / "evaluate" / name):
      found[name] = traces
  return found


def compare(run: Run) -> Comparisons | None:
  """RL against what it started from, on the problems that both answered.

  In a folder of one run, its first traces of a problem against its last.
  None where no problem was answered twice.
  """
  traces = stage_traces(run)
  right = _right_solutions(r for records in traces.values() for r in records)
  if not run.is_recipe:
    (name,) = traces
    records = traces[name]
    steps = sorted({_step(r) for r in records})
    middle = steps[len(steps) // 2] if steps else 0
    return _compare(
      "Early steps",
      [r for r in records if _step(r) < middle],
      "Late steps",
      [r for r in records if _step(r) >= middle],
      right,
    )
  pair = rl_pair(run, traces)
  if pair is None:
    return None
  before, after = pair
  return _compare(
    stage_label(before),
    traces[before],
    stage_label(after),
    traces[after],
    right,
  )


def samples(run: Run) -> list[Comparison]:
  """A single run's last completions, three right and three wrong ones.

  For where `compare` has nothing: training seldom draws a problem twice.
  """
  if run.is_recipe:
    return []
  records = read_traces(run.path)
  right = _right_solutions(records)
  last = sorted(records, key=_step)[::-1]
  picked = [
    record
    for wanted in (True, False)
    for record in [r for r in last if _is(r, "correct") == wanted][:3]
  ]
  return [
    _comparison(
      f"Step {_text(record, 'step')}",
      (_shown(stage_label(run.stages[0].name), record, right),),
      record,
    )
    for record in picked
  ]


def _step(record: Record) -> float:
  step = record.get("step")
  return step if isinstance(step, (int, float)) else 0


def _by_problem(records: Iterable[Record]) -> dict[str, Record]:
  """The first completion of each problem; identity, else the prompt."""
  found: dict[str, Record] = {}
  for record in records:
    if "identity" in record or "prompt" in record:
      key = record.get("identity", record.get("prompt"))
      found.setdefault(f"{record.get('task')}\n{key}", record)
  return found


def _compare(
  before_label: str,
  before: list[Record],
  after_label: str,
  after: list[Record],
  right: dict[str, str],
) -> Comparisons | None:
  first, second = _by_problem(before), _by_problem(after)
  keys = [key for key in first if key in second]
  if not keys:
    return None
  fates = collections.defaultdict(list)
  for key in keys:
    fate = (_is(first[key], "correct"), _is(second[key], "correct"))
    fates[fate].append(key)
  shown = [
    _comparison(
      heading,
      (
        _shown(before_label, first[key], right),
        _shown(after_label, second[key], right),
      ),
      second[key],
    )
    for fate, (heading, _, room) in _FATES.items()
    for key in _spread(fates[fate], second, room)
  ]
  counts = {verb: len(fates[r]) for r, (_, verb, _) in _FATES.items()}
  return Comparisons(before_label, after_label, counts, shown)


def _spread(
  keys: Sequence[str], records: dict[str, Record], room: int
) -> list[str]:
  """`room` problems, their levels in turn, hardest first.

  Within a level the order is that of a hash, so nobody picked them.
  """
  levels = collections.defaultdict(list)
  for key in sorted(keys, key=_hash):
    levels[str(records[key].get("level"))].append(key)
  order = sorted(levels, key=lambda level: (len(level), level), reverse=True)
  picked: list[str] = []
  while len(picked) < room and any(levels.values()):
    for level in order:
      if levels[level] and len(picked) < room:
        picked.append(levels[level].pop(0))
  return picked


def _hash(key: str) -> bytes:
  return hashlib.sha256(key.encode("utf-8", "backslashreplace")).digest()


def _is(record: Record, name: str) -> bool:
  return record.get(name) is True


def _text(record: Record, name: str) -> str:
  value = record.get(name)
  return "" if value is None else str(value)


def _comparison(
  fate: str, sides: tuple[Shown, ...], record: Record
) -> Comparison:
  return Comparison(
    fate=fate,
    task=_text(record, "task").replace("_", " "),
    level=_text(record, "level"),
    prompt=shorten(_text(record, "prompt"), _LIMIT),
    expected=shorten(_text(record, "expected"), 200),
    sides=sides,
  )


def _problem(record: Record) -> str:
  """What two records share if they answer the same prompt."""
  return "\n".join(_text(record, k) for k in ("task", "identity", "prompt"))


def _right_solutions(records: Iterable[Record]) -> dict[str, str]:
  """_problem -> a completion all of whose steps are right."""
  return {
    _problem(record): _text(record, "completion")
    for record in records
    if _is(record, "correct") and _is(record, "steps_correct")
  }


def _shown(label: str, record: Record, right: dict[str, str]) -> Shown:
  good = _is(record, "correct")
  completion = _text(record, "completion")
  notes = []
  wrong = None
  if "steps_correct" in record:
    if _is(record, "steps_correct"):
      notes.append("every step right")
    else:
      notes.append("a step is wrong")
      if _problem(record) in right:
        wrong = departure(completion, right[_problem(record)])
  if record.get("well_formed") is False:
    notes.append("not well formed")
  if record.get("finished") is False:
    notes.append("cut at the length limit")
  if record.get("answer") is not None:
    answer = shorten(_text(record, "answer"), 200)
    notes.insert(0, f"answered {answer}" if answer else "empty answer")
  else:
    notes.insert(0, "no answer")
  return Shown(
    stage=label,
    verdict="Correct" if good else "Wrong",
    good=good,
    notes=notes,
    pieces=pieces(completion, wrong),
  )


def departure(completion: str, right: str) -> tuple[int, int] | None:
  """Where a wrong solution first departs from a right one of its problem.

  Returns:
    (start, end) in `completion` of the number or character that differs
    first; None if it only stops early or they agree.
  """
  shorter = min(len(completion), len(right))
  start = next(
    (i for i in range(shorter) if completion[i] != right[i]), shorter
  )
  if start == len(completion) or start == len(right):
    return None
  if not completion[start].isdecimal():
    return start, start + 1
  end = start
  while start > 0 and completion[start - 1].isdecimal():
    start -= 1
  while end < len(completion) and completion[end].isdecimal():
    end += 1
  return start, end


def pieces(completion: str, wrong: tuple[int, int] | None) -> list[Piece]:
  """A completion cut for display: markers, the answer, the wrong place.

  Args:
    completion: the model's text; anything.
    wrong: (start, end) of what to mark, or None.

  Returns:
    Pieces whose texts, joined, are the completion's first 4,000 characters.
  """
  cuts = [(m.start(), m.end(), "marker") for m in _MARKER.finditer(completion)]
  answer = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
  if answer:
    cuts.append((answer.start(1), answer.end(1), "answer"))
  if wrong is not None:
    cuts.append((*wrong, "wrong"))
  bounds = sorted({0, len(completion), *(p for cut in cuts for p in cut[:2])})
  bounds = [b for b in bounds if b < _LIMIT]
  found: list[Piece] = []
  for start, end in zip(bounds, [*bounds[1:], _LIMIT], strict=True):
    kinds = {kind for a, b, kind in cuts if a <= start and end <= b}
    kind = next(k for k in _KINDS if k in kinds or k == "text")
    if text := completion[start:end]:
      found.append(Piece(kind, text))
  if len(completion) > _LIMIT:
    found.append(
      Piece("marker", f" … ({len(completion) - _LIMIT:,} more characters)")
    )
  return found
