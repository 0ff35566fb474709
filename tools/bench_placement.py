r"""How much evener redundant experts make the devices that serve them.

  python -m tools.bench_placement --output=placement.json --plot=placement.png

routes tokens to experts whose popularity falls as a power of their rank (Zipf),
and places the experts for V3's serving settings (`SHAPES`), layer by layer:

  contiguous  experts in order, no redundancy;
  packed      no redundancy, but packed to devices by load, greedily;
  repeated    redundant slots repeat the first experts, in order;
  eplb        `rlm.parallel.place_experts`: replicas of the heaviest, packed.

The figure is the busiest device's load over the mean, averaged over layers; a
layer takes as long as its busiest device. Placements are made from --history
batches and measured on the next, whose tokens are drawn anew; "fitted" is on
those they were made from. "bound" is what no placement of as many slots can
beat: 1, or the heaviest replica where it is more than the mean device. The gain
is contiguous (where experts do not divide among devices: repeated) over eplb.

  python -m tools.bench_placement --workdir=runs/r1/pretrain --devices=4 \
    --nodes=2 --redundant=4

does so with the `expert_load` of a run's metrics.jsonl: placed by the mean of
the --window records before the last --window, measured on these. Nothing here
is timed and no device is used: the figures are exact counts.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from rlm.jsonl import read_jsonl
from rlm.parallel.placement import make_placement, place_experts
from tools import interleave


@dataclasses.dataclass(frozen=True)
class Shape:
  """A setting in which experts are served.

  Attributes:
    name: of the tables.
    devices: that share the experts of a layer.
    nodes: machines that hold them.
    redundant: slots beyond one for each expert.
  """

  name: str
  devices: int
  nodes: int
  redundant: int


# Nodes of 8 GPUs; 256 experts in 8 groups. V3 section 3.4 (EP32 prefill, EP320
# decode: one expert a GPU and 64 for redundant and shared ones), DeepSeek's
# production of February 2025 (EP144 decode), and the EP64 of training, whose
# devices take one redundant expert each.
SHAPES = (
  Shape("EP32", 32, 4, 32),
  Shape("EP64", 64, 8, 64),
  Shape("EP144", 144, 18, 32),
  Shape("EP320", 320, 40, 64),
)
EXPERTS, GROUPS, CHOICES = 256, 8, 8
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLACEMENTS = ("contiguous", "packed", "repeated", "eplb")


def zipf_load(
  rng: np.random.Generator,
  popularity: np.ndarray,
  *,
  tokens: int,
  choices: int,
) -> np.ndarray:
  """Tokens that each expert gets, every token choosing distinct experts.

  Args:
    rng: draws the tokens.
    popularity: float64 [L, E]; a token draws its experts one after the other,
      in proportion to it, without replacement (Gumbel top-k).
    tokens: of the batch.
    choices: K.

  Returns:
    int64 [L, E]; sums to K tokens.
  """
  layers, experts = popularity.shape
  load = np.zeros((layers, experts), np.int64)
  for layer in range(layers):
    keys = np.log(popularity[layer]) + rng.gumbel(size=(tokens, experts))
    chosen = np.argpartition(keys, -choices, axis=1)[:, -choices:]
    load[layer] = np.bincount(chosen.reshape(-1), minlength=experts)
  return load


def zipf_popularity(
  rng: np.random.Generator, exponent: float, layers: int, experts: int
) -> np.ndarray:
  """Powers of the rank, ranks shuffled in each layer; float64 [L, E]."""
  ranks = np.arange(1, experts + 1, dtype=np.float64)
  return rng.permuted(np.tile(ranks**-exponent, (layers, 1)), axis=1)


def run_loads(
  workdir: pathlib.Path, window: int
) -> tuple[np.ndarray, np.ndarray]:
  """Shares [L, E] over two neighbouring windows of a run's last records.

  Raises:
    ValueError: the run has not so many records with `expert_load`.
  """
  records = read_jsonl(workdir / "metrics.jsonl")
  loads = [r["expert_load"] for r in records if r.get("expert_load")]
  if len(loads) < 2 * window:
    raise ValueError(
      f"{workdir}/metrics.jsonl has {len(loads)} records with expert_load;"
      f" --window={window} needs {2 * window}. Make it smaller."
    )
  fitted = np.mean(loads[-2 * window : -window], axis=0)
  return fitted, np.mean(loads[-window:], axis=0)


def compare(
  fitted: np.ndarray, measured: np.ndarray, shape: Shape, groups: int
) -> dict[str, Any]:
  """Busiest device over the mean, averaged over layers, by placement.

  Args:
    fitted: [L, E], loads that placements are made from.
    measured: [L, E], loads that they meet.
    shape: the setting.
    groups: routing groups.

  Returns:
    `PLACEMENTS` -> mean over layers, None without an equal number of slots a
    device; and what the module's docstring names.
  """
  layers, experts = fitted.shape
  slots = experts + shape.redundant
  sizes = {
    "num_groups": groups,
    "num_nodes": shape.nodes,
    "num_devices": shape.devices,
  }
  eplb = place_experts(fitted, num_replicas=slots, **sizes)
  placements = dict.fromkeys(PLACEMENTS)
  if experts % shape.devices == 0:
    order = np.tile(np.arange(experts), (layers, 1))
    placements["contiguous"] = make_placement(order, experts, shape.devices)
    packed = place_experts(fitted, num_replicas=experts, **sizes)
    placements["packed"] = packed
  repeated = np.tile(np.arange(slots) % experts, (layers, 1))
  placements["repeated"] = make_placement(repeated, experts, shape.devices)
  placements["eplb"] = eplb
  result: dict[str, Any] = {
    name: None if p is None else float(p.max_over_mean(measured).mean())
    for name, p in placements.items()
  }
  # Replicas of the heaviest are given out in the best way (a test says so);
  # one expert a device shows what the heaviest of them carries.
  alone = place_experts(
    measured,
    num_replicas=slots,
    num_groups=1,
    num_nodes=1,
    num_devices=slots,
  ).device_loads(measured)
  heaviest = alone.max(axis=1) * shape.devices / measured.sum(axis=1)
  naive = result["contiguous"] or result["repeated"]
  return {
    "shape": dataclasses.asdict(shape),
    "mode": "global" if groups % shape.nodes else "hierarchical",
    "slots_per_device": slots // shape.devices,
    **result,
    "fitted": float(eplb.max_over_mean(fitted).mean()),
    "worst_layer": float(eplb.max_over_mean(measured).max()),
    "bound": float(np.maximum(heaviest, 1).mean()),
    "gain": naive / result["eplb"],
  }


def zipf_cases(
  *, layers: int, tokens: int, history: int, seed: int
) -> list[dict[str, Any]]:
  """`compare` for every exponent and shape.

  Args:
    layers: L, each with popularities of its own.
    tokens: of a batch.
    history: batches that a placement is made from.
    seed: of popularities and tokens.
  """
  cases = []
  for exponent in EXPONENTS:
    rng = np.random.default_rng(seed)
    popularity = zipf_popularity(rng, exponent, layers, EXPERTS)
    fitted, measured = (
      zipf_load(rng, popularity, tokens=n, choices=CHOICES)
      for n in (history * tokens, tokens)
    )
    busiest = measured.max(axis=1) / measured.mean(axis=1)
    for shape in SHAPES:
      case = compare(fitted, measured, shape, GROUPS)
      load = {"exponent": exponent, "busiest_expert": float(busiest.mean())}
      cases.append({**load, **case})
  return cases


def table(cases: list[dict[str, Any]]) -> str:
  """The cases as text, a line each."""
  head = ("load", "busiest expert", "shape", *PLACEMENTS, "bound", "gain")
  lines = [head]
  for case in cases:
    load = f"Zipf {case['exponent']:g}" if "exponent" in case else "run"
    figures = [case[name] for name in (*PLACEMENTS, "bound", "gain")]
    shown = ["-" if x is None else f"{x:.2f}" for x in figures]
    busiest = f"{case['busiest_expert']:.2f}"
    lines.append((load, busiest, case["shape"]["name"], *shown))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True))
    for line in lines
  )


def plot(cases: list[dict[str, Any]], path: str) -> None:
  """Busiest device over the mean by exponent, a panel for each shape."""
  from matplotlib import pyplot

  names = list(dict.fromkeys(case["shape"]["name"] for case in cases))
  figure, panels = pyplot.subplots(
    1,
    len(names),
    figsize=(2.8 * len(names), 3.6),
    layout="constrained",
    sharey=True,
    squeeze=False,
  )
  for axes, name in zip(panels[0], names, strict=True):
    own = [case for case in cases if case["shape"]["name"] == name]
    exponents = [case["exponent"] for case in own]
    for i, placement in enumerate(PLACEMENTS):
      values = [case[placement] for case in own]
      if None not in values:
        axes.plot(exponents, values, f"C{i}o-", label=placement)
    bounds = [case["bound"] for case in own]
    axes.plot(exponents, bounds, "k--", lw=1, label="bound")
    axes.set_title(f"{name}, {own[0]['shape']['redundant']} redundant")
    axes.set_xlabel("Zipf exponent")
    axes.legend(fontsize=8, loc="upper left")
  panels[0, 0].set_yscale("log")
  panels[0, 0].set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
  panels[0, 0].minorticks_off()
  panels[0, 0].set_ylabel("busiest device's load over the mean")
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
  """Reads the flags, compares, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--layers", type=int, default=16, help="drawn and averaged over")
  add("--tokens", type=int, default=4096, help="of a batch, in each layer")
  add("--history", type=int, default=8, help="batches that placements know")
  add("--seed", type=int, default=0)
  add("--workdir", type=pathlib.Path, help="a run whose loads to use instead")
  add("--window", type=int, default=20, help="records that are averaged")
  add("--devices", type=int, default=4, help="with --workdir")
  add("--nodes", type=int, default=1, help="with --workdir")
  add("--groups", type=int, default=1, help="routing groups, with --workdir")
  add("--redundant", type=int, default=4, help="with --workdir")
  add("--output", help="write the JSON here")
  add("--plot", help="write a PNG of the Zipf cases here")
  arguments = parser.parse_args(argv)
  if arguments.workdir:
    fitted, measured = run_loads(arguments.workdir, arguments.window)
    shape = Shape(
      f"EP{arguments.devices}",
      arguments.devices,
      arguments.nodes,
      arguments.redundant,
    )
    busiest = (measured.max(axis=1) / measured.mean(axis=1)).mean()
    case = compare(fitted, measured, shape, arguments.groups)
    cases = [{"busiest_expert": float(busiest), **case}]
  else:
    cases = zipf_cases(
      layers=arguments.layers,
      tokens=arguments.tokens,
      history=arguments.history,
      seed=arguments.seed,
    )
    if arguments.plot:
      plot(cases, arguments.plot)
  print(table(cases))
  if arguments.output:
    result = interleave.circumstances(("numpy",), os.cpu_count() or 1)
    del result["threads"], result["load_average"]  # nothing is timed
    text = json.dumps({**result, "cases": cases}, indent=2) + "\n"
    pathlib.Path(arguments.output).write_text(text)


if __name__ == "__main__":
  main()
