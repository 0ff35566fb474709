"""Shows the completions that a run wrote down, in the terminal.

  python -m tools.view_traces runs/quickstart --stage rl --wrong --level 5 -n 3

The folder is a recipe's, a run's or one .jsonl file. Output is plain text where
it goes to no terminal. Control characters in the model's text are spelt out,
so that it cannot drive the terminal.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from rlm.report.run_folder import Record, read_jsonl, read_traces
from rlm.report.text import is_number, significant, visible
from rlm.report.traces import pieces

_STYLES = {"text": "", "marker": "dim", "answer": "bold", "wrong": "reverse"}


def find_traces(path: Path) -> list[Record]:
  """The traces of a .jsonl file, of a run, or of a recipe and its stages.

  Raises:
    ValueError: there are none.
  """
  if path.is_file():
    found = read_jsonl(path)[0]
  else:
    # traces/ lies in the folder of a run, of a stage, or of its evaluation.
    folders = sorted(
      folder.parent
      for pattern in ("traces", "*/traces", "evaluate/*/traces")
      for folder in path.glob(pattern)
    )
    found = [record for folder in folders for record in read_traces(folder)]
  if not found:
    raise ValueError(
      f"{path} holds no traces: give a run's --workdir, or a traces/*.jsonl."
    )
  return found


def matches(record: Record, arguments: argparse.Namespace) -> bool:
  """Whether a trace passes the filters given on the command line."""
  correct = record.get("correct") is True
  return (
    (arguments.stage is None or record.get("stage") == arguments.stage)
    and (arguments.level is None or record.get("level") == arguments.level)
    and (arguments.step is None or record.get("step") == arguments.step)
    and (not arguments.correct or correct)
    and (not arguments.wrong or not correct)
  )


def verdict(record: Record) -> tuple[str, str]:
  """A trace's verdict in words, and its colour."""
  right = record.get("correct") is True
  words = ["correct" if right else "wrong"]
  if record.get("steps_correct") is True:
    words.append("steps right")
  elif record.get("steps_correct") is False:
    words.append("a step is wrong")
  if record.get("well_formed") is False:
    words.append("not well formed")
  if record.get("finished") is False:
    words.append("cut at the length limit")
  return ", ".join(words), "green" if right else "red"


def show(console: Console, record: Record) -> None:
  """Prints one trace."""

  def field(name: str) -> str:
    value = record.get(name)
    return "–" if value is None else visible(str(value))

  words, colour = verdict(record)
  where = (
    f"{field('stage')}, step {field('step')}: {field('task')}, level"
    f" {field('level')}: "
  )
  title = Text.assemble(where, (words, colour))
  # Text objects, never markup: "[red]" from a model is "[red]".
  if console.is_terminal:
    console.print(Rule(title, align="left", style="dim"))
  else:
    _print(console, Text("== ") + title)
  rewards = record.get("rewards")
  shown = ", ".join(
    f"{visible(str(name))} {significant(value)}"
    for name, value in (rewards.items() if isinstance(rewards, dict) else ())
    if is_number(value)
  )
  lines = {
    "asked": field("prompt"),
    "expected": field("expected"),
    "answered": field("answer"),
    "rewards": shown or "–",
  }
  for name, value in lines.items():
    _print(console, Text.assemble((f"{name:<10}", "dim"), value))
  body = Text()
  for piece in pieces(str(record.get("completion", "")), None):
    body.append(visible(piece.text), _STYLES[piece.kind])
  _print(console, body)
  console.print()


def _print(console: Console, line: Text) -> None:
  console.print(line, soft_wrap=not console.is_terminal)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    description="Shows the completions that a run wrote down.",
    epilog="Example: python -m tools.view_traces runs/quickstart --wrong -n 3",
  )
  parser.add_argument("path", type=Path, help="a --workdir, or a .jsonl file")
  parser.add_argument("--stage", help="for example cold_start, rl")
  parser.add_argument("--level", type=int, help="difficulty")
  parser.add_argument("--step", type=int, help="step of the stage")
  which = parser.add_mutually_exclusive_group()
  which.add_argument("--correct", action="store_true", help="only right ones")
  which.add_argument("--wrong", action="store_true", help="only wrong ones")
  parser.add_argument(
    "-n", type=int, default=10, help="how many to show (default: 10; 0: all)"
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Shows traces; returns the exit status."""
  arguments = parse(argv)
  try:
    traces = find_traces(arguments.path)
  except ValueError as error:
    print(error, file=sys.stderr)
    return 1
  found = [record for record in traces if matches(record, arguments)]
  if not found:
    stages = sorted({visible(str(record.get("stage"))) for record in traces})
    levels = sorted({visible(str(record.get("level"))) for record in traces})
    print(
      f"None of {len(traces)} traces matches. Stages: {', '.join(stages)}."
      f" Levels: {', '.join(levels)}.",
      file=sys.stderr,
    )
    return 1
  console = Console(highlight=False)
  shown = found[: arguments.n] if arguments.n > 0 else found
  for record in shown:
    show(console, record)
  _print(console, Text(f"{len(shown)} of {len(found)} that match", "dim"))
  return 0


if __name__ == "__main__":
  if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal
  sys.exit(main())
