import re

import pytest

from rlm.report import svg
from rlm.report.curves import charts, expert_balance, text_entropies


@pytest.fixture(autouse=True)
def _drawing():
  with svg.drawing():
    yield


def titles(records):
  return [chart.title for chart in charts(records, {})]


def test_a_panel_appears_only_for_what_was_logged():
  assert titles([]) == []
  assert titles([{"step": 1, "kl": None}, {"step": 2, "unknown": 3}]) == []
  assert titles([{"step": 1, "kl": 0.1}]) == ["KL to the reference"]


def test_where_nothing_happened_there_is_no_panel():
  steps = range(5)
  assert titles([{"step": s, "nonfinite": 0} for s in steps]) == []
  assert titles([{"step": 1, "nonfinite": 1}]) == ["Skipped updates"]
  # To learn nothing at all is news.
  assert titles([{"step": 1, "accuracy": 0.0}]) == ["Accuracy while training"]


def test_on_policy_updates_are_said_to_have_nothing_to_clip():
  still = {"clip_fraction/low": 0.0, "clip_fraction/high": 0.0}
  still |= {"ratio/max": 1.0, "ratio/min": 1.0}
  drawn = charts([{"step": s, **still} for s in range(5)], {})
  assert [c.title for c in drawn] == ["Clipped tokens", "Probability ratio"]
  for chart in drawn:
    assert "On-policy" in chart.explanation
    assert "nothing to clip" in chart.explanation
  # Off-policy, but within the clip.
  moved = still | {"ratio/max": 1.1, "ratio/min": 0.9}
  clip, ratio = charts([{"step": s, **moved} for s in range(5)], {})
  assert clip.explanation.endswith("No token's ratio reached the clip.")
  assert "On-policy" not in clip.explanation + ratio.explanation


def test_keys_carry_the_last_value():
  records = [
    {"step": 0, "accuracy": 0.25, "accuracy_given_format": 0.5},
    {"step": 1, "accuracy": 0.5, "accuracy_given_format": None},
  ]
  (chart,) = charts(records, {})
  assert [(k.label, k.last) for k in chart.keys] == [
    ("accuracy", "50%"),
    ("given format", "50%"),
  ]
  assert len({k.colour for k in chart.keys}) == 2


def test_reward_parts_and_levels_become_lines_in_order():
  record = {"step": 1, "reward/mean": 1.1, "reward/std": 0.2}
  record |= {"reward/format": 1.0, "reward/answer": 1.0}
  record |= {f"level/{k}/accuracy": 0.5 for k in (10, 2, 9)}
  reward, level = charts([record], {})
  assert [k.label for k in reward.keys] == ["total", "answer", "format"]
  assert [k.label for k in level.keys] == ["level 2", "level 9", "level 10"]


def test_entropies_of_the_text_are_reference_lines():
  records = [{"step": s, "heldout/stdlib/bits_per_byte": 3.0} for s in (1, 2)]
  (chart,) = charts(records, {"unigram entropy": 4.71})
  assert [(k.label, k.dashed) for k in chart.keys] == [
    ("stdlib", False),
    ("unigram entropy 4.71", True),
  ]
  assert "stroke-dasharray" in chart.svg


def test_logarithmic_panels_survive_zeros():
  records = [{"step": s, "sampler_diff/max": 0.0} for s in range(3)]
  assert titles(records) == ["Sampler against trainer"]
  records.append({"step": 3, "sampler_diff/max": 1e-5})
  (chart,) = charts(records, {})
  assert chart.keys[0].last == "1.00e-05"


def test_a_long_run_is_drawn_short():
  records = [{"step": s, "grad_norm": 1 + s % 7} for s in range(20_000)]
  (chart,) = charts(records, {})
  assert len(chart.svg) < 20_000


def test_expert_balance_has_a_line_per_layer():
  assert expert_balance([{"step": 1}]) is None
  records = [
    {"step": s, "expert_load/max_over_mean": [1.5, 2.0]} for s in (1, 2)
  ]
  chart = expert_balance(records)
  assert chart is not None
  assert [k.label for k in chart.keys] == [
    "MoE layer 1",
    "MoE layer 2",
    "even 1",
  ]
  wide = [{"step": 1, "expert_load/max_over_mean": [1.5] * 58}]
  chart = expert_balance(wide)
  assert chart is not None and len(chart.keys) <= 9


def test_text_entropies_are_found_wherever_they_are():
  assert text_entropies({}) == {}
  assert text_entropies({"heldout": {"text": {"unigram_bits": 4.5}}}) == {
    "unigram entropy": 4.5
  }
  assert text_entropies({"bigram_bits_per_byte": None}) == {}


@pytest.mark.parametrize("levels", [[3], [2, 3, 4], [0, 50]])
def test_whole_numbers_have_whole_ticks(levels):
  records = [{"step": s, "curriculum/level": k} for s, k in enumerate(levels)]
  (chart,) = charts(records, {})
  ticks = re.findall(r"text-anchor: end[^>]*>([^<]+)</text>", chart.svg)
  ticks = [t for t in ticks if t != "step"]
  assert ticks and all(t.isdecimal() for t in ticks)
  assert {str(k) for k in levels[:1]} <= {*ticks}
