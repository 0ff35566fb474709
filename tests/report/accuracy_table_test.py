import io
import json

from rich.console import Console

from rlm.report.accuracy_table import accuracy_tables


def printed(summary, width=80):
  console = Console(file=io.StringIO(), width=width)
  console.print(accuracy_tables(summary))
  return console.file.getvalue()


def test_tables_hold_every_evaluated_stage_within_80_columns(recipe):
  summary = json.loads((recipe / "summary.json").read_text())
  out = printed(summary)
  assert max(len(line.rstrip()) for line in out.splitlines()) <= 80
  lines = out.splitlines()
  rl = next(line.split() for line in lines if line.startswith(" RL "))
  assert rl[:3] == ["RL", "83.0", "80.7–85.3"]
  assert rl[-1] == "2:11"
  assert "Rejection" not in out  # never evaluated
  assert "given format" in out and "level 6" in out
  assert "…" not in out, "a cell was cut"


def test_missing_measures_are_dashes():
  summary = {
    "stages": [
      {"name": "rl", "pass_at_1": {"mean": 0.5}},
      {"name": "sft", "pass_at_1": {"mean": None}, "maj_at_8": {"mean": 1}},
    ]
  }
  out = printed(summary)
  assert "50.0" in out and "–" in out
  assert "level" not in out


def test_names_are_no_markup():
  out = printed({"stages": [{"name": "[red]x\x1b", "pass_at_1": {"mean": 1}}]})
  assert "[red]x\\x1b" in out


def test_an_empty_summary_prints():
  assert "stage" in printed({})
