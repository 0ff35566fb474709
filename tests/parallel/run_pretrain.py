"""Pretraining that notes what its devices held; a child of processes_test.py.

Beside the run's files it writes digests.PROCESS.jsonl: a checksum of each
device's part of every array, of the batch of each step and of every saved
state.
"""

import json
import pathlib
import zlib

from experiments import launch, pretrain


def parts(tree):
  """name[index] -> CRC-32 of the part of each device here."""
  import jax
  import numpy as np

  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not isinstance(leaf, jax.Array):
      continue
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    for shard in leaf.addressable_shards:
      index = [
        s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)
      ]
      data = np.ascontiguousarray(shard.data)
      found[f"{name}{index}"] = zlib.crc32(data.tobytes())
  return found


def run(c, workdir):
  import jax

  from rlm.checkpoint.manager import CheckpointManager
  from rlm.parallel import rows

  place_rows, save = rows.place_rows, CheckpointManager.save
  lines = []

  def noting_place_rows(*args, leading, **kwargs):
    batch = place_rows(*args, leading=leading, **kwargs)
    if leading:  # not held-out rows
      lines.append({"batch": parts(batch)})
    return batch

  def noting_save(self, step, state, *args, **kwargs):
    lines.append({"saved": step, "params": parts(state.variables["params"])})
    save(self, step, state, *args, **kwargs)

  rows.place_rows, CheckpointManager.save = noting_place_rows, noting_save
  pretrain.run(c, workdir)
  path = pathlib.Path(workdir) / f"digests.{jax.process_index()}.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
  launch.main(run, __doc__, several_processes=True)
