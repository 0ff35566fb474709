"""The run's figures in sentences that hold whichever way the figures fall."""

from rlm.report.accuracy import Evaluation, Interval
from rlm.report.run_folder import inline_label


def rl_pair(
  evaluations: list[Evaluation],
) -> tuple[Evaluation, Evaluation] | None:
  """What RL started from, and RL; None if either was not evaluated."""
  by_name = {e.name: e for e in evaluations}
  starts = [by_name[n] for n in ("cold_start", "pretrain") if n in by_name]
  if "rl" not in by_name or not starts:
    return None
  return starts[0], by_name["rl"]


def points(before: Interval, after: Interval) -> float:
  """The change of the mean, in percentage points."""
  return 100 * (after.mean - before.mean)


def signed(value: float) -> str:
  """+43.9, −2.1 (with a true minus sign)."""
  return f"{value:+.1f}".replace("-", "−")


def change(what: str, before: Interval, after: Interval) -> str:
  """One sentence on a change, which says if the intervals overlap."""
  if after.low > before.high:
    verb, tail = "raised", ""
  elif after.high < before.low:
    verb, tail = "lowered", ""
  else:
    verb, tail = "moved", "; the intervals overlap"
  return (
    f"{verb} {what} from {before} to {after},"
    f" {signed(points(before, after))} points{tail}"
  )


def findings(evaluations: list[Evaluation]) -> list[str]:
  """A few sentences, each with its intervals; [] without an evaluation."""
  found = []
  pair = rl_pair(evaluations)
  if pair is not None:
    before, after = pair
    found.append(
      "RL "
      + change(
        f"held-out accuracy after {inline_label(before.label)}",
        before.measures["pass_at_1"],
        after.measures["pass_at_1"],
      )
      + "."
    )
    given = [e.measures.get("pass_at_1_given_format") for e in pair]
    if given[0] is not None and given[1] is not None:
      found.append(
        "Counting only well-formed answers, which leaves out repair of the"
        " format, it " + change("accuracy", given[0], given[1]) + "."
      )
    for level in sorted(after.beyond):
      values = [e.level_measure(level, "pass_at_1") for e in pair]
      if values[0] is not None and values[1] is not None:
        found.append(
          f"On level {level}, harder than any training, it "
          + change("accuracy", values[0], values[1])
          + "."
        )
    lengths = [e.measures.get("response_length") for e in pair]
    if lengths[0] is not None and lengths[1] is not None:
      found.append(
        f"Responses went from {lengths[0].mean:.1f} to"
        f" {lengths[1].mean:.1f} tokens on average."
      )
  by_name = {e.name: e for e in evaluations}
  if "distill" in by_name:
    found.append(
      "The distilled student answers"
      f" {by_name['distill'].measures['pass_at_1']} right."
    )
  return found
