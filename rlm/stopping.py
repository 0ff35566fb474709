"""SIGTERM and Ctrl-C end a run between two steps, after a save.

  with catch_signals() as stop:
    for step in ...:
      ...
      if stop.after(step):
        save()
        raise Stopped("pretrain", step + 1)

`experiments/launch.py` turns `Stopped` into a message and exit code 0.

Several processes stop after the same step, whichever of them got the signal:
there SIGTERM is left to jax's preemption service, which agrees on the step.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from rlm import processes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
  """A run stopped early, on request, with everything saved.

  Attributes:
    stage: name of the stage.
    step: steps done, all of them saved; None where it has none, or all.
  """

  def __init__(self, stage: str, step: int | None):
    self.stage = stage
    self.step = step
    after = "" if step is None else f" after step {step}"
    super().__init__(
      f"{stage} stopped{after} and is saved. The same command continues it."
    )


class Stop:
  """Whether this process was asked to stop.

  Attributes:
    requested: True once this process got a signal; in a loop over steps, which
      several processes may share, ask `after`.
  """

  def __init__(self):
    self.requested = False

  def after(self, step: int) -> bool:
    """Whether to save and stop after this step: the same on all processes.

    Args:
      step: ask once for each, in order.
    """
    if not processes.joined():
      return self.requested
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def _handle(self, signum: int, frame: object) -> None:
    if self.requested and signum == signal.SIGINT:
      raise KeyboardInterrupt  # pressed twice: at once, without saving
    self.requested = True
    # print() is not safe in a handler: it may interrupt a print.
    os.write(
      2,
      f"\n{signal.Signals(signum).name}: stopping after this step"
      " (Ctrl-C again: at once, back to the last checkpoint)\n".encode(),
    )
    if processes.joined() and signum == signal.SIGINT:
      os.kill(os.getpid(), signal.SIGTERM)  # which jax tells the others


_current: Stop | None = None


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
  """Catches SIGTERM and SIGINT inside the block; nested blocks share a flag.

  Outside the main thread, where Python has no signals, nothing is caught.

  Yields:
    A `Stop`, to be asked after each step.
  """
  global _current
  if _current is not None:
    yield _current
    return
  stop = _current = Stop()
  before = {}
  if threading.current_thread() is threading.main_thread():
    # Among several processes SIGTERM is jax's, whose handler is no Python one.
    own = (signal.SIGINT,) if processes.joined() else _SIGNALS
    before = {s: signal.signal(s, stop._handle) for s in own}
  try:
    yield stop
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
    _current = None
