"""The run's figures in sentences that hold whichever way the figures fall."""

from collections.abc import Sequence

from rlm.report.accuracy import Evaluation, Interval
from rlm.report.authors import noisy_authors
from rlm.report.lineage import distilled_pair, level_note, rl_pair
from rlm.report.run_folder import Run, inline_label
from rlm.report.text import is_number

Pair = tuple[Evaluation, Evaluation]


def evaluated_pair(
  pair: tuple[str, str] | None, evaluations: Sequence[Evaluation]
) -> Pair | None:
  """The evaluations of two stages by name."""
  if pair is None:
    return None
  by_name = {e.name: e for e in evaluations}
  return by_name[pair[0]], by_name[pair[1]]


def points(before: Interval, after: Interval) -> float:
  """The change of the mean, in percentage points."""
  return 100 * (after.mean - before.mean)


def signed(value: float) -> str:
  """+43.9, −2.1 (with a true minus sign)."""
  return f"{value:+.1f}".replace("-", "−")


def change(what: str, before: Interval, after: Interval) -> str:
  """One sentence on a change, which says if the intervals overlap."""
  if abs(points(before, after)) < 0.05:
    return f"left {what} at {after}"
  if before.ends is None or after.ends is None:
    verb, tail = "moved", "; without intervals, so chance is not ruled out"
  elif after.ends[0] > before.ends[1]:
    verb, tail = "raised", ""
  elif after.ends[1] < before.ends[0]:
    verb, tail = "lowered", ""
  else:
    verb, tail = "moved", "; the intervals overlap"
  return (
    f"{verb} {what} from {before} to {after},"
    f" {signed(points(before, after))} points{tail}"
  )


def findings(run: Run, evaluations: Sequence[Evaluation]) -> list[str]:
  """A few sentences, each with its intervals; [] without an evaluation."""
  names = [e.name for e in evaluations]
  found = []
  if pair := evaluated_pair(rl_pair(run, names), evaluations):
    found += _rl_findings(run, pair)
  for stage in run.stages:
    counts = [
      value
      for key in ("solved", "problems", "kept", "sampled")
      if is_number(value := stage.summary.get(key))
    ]
    if len(counts) == 4:
      solved, problems, kept, sampled = counts
      found.append(
        f"{stage.label} solved {solved:,} of {problems:,} problems and kept"
        f" {kept:,} of {sampled:,} answers to learn from."
      )
  if pair := evaluated_pair(distilled_pair(run, names), evaluations):
    before, after = (e.measures["pass_at_1"] for e in pair)
    found.append(
      "Distillation " + change("the student's accuracy", before, after) + "."
    )
  return found


def _rl_findings(run: Run, pair: Pair) -> list[str]:
  before, after = pair
  found = [
    "RL "
    + change(
      f"held-out accuracy after {inline_label(before.label)}",
      before.measures["pass_at_1"],
      after.measures["pass_at_1"],
    )
    + ".",
    *(f"{authors.sentence}." for authors in noisy_authors(run, after.name)),
  ]
  given = [e.measures.get("pass_at_1_given_format") for e in pair]
  if given[0] is not None and given[1] is not None:
    found.append(
      "Counting only well-formed answers, which leaves out repair of the"
      " format, it " + change("accuracy", given[0], given[1]) + "."
    )
  for level in after.levels:
    values = [e.level_measure(level, "pass_at_1") for e in pair]
    note = level_note(level, run, after.name)
    if note and values[0] is not None and values[1] is not None:
      found.append(
        f"On level {level} ({note}) it "
        + change("accuracy", values[0], values[1])
        + "."
      )
  lengths = [e.measures.get("response_length") for e in pair]
  if lengths[0] is not None and lengths[1] is not None:
    found.append(
      f"Responses went from {lengths[0].mean:.1f} to"
      f" {lengths[1].mean:.1f} tokens on average."
    )
  return found
