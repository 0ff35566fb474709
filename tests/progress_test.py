"""Plain lines without a terminal, a live bar with one; honest ETAs."""

import io

import pytest
import rich.console

from rlm.progress import Progress, clock_text


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def plain_lines(updates, **kwargs):
  """Lines that (seconds, done, figures) updates print."""
  out, clock = io.StringIO(), Clock()
  console = rich.console.Console(file=out, width=20)  # a line is never broken
  with Progress(console, "rl", clock=clock, **kwargs) as bar:
    for now, done, figures in updates:
      clock.now = now
      bar.update(done, **figures)
  return out.getvalue().splitlines()


def test_lines_come_every_ten_seconds_and_at_the_ends():
  lines = plain_lines(
    [(60 + i, i + 1, {"loss": 2.0}) for i in range(25)], total=25
  )
  assert [line.split()[1] for line in lines] == [
    "1/25",
    "11/25",
    "21/25",
    "25/25",
  ]
  assert all(line.startswith("rl  ") for line in lines)
  assert lines[-1].endswith("in 1:24")


def test_the_eta_leaves_the_compilation_out():
  # 60 s to compile, then 2 s a step.
  lines = plain_lines([(60 + 2 * i, i + 1, {}) for i in range(6)], total=66)
  assert lines[1].split()[1] == "6/66" and "2:00 left" in lines[1]


def test_a_continued_stage_counts_from_where_it_was():
  lines = plain_lines(
    [(2 * i, 51 + i, {}) for i in range(6)], total=66, done=50
  )
  assert lines[0].split()[1:3] == ["51/66", "77%"]
  assert "0:20 left" in lines[1]


def test_figures_stay_until_they_change():
  lines = plain_lines(
    [(0, 1, {"loss": 2.31, "reward": 0.5}), (11, 2, {"loss": 1.0})], total=9
  )
  assert "loss 2.31  reward 0.5" in lines[0]
  assert "loss 1  reward 0.5" in lines[1]


def test_a_terminal_gets_a_bar():
  out = io.StringIO()
  console = rich.console.Console(file=out, force_terminal=True, width=120)
  with Progress(console, "pretrain", 4) as bar:
    bar.say("compiling the [bold] step")
    for step in range(4):
      bar.update(step + 1, loss=1.0)
  text = out.getvalue()
  assert "pretrain" in text and "4/4" in text and "100%" in text
  assert "[bold]" in text  # what is said is text, not markup


def test_an_untouched_bar_prints_nothing():
  assert plain_lines([], total=3) == []


@pytest.mark.parametrize(
  ("secs", "text"),
  [(0.4, "0:00"), (65, "1:05"), (359.7, "6:00"), (3725, "1:02:05")],
)
def test_seconds_are_rounded_before_they_are_split(secs, text):
  assert clock_text(secs) == text
