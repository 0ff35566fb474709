"""The sampler's compiled programs, with the slots divided among devices.

Each device holds its share of the slots and runs the decode loop over them.
Replicas wait for no other; only prefilled prompts are handed round. A small
model's step is a chain of small operations, of which a CPU runs one at a time:
two of its cores then serve as two devices (CHANGELOG.md has figures). Devices
that divide the weights or experts among them decode in step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlm.models.cache import TokenCache
from rlm.models.layout import Layout
from rlm.parallel.config import ROWS
from rlm.parallel.sharding import shardings
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
  layout: Layout,
  sampling: SamplingConfig,
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
    layout: the model on its mesh.
    sampling: how to draw.
    capacity: tokens that a slot has room for, prompt included.
    steps_per_call: decode steps of a call at most.
    stop_tokens: ids that end a completion.
    pad_token: id that fills rows after their end.
  """
  model, shard = layout.model, layout.shard
  everywhere: Any = P()
  rows: Any = P(ROWS)  # the leading axis of all that Slots holds
  columns: Any = P(None, ROWS)
  routes: Any = P(None, None, ROWS)
  # Keys and values of heads that are divided are cached where their heads are.
  width = None if model.cfg.has_latent_attention else "tensor"
  rows_of_layers: Any = P(ROWS, width)
  layers: Any = P(None, width)
  held = TokenCache(rows_of_layers, rows)
  slots_specs = loop.Slots(held, rows, rows, rows, rows)
  whole_rows = loop.Prefilled(
    TokenCache(layers, everywhere), everywhere, everywhere
  )

  def start(slots):
    return loop.empty_slots(model, slots, capacity)

  def prefill(variables, tokens, lengths):
    """Each device runs its share of the prompts and receives the others'."""
    mine = loop.prefill(model, variables, tokens, lengths, capacity)
    return loop.Prefilled(
      cache=jax.tree.map(lambda x: shard.gather_rows(x, 0), mine.cache),
      hidden=shard.gather_rows(mine.hidden, 0),
      expert_ids=shard.gather_rows(mine.expert_ids, 1),
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

  def divided_prefill(variables, tokens, lengths):
    specs = (layout.specs(variables), rows, rows)
    return layout.map(prefill, specs, whole_rows)(variables, tokens, lengths)

  def divided_decode(variables, slots, max_steps, min_live):
    drawn = loop.Drawn(columns, columns, routes, rows, rows)
    return layout.map(
      decode,
      (layout.specs(variables), slots_specs, P(), P()),
      (slots_specs, drawn),
    )(variables, slots, max_steps, min_live)

  # Said for the outputs too, or one device would call its slots undivided,
  # which is another compilation.
  kept = shardings(layout.mesh, slots_specs)
  return Programs(
    start=jax.jit(start, static_argnums=0, out_shardings=kept),
    prefill=jax.jit(divided_prefill),
    admit=jax.jit(
      layout.map(
        loop.admit, (slots_specs, whole_rows, rows, rows), slots_specs
      ),
      donate_argnums=0,
      out_shardings=kept,
    ),
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
