import io
import json
import re

import pytest
from rich.console import Console

from rlm.report.accuracy_table import accuracy_tables
from rlm.report.run_folder import read_run
from tests.report.conftest import measure


def printed(folder, width=80):
  console = Console(file=io.StringIO(), width=width)
  console.print(accuracy_tables(read_run(folder)))
  return console.file.getvalue()


def summarised(folder, summary):
  (folder / "summary.json").write_text(json.dumps(summary))
  return printed(folder)


def test_tables_hold_every_evaluated_stage_within_80_columns(recipe):
  out = printed(recipe)
  lines = out.splitlines()
  assert max(len(line.rstrip()) for line in lines) <= 80
  first = next(i for i, line in enumerate(lines) if line.startswith(" RL "))
  rl = lines[first].split()
  assert rl[:3] == ["RL", "83.0", "99.6"] and rl[-1] == "2:11"
  assert lines[first + 1].split()[0] == "80.7–85.3"
  assert "Rejection" not in out  # never evaluated
  heads = [line.split() for line in lines if line.startswith(" stage ")]
  assert heads == [
    ["stage", "pass@1", "given", "format", "maj@8", "pass@8", "time"],
    ["stage", "2", "3", "4", "5", "6*", "7**"],
  ]
  assert "* seen in pretraining only; ** never seen by any stage" in out
  assert "no mark: drawn by RL" in out
  assert "…" not in out, "a cell was cut"


def test_full_intervals_at_every_level_fit(recipe):
  summary = json.loads((recipe / "summary.json").read_text())
  wide = {"mean": 1.0, "low": 0.925, "high": 1.0, "n": 48}
  for stage in summary["stages"]:
    stage["seconds"] = 7_384
    stage |= dict.fromkeys(
      ("pass_at_1", "pass_at_1_given_format", "maj_at_8", "pass_at_8"), wide
    )
    stage["levels"] = {str(k): {"pass_at_1": wide} for k in range(2, 18)}
  out = summarised(recipe, summary)
  assert "…" not in out and "2:03:04" in out
  # Sixteen levels take three tables; bounds are rounded outwards.
  assert out.count("pass@1 by level") == 3 and re.search(r" 17\*+ ", out)
  assert out.count("92–100") == 8 * 16


@pytest.mark.parametrize(
  ("low", "high", "shown"),
  [(0.291, 0.309, "29–31"), (0.29, 0.57, "29–57"), (0.0, 0.001, "0–1")],
)
def test_whole_bounds_never_narrow_an_interval(recipe, low, high, shown):
  value = {"mean": 0.3, "low": low, "high": high, "n": 9}
  stage = {"name": "rl", "pass_at_1": measure(0.5)}
  stage["levels"] = {"2": {"pass_at_1": value}}
  assert f" {shown} " in summarised(recipe, {"stages": [stage]})


def test_who_wrote_the_examples_is_said_below(recipe):
  said = " ".join(printed(recipe).split())
  assert "About RL's gain: It started from examples that err by design" in said
  assert "50% of the authors never carry" in said
  for name in ("pretrain", "cold_start"):
    path = recipe / name / "config.json"
    path.write_text(path.read_text().replace("noisy", "clean"))
  assert "About RL's gain" not in printed(recipe)


def test_missing_measures_are_dashes_and_missing_bounds_no_interval(recipe):
  summary = {
    "stages": [
      {"name": "rl", "pass_at_1": {"mean": 0.5}},
      {"name": "sft", "pass_at_1": {"mean": None}, "maj_at_8": {"mean": 1}},
    ]
  }
  out = summarised(recipe, summary)
  assert "50.0" in out and " – " in out
  assert "50.0–" not in out and "–50.0" not in out
  assert "by level" not in out


def test_names_are_no_markup(recipe):
  stage = {"name": "[red]x\x1b", "pass_at_1": {"mean": 1}}
  assert "[red]x\\x1b" in summarised(recipe, {"stages": [stage]})


def test_an_empty_summary_prints(recipe):
  assert "stage" in summarised(recipe, {})
