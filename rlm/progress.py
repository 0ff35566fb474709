"""Progress of a stage: live on a terminal, plain lines everywhere else.

Time is for the console only; nothing here reaches a run's metrics.
"""

import collections
import time
from collections.abc import Callable
from typing import Any

import rich.console
import rich.progress

from rlm import processes

_WINDOW = 50  # updates over which the pace is measured


class Progress:
  """One stage's bar, its pace and a few current figures.

  Of several processes the primary alone shows it.

  with Progress(console, "pretrain", total=600, done=start) as bar:
    bar.update(step + 1, loss=2.31)

  Figures are numbers already on the host (`MetricsWriter.figures` gives those
  of the step before), so that showing them never waits for the device.
  """

  def __init__(
    self,
    console: rich.console.Console | None,
    title: str,
    total: int,
    *,
    done: int = 0,
    every_secs: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Prepares the bar; it shows inside `with`.

    Args:
      console: where to show it; None is the standard output.
      title: name of the stage.
      total: steps of the whole stage.
      done: steps done by earlier processes.
      every_secs: seconds between plain lines, where there is no terminal.
      clock: seconds, for tests.
    """
    if not processes.is_primary():
      console = rich.console.Console(quiet=True)
    self.console = console or rich.console.Console()
    self.title = title
    self.total = total
    self.done = done
    self._every_secs = every_secs
    self._clock = clock
    self._began = self._last_line = clock()
    # The first step compiles: the pace counts from its end.
    self._pace: collections.deque = collections.deque(maxlen=_WINDOW)
    self._figures: dict[str, float] = {}
    self._bar: rich.progress.Progress | None = None
    self._printed = -1

  def update(self, done: int, **figures: float) -> None:
    """Shows that `done` steps are done.

    Args:
      done: steps done in all.
      **figures: host numbers to show beside; the last ones stay.
    """
    now = self._clock()
    self.done = done
    self._figures.update(figures)
    self._pace.append((now, done))
    if self._bar is not None:
      self._bar.update(self._task, completed=done, status=self._status())
    elif len(self._pace) == 1 or now - self._last_line >= self._every_secs:
      self._print_line(now)

  def say(self, text: str) -> None:
    """Prints a line above the bar.

    Args:
      text: the line, as plain text.
    """
    self.console.print(text, soft_wrap=True, markup=False, highlight=False)

  def eta_secs(self) -> float | None:
    """Seconds left at the recent pace; None before two steps are done."""
    if len(self._pace) < 2:
      return None
    (t0, n0), (t1, n1) = self._pace[0], self._pace[-1]
    return (t1 - t0) / max(n1 - n0, 1) * (self.total - n1)

  def __enter__(self):
    if self.console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", justify="left"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TextColumn("{task.fields[status]}"),
        console=self.console,
        refresh_per_second=4,  # each refresh takes the CPU from the training
      )
      self._task = self._bar.add_task(
        self.title,
        total=self.total,
        completed=self.done,
        status=self._status(),
      )
      self._bar.start()
    return self

  def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
    if self._bar is not None:
      self._bar.update(self._task, status=self._status(ended=True))
      self._bar.stop()
      self._bar = None
    elif self._pace and self._printed != self.done:
      self._print_line(self._clock(), ended=True)

  def _print_line(self, now: float, ended: bool = False) -> None:
    self._last_line = now
    self._printed = self.done
    self.say(f"{self.title}  {self._status(ended)}")

  def _status(self, ended: bool = False) -> str:
    """Such as "120/600  20%  loss 2.31  1:05 left"."""
    percent = 100 * self.done // max(self.total, 1)
    parts = [f"{self.done}/{self.total}", f"{percent}%"]
    parts += [f"{name} {value:.4g}" for name, value in self._figures.items()]
    eta = self.eta_secs()
    if ended:
      parts.append(f"in {clock_text(self._clock() - self._began)}")
    elif not self._pace:
      parts.append("compiling")
    elif eta is not None:
      parts.append(f"{clock_text(eta)} left")
    return "  ".join(parts)


def clock_text(secs: float) -> str:
  """65 -> "1:05", 3725 -> "1:02:05"."""
  minutes, seconds = divmod(round(secs), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"
