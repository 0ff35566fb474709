"""Tables and page of a study, from made-up evaluations."""

import io

import rich.console

from rlm.eval.comparison import compare, r1_claims
from rlm.report.comparison import (
  comparison_tables,
  difference_text,
  interval_text,
  verdict_text,
  write_comparison,
)
from tests.report.conftest import measures

STAGES = (
  *("cold_start", "rl", "distill"),
  *("sft_control", "sft_verified", "student_rl"),
)
ACCURACY = {  # by seed
  "cold_start": (0.2, 0.3, 0.4),
  "rl": (0.6, 0.75, 0.9),
  "distill": (0.5, 0.6, 0.7),
  "sft_control": (0.3, 0.3, 0.5),
  "sft_verified": (0.7, 0.7, 0.8),
  "student_rl": (0.7, 0.72, 0.8),
}


def comparison(seeds=3):
  evaluations = {
    seed: {
      stage: {
        "stage": stage,
        **measures(ACCURACY[stage][seed]),
        "levels": {
          "2": measures(ACCURACY[stage][seed]),
          "10": measures(ACCURACY[stage][seed] / 2),
        },
      }
      for stage in STAGES
    }
    for seed in range(seeds)
  }
  claims = r1_claims(
    cold_start="cold_start",
    rl="rl",
    sft_control="sft_control",
    sft_verified="sft_verified",
    distill="distill",
    student_rl="student_rl",
  )
  return compare(evaluations, claims, confidence=0.95) | {
    "title": "<study>\x1b[31m",
    "costs": {
      "rl": {"flops": {str(s): 1.5e12 * (s + 1) for s in range(seeds)}}
    },
  }


def shown(value, width=100):
  console = rich.console.Console(file=io.StringIO(), width=width)
  console.print(value)
  return console.file.getvalue()


def test_tables_show_every_seed_and_verdict():
  text = shown(comparison_tables(comparison()))
  # RL over its cold start: 40, 45 and 50 points, t interval 12.4 around 45.
  for cell in ("+45.0 points", "+32.6 to +57.4", "+40.0", "+50.0"):
    assert cell in text
  assert "holds here" in text
  # Distillation less RL of the student: -20, -12, -10.
  assert "−14.0 points" in text
  assert "undecided: the interval" in text or "the reverse" in text
  assert "tokens" in text  # lengths are not in points
  (row,) = (r for r in text.splitlines() if r.startswith(" SFT control "))
  assert row.split() == "SFT control 36.7 8.0 – 65.4 30.0 30.0 50.0".split()
  assert (
    max(map(len, shown(comparison_tables(comparison()), 80).split("\n"))) <= 80
  )


def test_verdicts_in_words():
  claim = {
    "verdict": "undecided",
    "low": None,
    "high": None,
    "n": 2,
    "by_seed": {"0": 0.1, "1": None, "2": 0.2},
    "measure": "pass_at_1",
  }
  assert verdict_text(claim) == "undecided: measured in 2 of 3 seeds"
  assert interval_text(claim) == "no interval"
  assert difference_text(claim, None) == "–"
  assert difference_text(claim, -0.021) == "−2.1 points"
  assert (
    difference_text(claim | {"measure": "response_length"}, 3.04)
    == "+3.0 tokens"
  )
  alone = claim | {"n": 1, "by_seed": {"4": 0.1}}
  assert verdict_text(alone) == "undecided: one seed has no interval"
  spans = claim | {"low": -0.1, "high": 0.2}
  assert verdict_text(spans) == "undecided: the interval spans zero"
  reverse = spans | {"verdict": "reversed", "high": -0.05}
  assert verdict_text(reverse) == "the reverse holds here"
  assert interval_text(reverse) == "−10.0 to −5.0"


def test_the_page(tmp_path):
  path = tmp_path / "comparison.html"
  write_comparison(path, comparison())
  page = path.read_text()
  assert "<script" not in page and "://" not in page
  assert "&lt;study&gt;\\x1b[31m" in page
  for text in (
    "Seeds 0, 1, 2; every one of them is shown.",
    "RL − Cold start",
    "+45.0 points",
    "Distilled student − Student RL",
    "holds here",
    "4.5 T",
    "<svg",
  ):
    assert text in page, text
  assert page.index("level 2<") < page.index("level 10<")


def test_a_single_seed_has_a_page_too(tmp_path):
  path = tmp_path / "comparison.html"
  write_comparison(path, comparison(seeds=1))
  page = path.read_text()
  assert "Seed 0; every one" in page
  assert "undecided: one seed has no interval" in page
