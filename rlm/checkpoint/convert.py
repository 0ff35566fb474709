"""Published folders <-> folders of ours, for the command convert_checkpoint.

A converted folder looks like a finished run: config.json with the model,
checkpoints/ and summary.json, so that every experiment can start from it. What
came with the model (config.json, tokenizer, generation config, FP8 scales)
lies in `published/` and goes out with it again.

A leaf is gathered in a file, tensor by tensor: interrupted, the same command
continues after the last tensors that were whole. Orbax then holds the model in
memory while it saves. An export reads a tensor, or the chunk that it lies in,
at a time.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rlm import files
from rlm.checkpoint.export import (
  CARRIED_FILES,
  CARRIED_FOLDERS,
  SHARD_BYTES,
  Stored,
  export_published,
)
from rlm.checkpoint.initial import shapes
from rlm.checkpoint.load import open_run
from rlm.checkpoint.manager import CheckpointManager
from rlm.checkpoint.published import PublishedWeights
from rlm.checkpoint.published_names import Tensor, leaf_name, without_mtp
from rlm.checkpoint.tensor_files import open_tensors
from rlm.checkpoint.tensor_writer import TensorWriter
from rlm.config import plain
from rlm.data.byte_tokenizer_files import write_byte_tokenizer
from rlm.models.config import ModelConfig
from rlm.models.published_config import read_published_config
from rlm.models.transformer import Transformer

PUBLISHED = "published"  # folder of what came with the model
_SCALES = "fp8_scales"
_STAGE = ".converting"
_MARK_BYTES = 1 << 28  # an interruption costs so much reading at most

Report = Callable[[int, int], None]


class _Source(NamedTuple):
  """What an export reads from.

  Attributes:
    cfg: the model's sizes.
    shapes: of its variables.
    read: (leaf, tensor) -> the tensor as published.
    original: the config.json that the model came with, or None.
    scales: of the FP8 weights that it came with.
    carried: folder of the files that go with it.
  """

  cfg: ModelConfig
  shapes: Any
  read: Callable[[str, Tensor], np.ndarray]
  original: dict[str, Any] | None
  scales: dict[str, np.ndarray]
  carried: pathlib.Path


def import_published(
  source: str | os.PathLike,
  target: str | os.PathLike,
  *,
  dtype: str | None = None,
  mtp: bool = True,
  on_read: Report = lambda done, total: None,
) -> None:
  """Converts a published folder to one of ours; continues where it stopped.

  Args:
    source: config.json and safetensors.
    target: the folder to make.
    dtype: of the parameters, "float32" or "bfloat16"; None keeps the file's.
    mtp: False leaves the MTP modules out.
    on_read: is told (bytes read, bytes in all).

  Raises:
    ValueError: the source does not hold what it says, or the target holds
      another model.
    DiskFullError: no room; twice the model is needed while it is made.
  """
  source, target = pathlib.Path(source), pathlib.Path(target)
  cfg = read_published_config(source, dtype=dtype, param_dtype=dtype)
  ignored: list[str] = []
  if not mtp:
    cfg, ignored = without_mtp(cfg)
  wanted = shapes(Transformer(cfg))
  weights = PublishedWeights(source, cfg, wanted, ignored=ignored)
  record = {
    "model": files.to_json(plain(dataclasses.asdict(cfg))),
    "converted_from": {"fingerprint": weights.fingerprint()},
  }
  _begin(target, record)
  stage, checkpoints = target / _STAGE, target / "checkpoints"
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(wanted))
  if not (target / "summary.json").is_file():
    if not (checkpoints / "0").exists():
      weights.check_copies()
      files.require_free_space(
        target, 2 * size - _disk_use(stage), "the converted weights"
      )
      _carry(source, target / PUBLISHED)
      _save_scales(weights, target / PUBLISHED / _SCALES)
      variables = _stage(weights, wanted, stage, on_read)
      with CheckpointManager(checkpoints, keep=1) as manager:
        manager.save(0, {"variables": variables})
    files.write_json(target / "summary.json", {"steps": 0, "bytes": size})
  shutil.rmtree(stage, ignore_errors=True)


def export_checkpoint(
  source: str | os.PathLike,
  target: str | os.PathLike,
  *,
  stored: Stored | None = None,
  max_shard_bytes: int = SHARD_BYTES,
  on_write: Report = lambda done, total: None,
) -> None:
  """Writes a published folder from a run, a converted or a published one.

  Args:
    source: any folder that `load_checkpoint` reads.
    target: the folder to make.
    stored: how; None keeps FP8 where the model came in it, else the dtype of
      its parameters.
    max_shard_bytes: of one file of weights.
    on_write: is told (bytes written, bytes in all).

  Raises:
    ValueError: as `load_checkpoint` and `export_published`.
  """
  source, target = pathlib.Path(source), pathlib.Path(target)
  config = files.read_json(source / "config.json")
  if "model_type" in config:
    found = _published_source(source, config)
  else:
    found = _own_source(source, config)
  cfg = found.cfg
  export_published(
    target,
    cfg,
    found.shapes,
    found.read,
    stored=stored or ("fp8" if found.scales else cfg.param_dtype),
    original=found.original,
    scales=found.scales,
    max_shard_bytes=max_shard_bytes,
    on_write=on_write,
  )
  _carry(found.carried, target, besides=("config.json",))
  if config.get("tokenizer") == "bytes":
    write_byte_tokenizer(target)
  elif "tokenizer" in config:
    _carry(pathlib.Path(config["tokenizer"]), target, besides=("config.json",))
  generation = target / "generation_config.json"
  if cfg.eos_token_id and not generation.is_file():
    files.write_json(generation, {"eos_token_id": list(cfg.eos_token_id)})


def _published_source(folder: pathlib.Path, config: dict[str, Any]) -> _Source:
  """A published folder, read tensor by tensor."""
  cfg = read_published_config(folder)
  wanted = shapes(Transformer(cfg))
  weights = PublishedWeights(folder, cfg, wanted)
  weights.check_copies()

  def read(leaf: str, tensor: Tensor) -> np.ndarray:
    del leaf
    return weights.read(tensor.name)

  return _Source(cfg, wanted, read, config, weights.scales(), folder)


def _own_source(folder: pathlib.Path, config: dict[str, Any]) -> _Source:
  """A run's folder or a converted one, read block by block."""
  model, stored = open_run(folder, config)
  wanted = shapes(model)
  dtypes = {
    leaf_name(path): leaf.dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)
  }

  def read(leaf: str, tensor: Tensor) -> np.ndarray:
    part = stored.read(leaf, tensor.place).astype(dtypes[leaf], copy=False)
    return part.T if tensor.transposed else part

  carried, original, scales = folder / PUBLISHED, None, {}
  if (carried / "config.json").is_file():
    original = files.read_json(carried / "config.json")
  if (carried / _SCALES).is_dir():
    held = open_tensors(carried / _SCALES)
    scales = {name: held.read(name) for name in held.names()}
  return _Source(model.cfg, wanted, read, original, scales, carried)


def _disk_use(folder: pathlib.Path) -> int:
  """Bytes that the files of a folder take; sparse ones take less than long."""
  return sum(path.stat().st_blocks * 512 for path in folder.glob("*"))


def _begin(target: pathlib.Path, record: dict[str, Any]) -> None:
  """Makes the folder, or checks that it is of the same conversion."""
  path = target / "config.json"
  if path.is_file():
    if files.read_json(path) != record:
      raise ValueError(
        f"{target} holds another model, or the same from other files or in"
        " another dtype. Choose another folder, or remove it."
      )
    return
  if target.exists() and any(target.iterdir()):
    raise ValueError(f"{target} is not empty. Choose another folder.")
  target.mkdir(parents=True, exist_ok=True)
  files.write_json(path, record)


def _carry(
  source: pathlib.Path, target: pathlib.Path, besides: tuple[str, ...] = ()
) -> None:
  """Copies what comes with the weights."""
  target.mkdir(parents=True, exist_ok=True)
  for name in (*CARRIED_FILES, "config.json"):
    if name not in besides and (source / name).is_file():
      files.write_bytes(target / name, (source / name).read_bytes())
  for name in CARRIED_FOLDERS:
    if (source / name).is_dir():
      shutil.copytree(source / name, target / name, dirs_exist_ok=True)


def _save_scales(weights: PublishedWeights, folder: pathlib.Path) -> None:
  """In the dtype that they were stored in."""
  scales = weights.scales()
  if not scales:
    return
  shutil.rmtree(folder, ignore_errors=True)  # of an interrupted conversion
  plan = [(name, scale.dtype, scale.shape) for name, scale in scales.items()]
  with TensorWriter(folder, plan, max_shard_bytes=SHARD_BYTES) as writer:
    for name, scale in scales.items():
      writer.write(name, scale)


def _stage(
  weights: PublishedWeights, wanted: Any, folder: pathlib.Path, on_read: Report
) -> Any:
  """The leaves as arrays over files, gathered tensor by tensor."""
  folder.mkdir(exist_ok=True)
  done, total = 0, weights.total_bytes()

  def gather(path, leaf):
    nonlocal done
    name = leaf_name(path)
    array, tensors = _open_leaf(folder, name, leaf), weights.tensors[name]
    mark = folder / f"{name}.done"
    finished = int(mark.read_text()) if mark.is_file() else 0
    since = 0
    for i, tensor in enumerate(tensors):
      size = weights.files.nbytes(tensor.name)
      if i >= finished:
        part = weights.read(tensor.name)
        array[tensor.place] = part.T if tensor.transposed else part
        since += size
      done += size
      if since > _MARK_BYTES or i + 1 == len(tensors) > finished:
        array.flush()
        files.write_bytes(mark, str(i + 1).encode())
        since = 0
        on_read(done, total)
    return array

  return jax.tree.map_with_path(gather, wanted)


def _open_leaf(folder: pathlib.Path, name: str, leaf: Any) -> np.memmap:
  """A leaf's file, of zeros at first."""
  path = folder / f"{name}.bin"
  size = leaf.size * leaf.dtype.itemsize
  if not path.is_file() or path.stat().st_size != size:
    (folder / f"{name}.done").unlink(missing_ok=True)
    with files.clear_disk_errors(path), open(path, "wb") as file:
      file.truncate(size)
  return np.memmap(path, leaf.dtype, "r+", shape=leaf.shape)
