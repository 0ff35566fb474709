"""Tile sizes of the TPU kernels, by the schedules that they compile to.

  python -m tools.search_tiles --topology=v5p:2x2x1 --kernel=forward

compiles each choice of tiles ahead of time for one chip, which takes libtpu
(`pip install 'rlm[tpu]'`) and no TPU, counts the bundles of its loops and how
often they turn for one head of causal attention at the published sizes, and
prints the choices by predicted cycles. The best go into
rlm/kernels/mla_attention/tiles.py. Waits for memory are not in the cycles.
"""

import dataclasses
import itertools
import math
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tools.kernel_schedule import DUMP_FLAGS, Schedule, read_schedule

KERNELS = ("forward", "backward", "decode")
_TOKENS, _HEADS = 4096, 2  # of a row; heads only make the same schedule
_NOPE, _ROPE, _VALUE, _LATENT = 128, 64, 128, 512
_DECODE_CONTEXT, _DECODE_HEADS = 32768, 128


@dataclasses.dataclass(frozen=True)
class Choice:
  """Tiles of one kernel, in tokens: `keys` alone for decode."""

  queries: int
  keys: int

  def visits(self, tokens: int) -> int:
    """Tiles of scores on or below the diagonal."""
    return sum(
      math.ceil(min((i + 1) * self.queries, tokens) / self.keys)
      for i in range(math.ceil(tokens / self.queries))
    )


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A choice that compiled.

  Attributes:
    choice: its tiles.
    schedule: of the kernel.
    cycles: of one head over `_TOKENS`, or of one row of decode.
  """

  choice: Choice
  schedule: Schedule
  cycles: int


def choices(kernel: str) -> Iterator[Choice]:
  """What is tried."""
  if kernel == "decode":
    for keys in (512, 1024, 2048, 4096):
      yield Choice(0, keys)
    return
  sizes = (256, 512, 1024, 2048)
  for queries, keys in itertools.product(sizes, sizes):
    if 2**18 <= queries * keys <= 2**20:
      yield Choice(queries, keys)


def cycles(kernel: str, choice: Choice, schedule: Schedule) -> int:
  """Predicted for one head, or one row of decode.

  The bundles of a grid step count whole, the parts under a condition too: a
  little much where they run once a tile of queries.
  """
  by_depth = schedule.by_depth
  if kernel == "decode":
    return by_depth[1] * math.ceil(_DECODE_CONTEXT / choice.keys)
  steps = choice.queries if kernel == "forward" else choice.keys
  outer = math.ceil(_TOKENS / steps)
  visits = choice.visits(_TOKENS)
  return by_depth[1] * outer + by_depth[2] * visits


def _compile(kernel: str, choice: Choice, tiles: Any, device: Any) -> None:
  import jax
  import jax.numpy as jnp

  from rlm.kernels.backend import compiling_for
  from rlm.kernels.mla_attention import mla_attention, mla_decode
  from rlm.kernels.mla_attention import tiles as table

  place = jax.sharding.SingleDeviceSharding(device)

  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

  chosen = {
    "forward": dict(forward_queries=choice.queries, forward_keys=choice.keys),
    "backward": dict(
      backward_queries=choice.queries, backward_keys=choice.keys
    ),
    "decode": dict(decode_keys=choice.keys, decode_splits=1),
  }[kernel]
  t, n = _TOKENS, _HEADS
  with (
    compiling_for("tpu", device.device_kind),
    table.trying(dataclasses.replace(tiles, **chosen)),
  ):
    if kernel == "decode":
      s, width = _DECODE_CONTEXT, _LATENT + _ROPE
      tokens = [shape(1, x, dtype=jnp.int32) for x in (1, s, 1, s)]
      run = lambda *x: mla_decode(  # noqa: E731
        *x, kv_lora_rank=_LATENT, scale=0.1, implementation="tpu"
      )
      operands = [shape(1, 1, _DECODE_HEADS, width), shape(1, width, s)]
      jax.jit(run).lower(*operands, *tokens).compile()
      return
    operands = [
      shape(1, t, n, _NOPE),
      shape(1, t, n, _ROPE),
      shape(1, t, n, _NOPE),
      shape(1, t, _ROPE),
      shape(1, t, n, _VALUE),
    ]
    tokens = [shape(1, t, dtype=jnp.int32)] * 4

    def attend(*x):
      return mla_attention(*x, scale=0.1, implementation="tpu")

    def loss(*x):
      out, lse = attend(*x)
      return out.astype(jnp.float32).sum() + lse.sum()

    backward = jax.grad(loss, argnums=tuple(range(5)))
    run = attend if kernel == "forward" else backward
    jax.jit(run).lower(*operands, *tokens).compile()


def search(
  kernel: str, topology: str, dump: pathlib.Path
) -> tuple[list[Candidate], list[tuple[Choice, str]]]:
  """Candidates by cycles, the fewest first; and what was refused, and why."""
  from rlm.kernels.backend import compiling_for
  from rlm.kernels.mla_attention.tiles import tpu_tiles
  from tools import ahead

  device = ahead.describe_slice(topology)[0]
  with compiling_for("tpu", device.device_kind):
    tiles = tpu_tiles()
  if tiles is None:
    raise ValueError(
      f"{device.device_kind} has no row in rlm/kernels/mla_attention/tiles.py"
      " to start from. Add one."
    )
  name = "mla_decode" if kernel == "decode" else f"mla_attention_{kernel}"
  found, refused = [], []
  for choice in track(list(choices(kernel)), description=f"{kernel}"):
    try:
      _compile(kernel, choice, tiles, device)
    except Exception as error:  # the compiler's, of several kinds
      if "vmem" not in str(error).lower():
        raise
      refused.append((choice, str(error).splitlines()[0][:100]))
      continue
    schedule = read_schedule(dump, name)
    found.append(Candidate(choice, schedule, cycles(kernel, choice, schedule)))
    shutil.rmtree(dump)
    dump.mkdir()
  return sorted(found, key=lambda c: c.cycles), refused


def show(candidates: list[Candidate], console: Console) -> None:
  """Prints them, the best first."""
  table = Table("queries", "keys", "cycles", "relative", "MXU", "spills")
  for c in candidates:
    table.add_row(
      str(c.choice.queries or ""),
      str(c.choice.keys),
      f"{c.cycles:,}",
      f"{c.cycles / candidates[0].cycles:.2f}",
      f"{c.schedule.share('MXU'):.0%}",
      f"{c.schedule.share('VSTORE:SPILL'):.0%}",
    )
  console.print(table)


def main(argv: list[str]) -> None:
  """Runs the command."""
  del argv
  values, console = flags.FLAGS, Console()
  with tempfile.TemporaryDirectory() as folder:
    dump = pathlib.Path(folder) / "dump"
    dump.mkdir()
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = (
      f"{given} {DUMP_FLAGS.format(folder=dump)}".strip()
    )
    try:
      candidates, refused = search(values.kernel, values.topology, dump)
    except ValueError as error:
      sys.exit(f"error: {error}")
  show(candidates, console)
  for choice, why in refused:
    console.print(f"{choice.queries} x {choice.keys}: {why}")


if __name__ == "__main__":
  flags.DEFINE_string("topology", "v5p:2x2x1", "Slice whose chip it is.")
  flags.DEFINE_enum("kernel", "forward", KERNELS, "What to search.")
  app.run(main)
