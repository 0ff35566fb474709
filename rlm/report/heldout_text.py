"""What held-out text costs a model, beside the entropies of that text."""

import dataclasses

from rlm.report.run_folder import Run
from rlm.report.text import is_number


@dataclasses.dataclass(frozen=True)
class HeldoutText:
  """One source's held-out text after one stage, all in bits per byte.

  Attributes:
    stage: its label.
    source: the text's name.
    model: what the model needs.
    unigram: entropy of the bytes; None where not measured.
    bigram: entropy of a byte given the one before, likewise.
  """

  stage: str
  source: str
  model: float
  unigram: float | None
  bigram: float | None


def heldout_text(run: Run) -> list[HeldoutText]:
  """Stage by stage, from their summaries; only sources with an entropy."""
  found = []
  for stage in run.stages:
    sources = stage.summary.get("heldout")
    for name, values in sources.items() if isinstance(sources, dict) else ():
      if not isinstance(values, dict):
        continue
      model, unigram, bigram = (
        value
        if is_number(value := values.get(f"{prefix}bits_per_byte"))
        else None
        for prefix in ("", "unigram_", "bigram_")
      )
      if model is not None and (unigram is not None or bigram is not None):
        found.append(HeldoutText(stage.label, name, model, unigram, bigram))
  return found
