"""Problems from a local file, one JSON object a line.

  {"prompt": "What is 3/4 of 12?", "answer": "9", "level": 1, "id": "a1"}

`prompt` and `answer` are required, `answer` a string or a number; `level`
(an integer, 1 where absent) and `id` (kept for the traces) are not. Answers
are verified by `answers_match`: the same text or the same plain number.
The split is by hash of the prompt, so it survives reordering the file.
"""

import dataclasses
import json
import pathlib
from typing import Any, Never

from rlm.rewards.answers import answers_match
from rlm.tasks.base import SPLITS, Problem, Solution, Task, TaskConfig
from rlm.tasks.draws import Draws, RandomSource

_KEPT_ORDERS = 64


@dataclasses.dataclass(frozen=True)
class JsonlConfig(TaskConfig):
  """Config section of jsonl.

  Attributes:
    path: the file.
    max_line_bytes: longest line allowed, without its line end; a guard
      against a file that is no JSONL.
  """

  path: str
  max_line_bytes: int

  def __post_init__(self):
    super().__post_init__()
    if self.max_line_bytes < 1:
      raise ValueError(
        f"max_line_bytes is {self.max_line_bytes}, but must be positive."
      )


class Jsonl(Task):
  """Prompts and answers of a file; no worked solutions.

  Streams go through the problems of a level in a random order, each once,
  then again in another order.

  Attributes:
    problems: all problems, in the order of the file.
  """

  name = "jsonl"
  config_class = JsonlConfig
  has_worked_solutions = False

  def __init__(self, cfg: JsonlConfig):
    super().__init__(cfg)
    self._path = cfg.path
    self.problems = load_problems(cfg.path, cfg.max_line_bytes)
    self.levels = tuple(sorted({p.level for p in self.problems}))
    self._pools: dict[tuple[int, str], list[Problem]] = {
      (level, split): [] for level in self.levels for split in SPLITS
    }
    for problem in self.problems:
      split = "heldout" if self.is_heldout(problem) else "train"
      self._pools[problem.level, split].append(problem)
    self._orders: dict[tuple, list[Problem]] = {}

  def problem(self, seed: int, index: int, level: int, split: str) -> Problem:
    """Task.problem; index // n is the pass over the n problems."""
    pool = self.examples(level, split, 0)
    epoch, place = divmod(int(index), len(pool))
    return self._order(seed, epoch, level, split)[place]

  def examples(self, level: int, split: str, count: int) -> list[Problem]:
    """All problems of a level and split; Task.examples."""
    self.check_levels((level,), "problem()")
    self._share(split)
    pool = self._pools[level, split]
    if not pool:
      raise ValueError(
        f"{self._path} has no problem of the {split!r} split at level"
        f" {level}. Add problems, drop the level or move"
        f" heldout_fraction={self.heldout_fraction} towards 0.5."
      )
    return pool

  def problem_of(self, prompt: str) -> Problem | None:
    """The file's problem of this prompt; Task.problem_of."""
    asked = _identity(prompt)
    found = (p for p in self.problems if p.identity == asked)
    return next(found, None)

  def draw(self, draws: Draws, level: int) -> Problem:
    """Any problem of a level, of either split."""
    pool = [p for split in SPLITS for p in self._pools[level, split]]
    return pool[draws.below(len(pool))]

  def worked_solution(self, problem: Problem) -> Solution:
    """Not to be had: raises ValueError."""
    self._refuse()

  def authored_solution(self, problem: Problem, rng: RandomSource) -> Solution:
    """Not to be had: raises ValueError."""
    self._refuse()

  def verify(self, problem: Problem, answer: str) -> bool:
    """The same text or the same plain number; Task.verify."""
    return answers_match(problem.answer, answer)

  def check_steps(self, problem: Problem, thinking: str) -> bool:
    """False: without a worked solution no step can be credited."""
    return False

  def _order(
    self, seed: int, epoch: int, level: int, split: str
  ) -> list[Problem]:
    """The problems of one pass; the newest few passes are kept."""
    key = (int(seed), epoch, level, split)
    if key not in self._orders:
      if len(self._orders) == _KEPT_ORDERS:
        del self._orders[next(iter(self._orders))]
      draws = Draws(self.name, *key)
      self._orders[key] = draws.shuffled(self._pools[level, split])
    return self._orders[key]

  def _refuse(self) -> Never:
    raise ValueError(
      f"{self._path} gives prompts and answers, no worked solutions. For a"
      " cold start use a `messages` file (experiments/sft.py), or start RL"
      " from the base model."
    )


def load_problems(path: str, max_line_bytes: int) -> list[Problem]:
  """Reads and checks a file of problems.

  Blank lines are skipped, and repeated problems but for their first.

  Args:
    path: a UTF-8 file, one JSON object a line.
    max_line_bytes: longest line allowed.

  Raises:
    ValueError: with file and line: no such file, a line too long, not UTF-8,
      not JSON, without a required key or with a value of a wrong type; the
      same prompt with two answers; or no problem in the file.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(
      f"{path}: no such file. path must name a JSONL file of problems with"
      " the keys prompt and answer."
    )
  problems: dict[str, Problem] = {}
  with open(path, "rb") as lines:
    number = 0
    # Bounded reads: a file without line ends never enters memory whole.
    while line := lines.readline(max_line_bytes + 2):
      number += 1
      where = f"{path}:{number}"
      problem = _read_line(line, where, number, max_line_bytes)
      if problem is None:
        continue
      first = problems.setdefault(problem.identity, problem)
      if not answers_match(first.answer, problem.answer):
        raise ValueError(
          f"{where}: asks the same as line {first.metadata['line']}, but has"
          f" the answer {problem.answer!r} instead of {first.answer!r}. Keep"
          " one of them."
        )
  if not problems:
    raise ValueError(
      f"{path}: has no problems. Each line must be a JSON object with the"
      " keys prompt and answer."
    )
  return list(problems.values())


def _read_line(
  line: bytes, where: str, number: int, max_line_bytes: int
) -> Problem | None:
  """One line as a problem; None if it is blank."""
  line = line.rstrip(b"\r\n")
  if len(line) > max_line_bytes:
    raise ValueError(
      f"{where}: the line is longer than max_line_bytes={max_line_bytes}."
      " Shorten it or raise the limit."
    )
  try:
    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the"
      " line). Convert the file to UTF-8."
    ) from error
  if not text.strip():
    return None
  try:
    # Decimals stay text, so that no digit of an answer is rounded away.
    record = json.loads(text, parse_float=str, parse_constant=str)
  # Not only JSONDecodeError: numbers of over 4300 digits, nesting too deep.
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{where}: not valid JSON ({error}). Each line must be one object such"
      ' as {"prompt": "1+1?", "answer": "2"}.'
    ) from error
  if not isinstance(record, dict):
    raise ValueError(
      f"{where}: expected a JSON object with the keys prompt and answer, got"
      f" {type(record).__name__}."
    )
  return _make_problem(record, where, number)


def _make_problem(record: dict[str, Any], where: str, number: int) -> Problem:
  """Checks the values of one line."""
  missing = [key for key in ("prompt", "answer") if key not in record]
  if missing:
    found = ", ".join(record) or "none"
    raise ValueError(
      f"{where}: missing {' and '.join(missing)}. The keys prompt and answer"
      f" are required; found: {found}."
    )
  answer = record["answer"]
  if isinstance(answer, int) and not isinstance(answer, bool):
    answer = str(answer)
  texts = {"prompt": record["prompt"], "answer": answer}
  for key, text in texts.items():
    if not isinstance(text, str) or not text.strip():
      raise ValueError(
        f"{where}: {key} is {record[key]!r}, but must be text that is not"
        f" blank{' or a number' if key == 'answer' else ''}."
      )
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"{where}: {key} has half a surrogate pair (an escape from \\ud800 to"
        " \\udfff), which is no text. Remove it."
      ) from error
  level = record.get("level", 1)
  if not isinstance(level, int) or isinstance(level, bool):
    raise ValueError(f"{where}: level is {level!r}, but must be an integer.")
  return Problem(
    task=Jsonl.name,
    prompt=texts["prompt"],
    answer=texts["answer"],
    level=level,
    identity=_identity(texts["prompt"]),
    metadata={"line": number, "id": record.get("id")},
  )


def _identity(prompt: str) -> str:
  """A prompt without what its white space adds."""
  return " ".join(prompt.split())
