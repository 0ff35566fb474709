"""Room in caches; what they hold is tested with those who decode."""

from rlm.kernels.backend import compiling_for
from rlm.models.cache import room_for


def test_room_is_in_whole_tiles_where_kernels_read():
  assert room_for(88) == 88  # on a CPU
  for platform, chip in (("tpu", "TPU v5"), ("gpu", "NVIDIA H200")):
    with compiling_for(platform, chip):
      assert [room_for(n) for n in (1, 128, 129)] == [128, 128, 256]
