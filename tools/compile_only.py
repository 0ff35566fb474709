r"""Compiles a config for a TPU slice that nobody here has, and counts.

  python tools/compile_only.py --config=configs/pretrain/deepseek_v3.py \
    --topology=v5p:8x8x8 --json=v3.json

What runs is the real training step (or prefill, or decode), compiled by the
TPU's own compiler (`pip install 'rlm[tpu]'`, 0.7 GB): bytes of a chip against
its HBM, operations and HBM traffic with every loop's trips, each kind of
collective with the bytes that a chip sends over which axis, and from these a
step's time by term. Any key of the config can be set after it
(--config.mesh.expert=64).

The prediction is calibrated and not measured: the matrix units' efficiency is
solved from MaxText's published speed of DeepSeek-V3 on the same slice
(tools/roofline.py). HBM traffic is a lower bound of what XLA's program moves.
"""

import json
import pathlib
import sys
import time
from typing import Any

from absl import flags

GB = 1e9


def define_flags(values: flags.FlagValues) -> None:
  """Those beside --config."""
  define = dict(flag_values=values)
  flags.DEFINE_string("topology", "v5p:8x8x8", "Of the slice.", **define)
  flags.DEFINE_enum(
    "program", "train", ["train", "prefill", "decode"], "What.", **define
  )
  flags.DEFINE_integer("slots", 0, "Rows that decode; 0: 8 a chip.", **define)
  flags.DEFINE_integer("context", 4096, "Of prefill and decode.", **define)
  flags.DEFINE_integer("steps", 128, "Decode steps of a call.", **define)
  flags.DEFINE_enum(
    "optimization", "O1", ["O0", "O1", "O2"], "XLA's effort.", **define
  )
  flags.DEFINE_string("json", None, "File for all figures.", **define)
  flags.DEFINE_string("hlo", None, "File for the compiled program.", **define)


def compile_program(
  program: Any, optimization: str
) -> tuple[Any, dict[str, float]]:
  """Lowers and compiles; returns the executable and the seconds of each.

  Args:
    program: of `tools.ahead`, within whose `compiling_for` this is called.
    optimization: XLA's effort, O0 to O2.

  Raises:
    ValueError: the program does not fit into the chip's memory.
  """
  import jax

  began = time.monotonic()
  lowered = program.function.lower(*program.arguments)
  lowered_at = time.monotonic()
  before = jax.config.jax_optimization_level
  jax.config.update("jax_optimization_level", optimization)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise ValueError(
      f"{program.name} does not fit: {str(error).splitlines()[0]}\nDivide the"
      " model or its rows further (mesh), keep less (model.remat), or handle"
      " less at once (model.attention_chunk, model.logits_chunk,"
      " mesh.expert_chunk, batch.microbatch_rows)."
    ) from error
  finally:
    jax.config.update("jax_optimization_level", before)
  now = time.monotonic()
  return compiled, {"lower": lowered_at - began, "compile": now - lowered_at}


def memory_of(compiled: Any, program: Any, chip: Any) -> dict:
  """Bytes of a chip."""
  import jax

  stats = compiled.memory_analysis()
  pieces, ragged = 0, []
  for path, leaf in jax.tree_util.tree_leaves_with_path(program.state):
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for n in shape:
      size *= n
    pieces += size
    name = getattr(path[-1], "key", None)
    if name and len(shape) > 1 and shape[-2] % 8 and shape != leaf.shape:
      ragged.append(f"{jax.tree_util.keystr(path)} {shape}")
  peak = stats.peak_memory_in_bytes
  needed = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  return {
    "arguments": stats.argument_size_in_bytes,
    "state": pieces,
    "temporaries": stats.temp_size_in_bytes,
    "outputs_not_aliased": stats.output_size_in_bytes
    - stats.alias_size_in_bytes,
    "peak": peak,
    "arguments_and_temporaries": needed,
    "hbm": chip.hbm_bytes // chip.devices_per_chip,
    "host": stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes,
    "shards_of_no_whole_8_rows": ragged,
  }


def expected_rows(program: Any) -> tuple[dict[int, float], float]:
  """Rows of an exchange, and of a grouped product, under even routing.

  The mean over tokens of the devices that hold any of their experts, by drawing
  tokens with random scores; times the tokens that travel at once. Of two legs
  the first goes to each group of devices once, the second on from there.

  Returns:
    Rows that a device hands out, by how far apart in the mesh the devices of
    the leg are; rows of its grouped product.
  """
  import numpy as np

  layout, c = program.layout, program.layout.model.cfg
  exchange = layout.shard.exchange
  per_device = program.tokens // program.trips
  if c.is_dense or not exchange.levels:
    return {}, float(per_device * c.num_experts_per_tok)
  rng = np.random.default_rng(0)
  scores = rng.random((1 << 14, c.n_group, c.n_routed_experts // c.n_group))
  if c.topk_method != "greedy" and c.n_group > 1:
    best = np.sort(scores, axis=-1)[..., -2:].sum(axis=-1)
    kept = np.argsort(-best, axis=-1)[:, : c.topk_group]
    mask = np.zeros(best.shape, bool)
    np.put_along_axis(mask, kept, True, axis=-1)
    scores = np.where(mask[..., None], scores, -1)
  flat = scores.reshape(len(scores), -1)
  chosen = np.argsort(-flat, axis=-1)[:, : c.num_experts_per_tok]
  tokens = min(exchange.chunk or per_device, per_device)
  within = layout.cfg.context * layout.cfg.tensor  # of one device of `expert`
  rows, reached = {}, 1
  for level in exchange.levels:
    reached *= level.peers
    peer = chosen // (c.n_routed_experts // reached)
    distinct = np.mean([len(set(row)) for row in peer.tolist()])
    rows[level.stride * within] = float(distinct * tokens)
  return rows, float(tokens * c.num_experts_per_tok)


def analyse(text: str, program: Any, chip: Any, flops: float) -> dict:
  """Work, traffic and the predicted step, from the compiled program's text."""
  from rlm import hardware
  from tools import (
    hlo_groups,
    hlo_loops,
    hlo_program,
    hlo_traffic,
    hlo_work,
    roofline,
  )

  module = hlo_program.parse(text)
  exchanged, multiplied = expected_rows(program)
  # Passes over experts' rows end when none is left: one, under even routing.
  run = hlo_loops.follow(module, default_trips=1)
  unknown = [loop for loop in run.loops if loop.dynamic]
  outer = min(unknown, key=lambda loop: len(loop.op_name), default=None)
  if outer is not None:
    trips = {outer.name: float(program.trips)}
    run = hlo_loops.follow(module, default_trips=1, dynamic_trips=trips)
  axes = hlo_groups.MeshAxes.of(program.layout.mesh)
  work = hlo_work.count_work(run, ragged_rows=multiplied)
  traffic = hlo_traffic.read_traffic(run, axes, ragged_rows=exchanged)
  efficiency = roofline.calibrate(hardware.CHIPS["v5p"])
  prediction = roofline.predict(
    chip=chip,
    flops=work.flops,
    hbm_bytes=work.hbm_bytes,
    collectives=traffic.collectives,
    mesh=axes,
    efficiency=efficiency,
    tokens=program.tokens,
    model_flops=flops,
  )
  steps = {}
  for overlap in (False, True):
    secs = prediction.step_secs(overlap=overlap, emitted=True)
    steps["overlapped" if overlap else "summed"] = {
      "seconds": secs,
      "tokens_per_second_per_chip": prediction.tokens_per_second(secs),
      "mfu": prediction.mfu(secs),
    }
  tokens = program.tokens

  def label(c):
    stands = f" (an {c.kind} in place of it)" if c.instead_of else ""
    return (
      f"{c.instead_of or c.kind}{stands} over {'+'.join(c.axes)}, {c.dtype}"
    )

  return {
    "loops_of_unknown_length": {
      loop.name: {"path": loop.op_name, "trips": loop.trips}
      for loop in run.loops
      if loop.dynamic
    },
    "executed_flops": work.flops,
    "executed_flops_per_token": work.flops / tokens,
    "hbm_bytes": work.hbm_bytes,
    "hbm_bytes_per_token": work.hbm_bytes / tokens,
    "sent_bytes": traffic.sent,
    "sent_bytes_per_token": traffic.sent / tokens,
    "collectives": traffic.by(label),
    "not_counted": [*traffic.unknown, *(p.name for p in work.unknown)],
    "terms_seconds": {
      "products_summed": prediction.products_summed,
      "products_overlapped": prediction.products_overlapped,
      "hbm": prediction.hbm,
      **{term.name: term.emitted_secs for term in prediction.collectives},
    },
    "efficiency": {
      "summed": efficiency.summed,
      "overlapped": efficiency.overlapped,
    },
    "step": steps,
  }


def _program(values: flags.FlagValues, cfg: Any, devices: list[Any]) -> Any:
  """What shall be compiled, and its operations per token by formula."""
  from rlm import flops
  from tools import ahead

  mtp = cfg.mtp_weight != 0
  if values.program == "train":
    program = ahead.train_program(cfg, devices)
    per_token = flops.train_flops_per_token(
      cfg.model, cfg.data.row_length, mtp=mtp
    )
  else:
    slots = values.slots or 8 * cfg.mesh.row_shards
    prefill, decode = ahead.serving_programs(
      cfg, devices, slots=slots, context=values.context, steps=values.steps
    )
    program = prefill if values.program == "prefill" else decode
    per_token = (
      flops.forward_flops_per_token(cfg.model, program.tokens, mtp=False)
      if values.program == "prefill"
      else flops.decode_flops_per_token(cfg.model, values.context)
    )
  return program, per_token


def report(values: flags.FlagValues) -> dict[str, Any]:
  """Compiles what the flags ask for and returns all figures.

  Raises:
    ValueError: the slice is unknown, or the config does not fit it.
  """
  from rlm import hardware
  from rlm.config import build
  from tools import ahead

  kind = values.topology.split(":")[0]
  if kind not in hardware.CHIPS:
    raise ValueError(
      f"--topology={values.topology}: {kind!r} is no chip of rlm/hardware.py,"
      f" which has {', '.join(hardware.CHIPS)}."
    )
  chip = hardware.CHIPS[kind]
  devices = ahead.describe_slice(values.topology)

  from experiments import pretrain
  from rlm import cost, flops
  from rlm.kernels.backend import compiling_for

  cfg = build(pretrain.Config, values.config)
  if cfg.mesh.devices != len(devices):
    raise ValueError(
      f"mesh has {cfg.mesh.devices} devices, and {values.topology}"
      f" {len(devices)}. Make the product of its axes {len(devices)}."
    )
  with compiling_for("tpu", devices[0].device_kind):
    program, per_token = _program(values, cfg, devices)
    compiled, seconds = compile_program(program, values.optimization)
  text = compiled.as_text()
  if values.hlo:
    pathlib.Path(values.hlo).write_text(text)
  exchange = program.layout.shard.exchange
  figures = {
    "program": program.name,
    "topology": values.topology,
    "chips": len(devices) // chip.devices_per_chip,
    "mesh": cfg.mesh.sizes,
    "compile_seconds": seconds,
    "tokens_per_device": program.tokens,
    "worst_rows_received": exchange.worst_rows(program.tokens // program.trips)
    if exchange.levels
    else 0,
    "memory": memory_of(compiled, program, chip),
    "flops_per_token": per_token,
    **analyse(text, program, chip, per_token),
  }
  if values.program == "train":
    counted = flops.train_flops_per_token(
      cfg.model, cfg.data.row_length, mtp=False
    )
    tokens = cfg.steps * cfg.batch.rows * cfg.data.row_length
    for step in figures["step"].values():
      spent = cost.training_cost(
        chip,
        tokens=tokens,
        flops_per_token=counted,
        tokens_per_second_per_chip=step["tokens_per_second_per_chip"]
        * chip.devices_per_chip,
      )
      step["tokens_in_all"] = tokens
      step["chip_hours"] = spent.total_chip_hours
      step["dollars"] = spent.dollars
  return figures


def show(figures: dict[str, Any]) -> None:
  """Prints the figures as tables."""
  import rich
  from rich.table import Table

  memory = figures["memory"]
  table = Table(title=f"{figures['program']} on {figures['topology']}: a chip")
  table.add_column("memory")
  table.add_column("GB", justify="right")
  for name, size in memory.items():
    if isinstance(size, int | float):
      table.add_row(name.replace("_", " "), f"{size / GB:.2f}")
  rich.print(table)
  if memory["shards_of_no_whole_8_rows"]:
    print(
      f"{len(memory['shards_of_no_whole_8_rows'])} shards are no whole 8 rows:"
    )
    for line in memory["shards_of_no_whole_8_rows"][:6]:
      print(f"  {line}")
  if figures["worst_rows_received"]:
    print(
      f"a chip has room for {figures['worst_rows_received']} rows of tokens at"
      " its experts, the worst case of routing"
    )
  tokens = figures["tokens_per_device"]
  table = Table(title="sent by a chip")
  for column in ("collective", "times", "GB", "MB a token"):
    table.add_column(column, justify="left" if not table.columns else "right")
  for name, sums in figures["collectives"].items():
    table.add_row(
      name,
      f"{sums['executions']:.0f}",
      f"{sums['sent'] / GB:.2f}",
      f"{sums['sent'] / tokens / 1e6:.3f}",
    )
  sent = figures["sent_bytes"]
  table.add_row("all", "", f"{sent / GB:.2f}", f"{sent / tokens / 1e6:.3f}")
  rich.print(table)
  table = Table(title="seconds of a step, by term")
  table.add_column("term")
  table.add_column("s", justify="right")
  for name, secs in figures["terms_seconds"].items():
    table.add_row(name.replace("_", " "), f"{secs:.3f}")
  rich.print(table)
  print(
    f"operations of a token: {figures['flops_per_token'] / 1e9:.1f} G by"
    f" formula, {figures['executed_flops_per_token'] / 1e9:.1f} G executed;"
    f" HBM {figures['hbm_bytes_per_token'] / 1e6:.0f} MB a token"
  )
  for name, step in figures["step"].items():
    line = (
      f"collectives {name}: {step['seconds']:.2f} s,"
      f" {step['tokens_per_second_per_chip']:.0f} tokens/s/chip, MFU"
      f" {step['mfu']:.1%}"
    )
    if "chip_hours" in step:
      dollars = step["dollars"]
      line += f"; {step['tokens_in_all']:.3g} tokens: {step['chip_hours']:.3g}"
      line += " chip-hours"
      line += "" if dollars is None else f", ${dollars:,.0f}"
    print(line)


def main(argv: list[str] | None = None) -> None:
  """Reads the command, compiles, prints, writes."""
  argv = list(sys.argv if argv is None else argv)
  values = flags.FlagValues()
  define_flags(values)

  def body(values):
    figures = report(values)
    show(figures)
    if values.json:
      pathlib.Path(values.json).write_text(json.dumps(figures, indent=1) + "\n")

  from experiments import launch

  launch.configured_command(body, __doc__, values, argv)


if __name__ == "__main__":
  # As `python tools/compile_only.py` too, which finds the tools only.
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  main()
