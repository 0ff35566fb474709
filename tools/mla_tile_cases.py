"""Choices of Hopper's tiles as ways to compute a case of `tools/mla_cases`.

`tools/bench_mla.py --gpu --tiles` checks and times them as it does any other
way. The best go into rlm/kernels/mla_attention/tiles.py.
"""

import dataclasses
from collections.abc import Callable, Iterator

from rlm.kernels.mla_attention.tiles import GpuTiles, gpu_tiles, trying
from tools.mla_cases import LITE, V3, Arrays, Attention, Decode, Way

# By kernel, the fields of its tiles and what is tried of them.
TRIED: dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = {
  "forward": (
    ("forward_keys", "forward_stages"),
    ((128, 2), (64, 4), (64, 3), (64, 2), (192, 1)),
  ),
  "dq": (
    ("dq_keys", "dq_stages"),
    ((64, 3), (64, 2), (32, 6), (32, 4)),
  ),
  "dk": (
    ("dk_queries", "dk_stages", "dk_heads"),
    (
      *((32, 6, heads) for heads in (1, 2, 4, 8, 16)),
      *((32, 4, 4), (64, 3, 4), (64, 2, 4), (16, 8, 4)),
    ),
  ),
  # As many as fit, of which the published sizes leave two; and one.
  "decode": (("decode_stages",), ((4,), (1,))),
}


def choices(kernel: str) -> Iterator[tuple[str, GpuTiles]]:
  """What is tried of a kernel's tiles, and its name; the others as they are."""
  tiles = gpu_tiles()
  assert tiles is not None, "a Hopper GPU"
  fields, tried = TRIED[kernel]
  for values in tried:
    chosen = dict(zip(fields, values, strict=True))
    name = ", ".join(f"{field}={value}" for field, value in chosen.items())
    yield name, dataclasses.replace(tiles, **chosen)


def _with(tiles: GpuTiles, run: Callable[..., Arrays]) -> Callable[..., Arrays]:
  def tried(new, shared):
    with trying(tiles):
      return run(new, shared)

  return tried


def _by_tiles(way: Way, kernels: tuple[str, ...]) -> dict[str, Way]:
  return {
    name: dataclasses.replace(way, run=_with(tiles, way.run))
    for kernel in kernels
    for name, tiles in choices(kernel)
  }


@dataclasses.dataclass(frozen=True)
class AttentionByTiles(Attention):
  """Ways are choices of the tiles of `kernels`."""

  kernels: tuple[str, ...] = ("forward",)

  def ways(self) -> dict[str, Way]:
    return _by_tiles(super().ways()["gpu"], self.kernels)


@dataclasses.dataclass(frozen=True)
class DecodeByTiles(Decode):
  """Ways are choices of the tiles of decode."""

  def ways(self) -> dict[str, Way]:
    return _by_tiles(super().ways()["gpu"], ("decode",))


def small_tile_cases() -> list[Attention | Decode]:
  """To be checked: every choice, at lengths that are no whole tiles."""
  kernels = ("forward", "dq", "dk")
  cases: list[Attention | Decode] = []
  for sizes in (V3, LITE):
    cases.append(AttentionByTiles("train", sizes, 2, 328, kernels=kernels))
    for cache in ("plain", "float8", "paged"):
      cases.append(DecodeByTiles(sizes, 3, 320, cache, tokens=2))
  return cases


def tile_cases() -> list[Attention | Decode]:
  """To be timed; of training, the choices of the backward pass alone."""
  cases: list[Attention | Decode] = [
    AttentionByTiles("forward", V3, 8, 4096),
    AttentionByTiles("train", V3, 8, 4096, kernels=("dq", "dk")),
    AttentionByTiles("train", LITE, 8, 4096, kernels=("dk",)),
  ]
  for cache in ("plain", "float8", "paged"):
    for sizes in (LITE, V3):
      cases.append(DecodeByTiles(sizes, 128, 8192, cache))
  return cases
