"""Seconds and peak memory of loading a published checkpoint made on the spot.

  python -m tools.bench_load --gigabytes=2 --output=load.json

writes a bfloat16 checkpoint of V3's shape (many experts, a large embedding) in
several shards, or with `--stored=fp8` the same in FP8, to a temporary folder or
below --folder, loads it in one child process per case and removes it. With
`--own` it is converted to a folder of ours first, as tools.convert_checkpoint
does, and that one is loaded. Cases are target dtype, or int8, by number of
virtual CPU devices; with several, experts are divided by expert and every other
leaf along its last axis that divides. The case `export` writes a published
folder from it instead.

Peak memory is the process's resident set at its highest (VmHWM) over what it
was when everything was imported and jax had started; Linux only. On a CPU the
target lies in the same memory. The bound is the target's bytes and twice those
of the largest tensor as stored, or of the largest leaf of a folder of ours.
Files just written are in the page cache, so
that seconds are those of the loading and not of the disk.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import rlm
from rlm.checkpoint.convert import export_checkpoint, import_published
from rlm.checkpoint.export import export_published
from rlm.checkpoint.initial import shapes
from rlm.checkpoint.manager import open_variables
from rlm.checkpoint.published_names import Tensor
from rlm.checkpoint.tensor_files import TensorFiles
from rlm.models.config import ModelConfig
from rlm.models.transformer import Transformer
from tools import interleave

CASES = ("float32:1", "bfloat16:1", "float32:8", "int8:1")
_RANDOM = 1 << 22  # numbers drawn; every tensor repeats them


def make_config(gigabytes: float) -> ModelConfig:
  """V3's shape with so many experts that bfloat16 weights take `gigabytes`.

  An eighth of the bytes are the embedding and the head; below 1 GB the widths
  shrink, so that a small checkpoint has the same number of tensors.
  """
  width = 1024 if gigabytes >= 1 else 256
  layers = 4
  numbers = gigabytes * 1e9 / 2
  vocab = int(numbers / 16 / width) // 256 * 256
  expert = 3 * width * width // 2
  experts = int(numbers * 7 / 8 / (layers * expert)) // 8 * 8
  return ModelConfig(
    vocab_size=vocab,
    n_vocab_used=vocab,
    hidden_size=width,
    num_hidden_layers=layers,
    first_k_dense_replace=1,
    intermediate_size=4 * width,
    moe_intermediate_size=width // 2,
    n_routed_experts=max(experts, 8),
    num_experts_per_tok=8,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    num_attention_heads=width // 64,
    q_lora_rank=width // 2,
    kv_lora_rank=width // 4,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    initializer_range=0.02,
    tie_word_embeddings=False,
    num_nextn_predict_layers=1,
    dtype="bfloat16",
    param_dtype="bfloat16",
    remat="none",
    unroll_layers=False,
    attention_chunk=0,
    logits_chunk=0,
  )


def write_checkpoint(
  folder: pathlib.Path, gigabytes: float, stored: str, shards: int = 5
) -> None:
  """A published folder of random weights; "bfloat16" or "fp8"."""
  cfg = make_config(gigabytes)
  rng = np.random.default_rng(0)
  bits = rng.integers(1 << 16, size=_RANDOM, dtype=np.uint16)
  # Random sign and fraction; exponents -7 to -4, so that all are finite.
  numbers = (bits & 0x81FF | 0x3C00).view(ml_dtypes.bfloat16)
  numbers = np.concatenate([numbers, numbers])

  def read(leaf: str, tensor: Tensor) -> np.ndarray:
    # Neighbours differ, or Orbax would compress one to the other.
    start = zlib.crc32(tensor.name.encode()) % _RANDOM
    return np.resize(numbers[start : start + _RANDOM], tensor.shape)

  written = gigabytes * 1e9 / (2 if stored == "fp8" else 1)
  export_published(
    folder,
    cfg,
    shapes(Transformer(cfg)),
    read,
    stored=stored,
    max_shard_bytes=int(written / shards),
  )


def divided(devices: int) -> Any:
  """Shapes -> shardings over `devices`: experts by expert, others by width."""
  mesh = jax.make_mesh(
    (devices,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
  )

  def sharding(leaf):
    axes = [1] if leaf.ndim == 4 else [*range(leaf.ndim)][::-1]
    for axis in axes:
      if leaf.shape[axis] % devices == 0:
        spec = PartitionSpec(*(None,) * axis, "data")
        return NamedSharding(mesh, spec)
    return NamedSharding(mesh, PartitionSpec())

  return lambda tree: jax.tree.map(sharding, tree)


def measure(folder: str, case: str) -> dict[str, Any]:
  """Loads or exports once in this process; see the module's docstring."""
  target, _, devices = case.partition(":")
  sizes = _stored_sizes(pathlib.Path(folder))
  jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))  # everything started
  before = _resident("VmRSS")
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
  start = time.perf_counter()
  if target == "export":
    export_checkpoint(folder, f"{folder}-export")
    made = 0
  else:
    made = _load(folder, target, int(devices))
  seconds = time.perf_counter() - start
  peak = _resident("VmHWM") - before
  shutil.rmtree(f"{folder}-export", ignore_errors=True)
  bound = made + 2 * max(sizes)
  return {
    "case": case,
    "seconds": seconds,
    "stored_gb_per_second": sum(sizes) / seconds / 1e9,
    "target_gb_per_second": made / seconds / 1e9,
    "stored_bytes": sum(sizes),
    "target_bytes": made,
    "largest_tensor_bytes": max(sizes),
    "peak_bytes": peak,
    "bound_bytes": bound,
    "over_target_bytes": peak - made,
    "holds": peak <= bound,
  }


def _load(folder: str, target: str, devices: int) -> int:
  """Loads, and counts the bytes on the devices."""
  options: dict[str, Any] = {"dtype": target}
  if target == "int8":
    options = {"dtype": "bfloat16", "quantize": "int8"}
  if devices > 1:
    options["shardings"] = divided(devices)
  _, variables = rlm.load_checkpoint(folder, **options)
  leaves = jax.tree.leaves(jax.block_until_ready(variables))
  return sum(s.data.nbytes for x in leaves for s in x.addressable_shards)


def _stored_sizes(folder: pathlib.Path) -> list[int]:
  """Bytes of each tensor, or of each leaf in a folder of ours."""
  if (folder / "checkpoints").is_dir():
    shapes = open_variables(folder / "checkpoints").shapes
    return [x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)]
  files = TensorFiles(folder)
  return [files.nbytes(name) for name in files.names()]


def _resident(field: str) -> int:
  """A figure of /proc/self/status, in bytes."""
  status = pathlib.Path("/proc/self/status").read_text()
  match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
  if match is None:
    raise ValueError(f"/proc/self/status has no {field}: Linux is needed.")
  return 1024 * int(match[1])


def measure_apart(folder: pathlib.Path, case: str) -> dict[str, Any]:
  """`measure` in a child process, whose memory holds nothing else."""
  command = [sys.executable, "-m", "tools.bench_load", "--load", str(folder)]
  done = subprocess.run(
    [*command, "--cases", case],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parents[1],
    env={"JAX_PLATFORMS": "cpu", **os.environ},
  )
  return json.loads(done.stdout)


def main() -> None:
  """Reads the flags, makes the checkpoint, measures every case."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--gigabytes", type=float, default=2.1, help="of the bfloat16 weights")
  add("--stored", choices=("bfloat16", "fp8"), default="bfloat16")
  add("--own", action="store_true", help="load a folder of ours made from it")
  add("--cases", nargs="+", default=CASES, metavar="DTYPE:DEVICES")
  add("--rounds", type=int, default=1, help="loads of each case, in turn")
  add("--folder", help="where to make the temporary folder")
  add("--load", help=argparse.SUPPRESS)  # what the child processes do
  add("--output", help="also write the JSON here")
  arguments = parser.parse_args()
  if arguments.load:
    (case,) = arguments.cases
    jax.config.update("jax_num_cpu_devices", int(case.partition(":")[2] or 1))
    print(json.dumps(measure(arguments.load, case)))
    return
  with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
    folder = pathlib.Path(made) / "model"
    start = time.perf_counter()
    write_checkpoint(folder, arguments.gigabytes, arguments.stored)
    written = time.perf_counter() - start
    if arguments.own:
      published, folder = folder, pathlib.Path(made) / "ours"
      import_published(published, folder)
      shutil.rmtree(published)
    cases = [
      measure_apart(folder, case)
      for _ in range(arguments.rounds)
      for case in arguments.cases
    ]
  result = interleave.circumstances(("jax", "numpy"), os.cpu_count() or 1)
  interleave.report(
    {
      **result,
      "stored": arguments.stored,
      "own": arguments.own,
      "seconds_to_write": written,
      "cases": cases,
    },
    arguments.output,
  )


if __name__ == "__main__":
  main()
