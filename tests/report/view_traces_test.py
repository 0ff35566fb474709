import subprocess
import sys

import pytest

from tools import view_traces


@pytest.fixture
def view(recipe, capsys):
  def run(*arguments, path=recipe):
    status = view_traces.main([str(path), *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err

  return run


def test_filters_together(view):
  status, out, _ = view("--stage", "rl", "--wrong", "--level", "5", "-n", "0")
  assert status == 0
  heads = [line for line in out.splitlines() if line.startswith("==")]
  assert heads
  for head in heads:
    assert head.startswith("== rl, step 100: column_addition, level 5: wrong")
  assert f"{len(heads)} of {len(heads)} that match" in out


def test_correct_ones_and_a_number_of_them(view):
  _, out, _ = view("--correct", "-n", "2")
  heads = [line for line in out.splitlines() if line.startswith("==")]
  assert len(heads) == 2
  assert all("level" in h and ": correct" in h for h in heads)
  assert "rewards   answer 1, format 1" in out


def test_model_text_cannot_drive_the_terminal(view):
  _, out, _ = view("--stage", "rl", "--wrong", "-n", "0")
  assert "\x1b" not in out and "\u202e" not in out
  assert r"\x1b[31mred\u202e\ud800" in out


def test_a_terminal_gets_colours_of_ours_only(recipe, monkeypatch, capsys):
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("TERM", "xterm-256color")
  view_traces.main([str(recipe), "--stage", "rl", "--wrong", "-n", "0"])
  out = capsys.readouterr().out
  assert "\x1b[" in out
  assert "\x1b[31mred" not in out


def test_one_stage_or_one_file(view, recipe):
  folder = recipe / "evaluate" / "sft"
  assert "40 of 40" in view("-n", "0", path=folder)[1]
  assert "40 of 40" in view("-n", "0", path=folder / "traces/000.jsonl")[1]


def test_nothing_matches_or_nothing_is_there(view, tmp_path):
  status, _, err = view("--stage", "RL")
  assert status == 1
  assert "None of 280 traces matches" in err and "rl_final" in err
  status, _, err = view(path=tmp_path)
  assert status == 1 and "holds no traces" in err


def test_right_and_wrong_exclude_each_other(recipe):
  with pytest.raises(SystemExit):
    view_traces.main([str(recipe), "--wrong", "--correct"])


def test_as_a_command(recipe):
  done = subprocess.run(
    [sys.executable, "-m", "tools.view_traces", str(recipe), "-n", "1"],
    capture_output=True,
    env={"PYTHONIOENCODING": "ascii"},
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  assert b"1 of 280 that match" in done.stdout
