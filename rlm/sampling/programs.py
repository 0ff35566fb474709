"""The sampler's compiled programs, with the slots divided among devices.

Each device holds its share of the slots and runs the decode loop over them by
itself, waiting for no other; only prefilled prompts are handed round. A small
model's step is a chain of small operations, of which a CPU runs one at a time:
two of its cores then serve as two devices (CHANGELOG.md has figures).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlm.models.transformer import Transformer
from rlm.sampling import loop
from rlm.sampling.config import SamplingConfig
from rlm.sampling.draw import argmax_tokens, draw_tokens
from rlm.sampling.filters import filter_logits


class Programs(NamedTuple):
  """Jitted; as the functions of `loop`, whose sizes are set.

  Attributes:
    start: slots -> Slots without requests; static.
    prefill: (variables, tokens, lengths) -> Prefilled, whole on each device.
    admit: (slots, prefilled, rows, key_data) -> Slots; slots are donated.
    decode: (variables, slots, max_steps, min_live) -> Slots, Drawn; slots are
      donated, min_live is of a device's share, and `steps` and `finite` of
      Drawn have one entry per device.
  """

  start: Callable
  prefill: Callable
  admit: Callable
  decode: Callable


@functools.lru_cache(maxsize=16)
def make_programs(
  model: Transformer,
  sampling: SamplingConfig,
  mesh: Mesh,
  *,
  capacity: int,
  steps_per_call: int,
  stop_tokens: tuple[int, ...],
  pad_token: int,
) -> Programs:
  """The programs of one size of everything, compiled on first use.

  Equal samplers share them: a recipe makes one for every evaluation, and
  tracing them again would take longer than many an evaluation's decoding.

  Args:
    model: the Transformer.
    sampling: how to draw.
    mesh: of `rlm.parallel.mesh.data_mesh`.
    capacity: tokens that a slot has room for, prompt included.
    steps_per_call: decode steps of a call at most.
    stop_tokens: ids that end a completion.
    pad_token: id that fills rows after their end.
  """
  divide = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
  rows: Any = P("data")  # the leading axis of all that Slots holds
  columns: Any = P(None, "data")
  routes: Any = P(None, None, "data")

  def start(slots):
    return loop.empty_slots(model, slots, capacity)

  def prefill(variables, tokens, lengths):
    """Each device runs its share of the prompts and receives the others'."""
    mine = loop.prefill(model, variables, tokens, lengths, capacity)
    gather = functools.partial(jax.lax.all_gather, axis_name="data", tiled=True)
    return loop.Prefilled(
      cache=jax.tree.map(gather, mine.cache),
      hidden=gather(mine.hidden),
      expert_ids=gather(mine.expert_ids, axis=1),
    )

  def decode(variables, slots, max_steps, min_live):
    slots, drawn = loop.decode_tokens(
      model,
      variables,
      slots,
      max_steps,
      min_live,
      draw=functools.partial(_draw, sampling),
      max_new_tokens=sampling.max_new_tokens,
      buffer_steps=steps_per_call,
      stop_tokens=stop_tokens,
      pad_token=pad_token,
    )
    # Devices need not take equally many steps.
    drawn = drawn._replace(steps=drawn.steps[None], finite=drawn.finite[None])
    return slots, drawn

  divided_prefill = divide(prefill, in_specs=(P(), rows, rows), out_specs=P())
  divided_admit = divide(
    loop.admit, in_specs=(rows, P(), rows, rows), out_specs=rows
  )
  divided_decode = divide(
    decode,
    in_specs=(P(), rows, P(), P()),
    out_specs=(rows, loop.Drawn(columns, columns, routes, rows, rows)),
  )
  # Said for the outputs too, or one device would call its slots undivided,
  # which is another compilation.
  kept = NamedSharding(mesh, rows)
  return Programs(
    start=jax.jit(start, static_argnums=0, out_shardings=kept),
    prefill=jax.jit(divided_prefill),
    admit=jax.jit(divided_admit, donate_argnums=0, out_shardings=kept),
    decode=jax.jit(
      divided_decode, donate_argnums=1, out_shardings=(kept, None)
    ),
  )


def _draw(sampling, logits, uniforms):
  """loop.Draw by config; the choice between greedy and not is static."""
  if sampling.temperature == 0:
    return argmax_tokens(logits), jnp.zeros_like(uniforms)
  logits = filter_logits(
    logits,
    temperature=sampling.temperature,
    top_k=sampling.top_k,
    top_p=sampling.top_p,
  )
  return draw_tokens(logits, uniforms)
