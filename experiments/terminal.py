"""What a chat in the terminal shows and reads, whichever model answers."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from rlm.report.text import visible


def note(console: Any, text: str) -> None:
  """Prints a line that is not the model's."""
  from rich.text import Text

  console.print(Text(visible(text), "italic"), soft_wrap=True)


def show_piece(console: Any, text: str, style: str) -> None:
  """Prints text at once, without ending the line."""
  from rich.text import Text

  console.print(Text(text, style), end="", soft_wrap=True)
  console.file.flush()


def ask(console: Any) -> str | None:
  """A line typed; None at the end of the input, or on Ctrl-C."""
  try:
    return input("> ").strip()
  except (EOFError, KeyboardInterrupt):
    console.print()
    return None


def offer_history() -> None:
  """Arrow keys and history in `ask`, where Python has them."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Ctrl-C and SIGTERM end things at once: a chat has nothing to save."""
  on_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
  on_terminate = signal.signal(signal.SIGTERM, signal.SIG_DFL)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGTERM, on_terminate)


@contextlib.contextmanager
def loading_bar(console: Any) -> Iterator[Callable[[int, int], None]]:
  """Shows how far a checkpoint is read; nothing where there is no terminal.

  Yields:
    What is told (bytes read, bytes in all).
  """
  from rich import progress

  columns = (
    progress.TextColumn("{task.description}"),
    progress.BarColumn(bar_width=24),
    progress.DownloadColumn(),
    progress.TransferSpeedColumn(),
    progress.TimeRemainingColumn(),
  )
  with progress.Progress(
    *columns, console=console, transient=True, disable=not console.is_terminal
  ) as bar:
    task = bar.add_task("loading", total=None)
    yield lambda done, total: bar.update(task, completed=done, total=total)
