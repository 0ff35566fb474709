"""Which implementation a front door takes."""

from collections.abc import Callable

from rlm.kernels.backend import backend, chip

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")


def choose(
  door: str, implementation: str | None, obstacle: Callable[[str], str | None]
) -> str:
  """The name of the implementation that runs.

  Args:
    door: the function's name, for errors.
    implementation: one of IMPLEMENTATIONS; or None, which takes the platform's
      kernel where it runs these operands, else "xla".
    obstacle: (tpu or gpu) -> why its kernel cannot run these operands, or None.

  Raises:
    ValueError: `implementation` is unknown.
    NotImplementedError: the kernel that was named cannot run here, or not with
      these operands.
  """
  here = backend()
  if implementation is None:
    kernel = here in ("tpu", "gpu") and obstacle(here) is None
    return here if kernel else "xla"
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"{implementation=} is unknown; {door} has {IMPLEMENTATIONS}, and None"
      " for the platform's own."
    )
  if implementation in ("tpu", "gpu"):
    reason = (
      f"programs are made for {here} ({chip()}) here"
      if here != implementation
      else obstacle(implementation)
    )
    if reason:
      raise NotImplementedError(
        f"{door}({implementation=}) cannot run: {reason}. Take"
        ' implementation="xla", which runs anything anywhere.'
      )
  return implementation
