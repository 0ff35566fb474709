"""Which tiles are searched, and what they are predicted to cost."""

import subprocess
import sys

import pytest

from tools.kernel_schedule import Schedule
from tools.search_tiles import Choice, choices, cycles


def test_visits_by_hand():
  # Queries 0..127, ..255, ..383, ..511 see 1, 1, 2, 2 tiles of 256 keys.
  assert Choice(128, 256).visits(512) == 6
  assert Choice(256, 128).visits(512) == 2 + 4
  assert Choice(512, 512).visits(4096) == 8 * 9 // 2


def test_cycles_by_hand():
  schedule = Schedule({0: 7, 1: 100, 2: 1000}, {})
  # 4096 tokens in 8 steps, and 36 tiles on or below the diagonal.
  assert cycles("forward", Choice(512, 512), schedule) == 8 * 100 + 36 * 1000
  # Steps of the backward pass are tiles of keys.
  visits = Choice(1024, 512).visits(4096)
  assert cycles("backward", Choice(1024, 512), schedule) == 800 + 1000 * visits
  assert cycles("decode", Choice(0, 1024), Schedule({1: 9}, {})) == 9 * 32


def test_choices_are_multiples_of_the_lanes():
  for kernel in ("forward", "backward", "decode"):
    found = list(choices(kernel))
    assert len(found) == len(set(found)) > 3
    assert all(c.queries % 128 == 0 and c.keys % 128 == 0 for c in found)


@pytest.mark.tpu
def test_a_search_prints_its_choices():
  pytest.importorskip("libtpu")
  done = subprocess.run(
    [sys.executable, "-m", "tools.search_tiles", "--kernel=decode"],
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "cycles" in done.stdout and "1024" in done.stdout
