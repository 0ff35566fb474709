"""How lengths are cut, and whose tiles are taken."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.kernels.backend import compiling_for
from rlm.kernels.mla_attention.tiles import (
  Cut,
  cut,
  gpu_tiles,
  tpu_tiles,
  trying,
)


@pytest.mark.parametrize(
  ("length", "tile", "held", "want"),
  [
    (4096, 512, 8192, Cut(512, 4096, 4096)),
    (640, 512, 8192, Cut(384, 768, 768)),  # and not two of 512
    (6, 512, 8192, Cut(128, 128, 128)),
    (9000, 512, 8192, Cut(512, 4608, 9216)),  # two even runs
  ],
)
def test_lengths_by_hand(length, tile, held, want):
  assert cut(length, tile, held) == want


@given(
  st.integers(1, 50_000),
  st.sampled_from([128, 512, 1024]),
  st.sampled_from([1, 4, 16]),
)
def test_cuts_are_whole_and_within_what_is_asked(length, tile, tiles):
  result = cut(length, tile, tile * tiles)
  assert result.tile % 128 == 0 and result.tile <= tile
  assert result.held % result.tile == 0 and result.held <= tile * tiles
  assert result.padded % result.held == 0 and result.padded >= length
  # A backward pass cuts what forward has padded, into the same tiles.
  assert cut(result.padded, tile, tile * tiles) == result
  # No more than a lane's worth in each tile, and one tile a run.
  assert result.padded < length + (128 + 1) * result.padded // result.tile + (
    result.padded // result.held
  )


def test_chips_have_tiles_and_others_none():
  for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
    with compiling_for("tpu", kind):
      assert tpu_tiles() is not None
      assert gpu_tiles() is None
  with compiling_for("gpu", "NVIDIA H200"):
    assert tpu_tiles() is None and gpu_tiles() is not None
  with compiling_for("tpu", "TPU v3"):
    assert tpu_tiles() is None


def test_tiles_on_trial_go_first():
  with compiling_for("tpu", "TPU v5"):
    usual = tpu_tiles()
    other = dataclasses.replace(usual, decode_keys=128)
    with trying(other):
      assert tpu_tiles() == other
    assert tpu_tiles() == usual
