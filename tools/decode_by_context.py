"""What a decoded token costs by length of context, three ways.

Ours absorbed, ours expanded (keys and values of all heads made anew from the
latent cache at every step), and that of transformers over its cache of keys and
values. Part of `tools.bench_vs_transformers`.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rlm.kernels.mla_attention import mla_attention
from rlm.models.cache import write_entry
from rlm.models.layers import linear
from rlm.models.layout import make_layout
from rlm.models.mla import MLA
from rlm.models.transformer import Transformer
from rlm.parallel.config import replicas
from rlm.sampling.config import SamplingConfig
from rlm.sampling.programs import make_programs
from tools import interleave


def expanded_decode(mla: MLA, x, rotations, layer, lengths):
  """`MLA.decode` without absorption: all keys and values made anew."""
  c = mla.cfg
  q_nope, q_rope = mla._queries(*mla._query_input(x), rotations)
  entry = jnp.concatenate(mla._latents(x, rotations), axis=-1)
  layer = write_entry(layer, entry[:, 0], lengths)
  held = layer.swapaxes(1, 2)  # [B, S, C + R]
  kv_latent, k_rope = jnp.split(held, [c.kv_lora_rank], axis=-1)
  kv = linear(kv_latent, mla.kv_b)
  kv = kv.reshape(*held.shape[:2], c.num_attention_heads, -1)
  k_nope, v = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)
  slots = jnp.arange(held.shape[1], dtype=jnp.int32)[None]
  position = lengths[:, None]
  seen = (slots <= position).astype(jnp.int32)
  out, _ = mla_attention(
    q_nope,
    q_rope,
    k_nope,
    k_rope,
    v,
    position,
    jnp.broadcast_to(slots, seen.shape),
    jnp.ones_like(position),
    seen,
    scale=mla._scale,
  )
  return mla._out(out), layer


def _expand(next_function, args, kwargs, context):
  if isinstance(context.module, MLA) and context.method_name == "decode":
    return expanded_decode(context.module, *args, **kwargs)
  return next_function(*args, **kwargs)


def rlm_decode(
  model, variables, rows, context, steps, *, devices: int, expanded: bool
) -> Callable[[], None]:
  """A function that decodes `steps` tokens a row after `context` of them."""
  layout = make_layout(model, replicas(devices), "--devices")
  sampling = SamplingConfig(
    temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=steps + 1
  )
  # Not the cached programs, whose trace does not know which form it holds.
  programs = make_programs.__wrapped__(
    layout,
    sampling,
    capacity=context + steps,
    steps_per_call=steps,
    stop_tokens=(),
    pad_token=0,
  )
  variables = jax.device_put(variables, layout.everywhere)
  slots = programs.start(rows)
  by_row = slots.live.sharding
  full = jax.device_put(np.full(rows, context, np.int32), by_row)
  zero = jax.device_put(np.zeros(rows, np.int32), by_row)
  live = jax.device_put(np.ones(rows, bool), by_row)

  def run():
    nonlocal slots
    begin = slots.replace(
      cache=slots.cache.replace(lengths=full + 0),
      index=zero + 0,
      live=live & True,
    )
    slots, drawn = programs.decode(variables, begin, steps, 1)
    if int(drawn.steps.min()) != steps:
      raise RuntimeError(f"{drawn.steps} of {steps} steps were taken.")

  if expanded:
    with nn.intercept_methods(_expand):
      run()  # traces
  return run


def torch_decode(model, rows, context, steps) -> Callable[[], None]:
  """The same with a transformers model, over its cache."""
  import torch

  rng = np.random.default_rng(0)
  used = model.config.vocab_size
  ids = torch.from_numpy(rng.integers(used, size=(rows, context)))

  with torch.inference_mode():
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

  @torch.inference_mode()
  def run():
    token = ids[:, :1]
    for _ in range(steps):
      logits = model(token, past_key_values=cache, use_cache=True).logits
      token = torch.multinomial(logits[:, -1].softmax(-1), 1)
    cache.crop(-steps)

  return run


def measure(
  model: Transformer,
  variables: Any,
  torch_models: dict[str, Any],
  arguments: Any,
) -> list[dict[str, Any]]:
  """Milliseconds per step of all rows, at each context; medians.

  Args:
    model: with latent attention.
    variables: its variables.
    torch_models: the same model by transformers, by name of the variant.
    arguments: `decode` (rows, steps), `contexts`, `devices`, `rounds`.
  """
  rows, steps = arguments.decode
  points = []
  for context in arguments.contexts:
    rivals = {
      form: rlm_decode(
        model,
        variables,
        rows,
        context,
        steps,
        devices=arguments.devices,
        expanded=form == "expanded",
      )
      for form in ("absorbed", "expanded")
    }
    made = {
      n: torch_decode(m, rows, context, steps) for n, m in torch_models.items()
    }
    best, _ = interleave.fastest(made, rounds=1)
    rivals["transformers"] = made[best]
    measured = interleave.rates(rivals, tokens=steps, rounds=arguments.rounds)
    points.append(
      {
        "context": context,
        "rows": rows,
        "torch_variant": best,
        **{n: 1e3 / statistics.median(r) for n, r in measured.items()},
      }
    )
  return points


def plot(points: list[dict[str, Any]], path: str) -> None:
  """Milliseconds per step of all rows against the context."""
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
  contexts = [point["context"] for point in points]
  for name, label in (
    ("transformers", "transformers"),
    ("expanded", "rlm, expanded"),
    ("absorbed", "rlm, absorbed"),
  ):
    axes.plot(contexts, [p[name] for p in points], marker="o", label=label)
  axes.set_xlabel("tokens of context")
  axes.set_ylabel(f"ms per step of {points[0]['rows']} rows")
  axes.set_ylim(bottom=0)
  axes.legend()
  figure.savefig(path, dpi=150)
