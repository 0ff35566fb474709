"""Choices of Hopper's tiles: which they are, and that each becomes a kernel."""

import jax
import pytest

from rlm.kernels.backend import compiling_for
from rlm.kernels.mla_attention import gpu_attention
from rlm.kernels.mla_attention.tiles import gpu_tiles, trying
from tests.kernels.mla_attention import hopper
from tools import bench_mla, journal
from tools.mla_cases import LITE, Attention
from tools.mla_tile_cases import (
  TRIED,
  AttentionByTiles,
  DecodeByTiles,
  choices,
  small_tile_cases,
  tile_cases,
)


@pytest.fixture(autouse=True)
def hopper_ahead():
  with compiling_for("gpu", hopper.CHIP):
    yield


@pytest.mark.parametrize("kernel", TRIED)
def test_choices_differ_and_hold_what_the_table_has(kernel):
  found = [tiles for _, tiles in choices(kernel)]
  assert gpu_tiles() in found
  assert len(set(found)) == len(found) == len(dict(choices(kernel)))


@pytest.mark.parametrize("kernel", ("forward", "dq", "dk"))
def test_choices_fit_into_shared_memory(kernel):
  new, _ = jax.eval_shape(
    Attention("forward", LITE, 1, 256).make, jax.random.key(0)
  )
  for name, tiles in choices(kernel):
    with trying(tiles):
      reason = gpu_attention.attention_obstacle(*new[:5], None, 0.1)
    assert reason is None, (name, reason)


def test_what_is_timed_was_checked():
  checked = {(c.kind, name) for c in small_tile_cases() for name in c.ways()}
  timed = {(c.kind, name) for c in tile_cases() for name in c.ways()}
  assert timed <= checked


def lowered(case, name):
  way = case.ways()[name]
  made = jax.eval_shape(way.make, jax.random.key(0))
  return hopper.lowered(way.run, *made)


def test_a_choice_becomes_another_kernel():
  case = AttentionByTiles("forward", LITE, 1, 256)
  default, other = (
    lowered(case, f"forward_keys={keys}, forward_stages={stages}")
    for keys, stages in ((128, 2), (64, 4))
  )
  assert default.count("@mosaic_gpu_v2") == other.count("@mosaic_gpu_v2") == 1
  assert default != other


@pytest.mark.full
def test_every_choice_is_a_program_of_its_own():
  train = [
    AttentionByTiles("train", LITE, 1, 328, kernels=(kernel,))
    for kernel in ("forward", "dq", "dk")
  ]
  decode = [
    DecodeByTiles(LITE, 2, 320, cache) for cache in ("plain", "float8", "paged")
  ]
  for case in (*train, *decode):
    programs = [lowered(case, name) for name in case.ways()]
    assert len(set(programs)) == len(programs) > 1, case
    assert all("@mosaic_gpu_v2" in program for program in programs)


def test_tiles_of_another_chip_are_refused(capsys):
  with compiling_for("gpu", "NVIDIA B200"):
    status = bench_mla.main(["--gpu", "--tiles", "--until=1"])
  assert status == journal.REFUSED
  assert "--tiles, but this is NVIDIA B200" in capsys.readouterr().err


def test_tiles_are_of_gpus(capsys):
  with pytest.raises(SystemExit):
    bench_mla.main(["--tiles"])
  assert "--tiles are of GPU kernels" in capsys.readouterr().err
