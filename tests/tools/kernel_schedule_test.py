"""Bundles of a kernel, from a dump made by hand."""

import pytest

from tools.kernel_schedule import read_schedule

BUNDLES = """\
LB: loop body

     0   :  { %s1 = sld [smem:[#allocation0]] }
   0x1   :  { %22 = shalt.err (!%p) /* BoundsCheck
hlo: kernel.1
 */ }
   0x2 LB: > { %s2 = smov 1 }
   0x3 LB: >> { %v1 = vmatmul.f32 %v2 }
   0x4   : >> { %v1 = vadd.f32 %v2 }
   0x5   : > { %3 = sbr.rel (%p1) target = $region2 }
"""
UNITS = """\
== CAPACTIY:
MXU, VALU, VSTORE:SPILL
    4     2     1
== UTILIZATION:
0 0 0
0 0 0
1 1 0
3 2 1
4 0 0
0 0 0
"""
NAME = "17-kernel.1-7"


@pytest.fixture
def dump(tmp_path):
  (tmp_path / f"{NAME}2-final_bundles.txt").write_text(BUNDLES)
  (tmp_path / f"{NAME}1-schedule-analysis_final_bundles.txt").write_text("x")
  name = f"{NAME}0-final_hlo-static-per-bundle-utilization.txt"
  (tmp_path / name).write_text(UNITS)
  return tmp_path


def test_bundles_and_slots_by_hand(dump):
  schedule = read_schedule(dump, "kernel")
  assert schedule.by_depth == {0: 2, 1: 2, 2: 2} and schedule.depth == 2
  assert schedule.slots["MXU"] == (7, 8)
  assert schedule.share("VALU") == 0.5 and schedule.share("VSTORE:SPILL") == 0.5


def test_another_kernel_and_another_layout_are_told(dump):
  with pytest.raises(ValueError, match="holds no bundles of other"):
    read_schedule(dump, "other")
  (dump / f"{NAME}2-final_bundles.txt").write_text(BUNDLES.rsplit("0x5")[0])
  with pytest.raises(ValueError, match="writes another layout"):
    read_schedule(dump, "kernel")
