r"""What a layer of experts costs: by form, by transport, as experts grow.

  python -m tools.bench_moe --output=moe.json

Forward and backward of the routed experts, in milliseconds, rounds of all cases
in turn, median of --rounds:

  forms       one device: the grouped product, dense over every expert, and the
              bound: one product of as many rows as there are choices, by
              matrices of one expert's size;
  growing     experts at fixed active parameters (K and their width stay); flat
              is the goal;
  transports  the experts divided among --devices, each with --tokens tokens.
              On a CPU the devices share its cores, and "ragged" cannot run.

And of each transport the bytes that a device sends for a token, counted from
the plan of random routes, over the lower bound: one row to each other device
that holds any of the token's experts.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
from jax.sharding import PartitionSpec as P
from rich.table import Table

from rlm.kernels.backend import backend
from rlm.kernels.product import einsum
from rlm.models.experts import routed_experts
from rlm.parallel.config import MeshConfig
from rlm.parallel.expert import exchanged, make_exchange
from rlm.parallel.mesh import make_mesh

Case = Callable[[], Any]


def make_inputs(rng, tokens, hidden, width, experts, k, dtype):
  """x, gates, expert_ids and weights with random routes."""

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape) / shape[-1] ** 0.5, dtype)

  scores = rng.random((tokens, experts))
  ids = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
  weights = (
    normal(experts, hidden, width),
    normal(experts, hidden, width),
    normal(experts, width, hidden),
  )
  gates = jnp.full((tokens, k), 1 / k, jnp.float32)
  return normal(tokens, hidden), gates, jnp.asarray(ids), weights


def training_case(run: Callable, x, gates, ids, weights) -> Case:
  """Forward and backward of `run`, jitted; a call waits for the result."""

  def loss(x, gates, weights):
    return jnp.square(run(x, gates, ids, weights).astype(jnp.float32)).sum()

  step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  return lambda: jax.block_until_ready(step(x, gates, weights))


def product_bound(x, gates, ids, weights) -> Case:
  """As many rows by one expert's matrices: no choice, no order, no sum."""
  del gates
  rows = jnp.repeat(x, ids.shape[1], axis=0)
  one = tuple(w[0] for w in weights)

  def loss(rows, weights):
    gate, up, down = weights
    h = jax.nn.silu(einsum("nd,df->nf", rows, gate)) * einsum(
      "nd,df->nf", rows, up
    )
    return jnp.square(einsum("nf,fd->nd", h.astype(rows.dtype), down)).sum()

  step = jax.jit(jax.grad(loss, argnums=(0, 1)))
  return lambda: jax.block_until_ready(step(rows, one))


def divided_case(
  transport: str, devices: int, x, gates, ids, weights
) -> tuple[Case, float]:
  """The experts over `devices`; and bytes sent a token over the lower bound."""
  n_experts, k = weights[0].shape[0], ids.shape[1]
  cfg = MeshConfig(
    data=1, fsdp=1, expert=devices, context=1, tensor=1, transport=transport
  )
  mesh = make_mesh(cfg, "--devices")
  exchange = make_exchange(
    cfg, n_group=1, topk_group=1, n_experts=n_experts, k=k
  )
  rows = len(x) // devices * k

  def local(x, gates, ids, weights):
    def run(weights, *args):
      return routed_experts(*args, weights, rows=rows)

    return exchanged(exchange, run, weights, x, gates, ids, n_experts)[0]

  by_expert = P("expert")
  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(by_expert, by_expert, by_expert, (by_expert,) * 3),
    out_specs=by_expert,
    check_vma=False,
  )
  case = training_case(run, x, gates, ids, weights)
  (level,) = exchange.levels
  per_device = len(x) // devices
  owner = np.asarray(ids) // (n_experts // devices)
  home = np.arange(len(x)) // per_device
  remote = sum(
    len(set(row) - {here})
    for row, here in zip(owner.tolist(), home.tolist(), strict=True)
  ) / len(x)
  sent = {
    "gather": devices - 1,
    "padded": level.slots(per_device) * (devices - 1) / per_device,
    "ragged": remote,  # rows; their ids and gates are 8 K bytes beside D * 2
  }[transport]
  itemsize = x.dtype.itemsize
  beside = sent * 8 * k / (x.shape[1] * itemsize)
  return case, (sent + beside) / remote


def measure(cases: dict[str, Case], rounds: int) -> dict[str, float]:
  """Median milliseconds of each, all in turn."""
  for case in cases.values():
    case()  # compiles
  times: dict[str, list[float]] = {name: [] for name in cases}
  for _ in range(rounds):
    for name, case in cases.items():
      began = time.perf_counter()
      case()
      times[name].append(1e3 * (time.perf_counter() - began))
  return {name: statistics.median(t) for name, t in times.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Reads the command, measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--tokens", type=int, default=1024, help="of a device")
  add("--hidden", type=int, default=256)
  add("--width", type=int, default=128, help="of an expert")
  add("--experts", type=int, default=16)
  add("--k", type=int, default=4, help="experts of a token")
  add("--growing", type=int, nargs="*", default=[8, 16, 32, 64])
  add("--devices", type=int, default=4)
  add("--dtype", default="float32", choices=["float32", "bfloat16"])
  add("--rounds", type=int, default=7)
  add("--output", help="JSON file")
  a = parser.parse_args(argv)
  if jax.device_count() < a.devices:
    parser.error(
      f"--devices={a.devices}, but jax has {jax.device_count()}. On a CPU set"
      f" JAX_NUM_CPU_DEVICES={a.devices}."
    )
  rng = np.random.default_rng(0)
  inputs = functools.partial(
    make_inputs, rng, hidden=a.hidden, width=a.width, k=a.k, dtype=a.dtype
  )
  one = inputs(a.tokens, experts=a.experts)
  dense = functools.partial(routed_experts, implementation="dense")
  cases = {
    "form grouped": training_case(routed_experts, *one),
    "form dense": training_case(dense, *one),
    "bound": product_bound(*one),
  }
  for experts in a.growing:
    grown = inputs(a.tokens, experts=experts)
    cases[f"{experts} experts"] = training_case(routed_experts, *grown)
  many = inputs(a.tokens * a.devices, experts=a.experts)
  ratios = {}
  for transport in ("gather", "padded", "ragged"):
    case, ratios[transport] = divided_case(transport, a.devices, *many)
    if transport != "ragged" or backend() != "cpu":
      cases[f"transport {transport}"] = case
  milliseconds = measure(cases, a.rounds)
  table = Table(title=f"{jax.devices()[0].device_kind}, {a.dtype}")
  table.add_column("case")
  table.add_column("ms", justify="right")
  table.add_column("of the bound", justify="right")
  for name, ms in milliseconds.items():
    rows = a.devices if name.startswith("transport") else 1
    share = ms / (rows * milliseconds["bound"])
    table.add_row(name, f"{ms:.2f}", f"{share:.2f}")
  rich.print(table)
  for transport, ratio in ratios.items():
    print(f"{transport}: {ratio:.2f} times the least bytes that must be sent")
  result = {
    "arguments": vars(a),
    "device": jax.devices()[0].device_kind,
    "milliseconds": milliseconds,
    "sent_over_least": ratios,
  }
  if a.output:
    with open(a.output, "w") as file:
      json.dump(result, file, indent=1)
  return result


if __name__ == "__main__":
  main()
