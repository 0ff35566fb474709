"""rlm against transformers on the CPU: training, prefill and decoding.

  python -m tools.bench_vs_transformers --output=vs.json --plot=decode.png

needs the extra `parity`. A small model of V3's shape and one of Qwen2's are
made once and saved as published folders, from which both sides load the same
float32 weights; their logits are compared first. Measured are training steps
(as tools/bench_train), prefill of a batch of prompts up to the logits of their
last tokens, and batched sampling (as tools/bench_sampling, prefill of short
prompts included). Then, of V3's shape, the cost of a decoded token by length of
context: ours absorbed, ours expanded (keys and values of all heads made anew
from the latent cache at every step) and transformers'. Torch runs eagerly, in
the fastest of its attention and expert implementations; rlm divides the rows
among --devices. Rounds alternate; ratios are of medians. Run it on an idle
machine.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import rlm
from experiments import launch
from rlm.checkpoint.export import export_published
from rlm.checkpoint.initial import random_variables
from rlm.checkpoint.published_names import leaf_name
from rlm.models.config import ModelConfig
from rlm.models.layout import make_layout
from rlm.models.transformer import Transformer, head_kernel
from rlm.parallel.config import replicas
from rlm.sampling import loop
from tools import (
  bench_sampling,
  bench_train,
  decode_by_context,
  interleave,
)


def _config(**fields: Any) -> ModelConfig:
  """Of a small model, by the fields of a published config.json."""
  shared = dict(
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=6,
    intermediate_size=768,
    num_attention_heads=8,
    rope_theta=10000.0,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    initializer_range=0.05,
    tie_word_embeddings=False,
  )
  cfg = ModelConfig.from_hf(
    shared | fields, dtype="float32", param_dtype="float32"
  )
  return dataclasses.replace(
    cfg, remat="none", unroll_layers=True, attention_chunk=0, logits_chunk=0
  )


MODELS = {
  "v3": _config(
    model_type="deepseek_v3",
    num_nextn_predict_layers=0,
    first_k_dense_replace=1,
    moe_intermediate_size=96,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
  ),
  "qwen2": _config(model_type="qwen2", num_key_value_heads=2),
}


def save_model(cfg: ModelConfig, folder: pathlib.Path) -> None:
  """A published folder of random float32 weights."""
  variables = random_variables(Transformer(cfg), jax.random.key(0))
  leaves = {
    leaf_name(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
  }

  def read(leaf, tensor):
    part = leaves[leaf][tensor.place]
    return part.T if tensor.transposed else part

  export_published(folder, cfg, variables, read, stored="float32")


def torch_models(
  cfg: ModelConfig, folder: pathlib.Path, experts: Sequence[str]
) -> dict[str, Callable[[], Any]]:
  """What loads the folder's model by transformers, float32, in each variant.

  Args:
    cfg: the model's sizes.
    folder: its published folder.
    experts: implementations of the experts to try; a dense model has none.

  Returns:
    Name of each variant -> what makes its model.
  """
  import torch
  import transformers

  from tools import torch_deepseek

  load = functools.partial(
    transformers.AutoModelForCausalLM.from_pretrained,
    folder,
    dtype=torch.float32,
  )
  if cfg.is_dense:
    return {
      f"attention={attention}": functools.partial(
        load, attn_implementation=attention
      )
      for attention in torch_deepseek.ATTENTION
    }
  return {
    str(variant): functools.partial(
      load,
      attn_implementation=variant.attention,
      experts_implementation=variant.experts,
    )
    for variant in torch_deepseek.VARIANTS
    if variant.experts in experts
  }


def largest_difference(model, variables, make_theirs: Callable) -> float:
  """Of the two sides' logits: they must be one model."""
  import torch

  tokens = bench_train.random_tokens(model.cfg, 2, 64)
  theirs = make_theirs().eval()
  with torch.inference_mode():
    logits = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
  off = float(np.abs(model.logits(variables, tokens) - logits).max())
  if not off < 1e-3:
    raise ValueError(f"the logits of the two sides differ by {off}.")
  return off


def rlm_prefill(model, variables, tokens, *, devices: int):
  """A function that prefills once, cache and last logits."""
  layout = make_layout(model, replicas(devices), "--devices")

  def prefill(variables, tokens):
    length = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    made = loop.prefill(model, variables, tokens, length, tokens.shape[1])
    head = head_kernel(variables, model.cfg)
    return made.cache, loop.next_token_logits(made.hidden, head)

  rows: Any = P("data")
  divided = jax.jit(layout.map(prefill, (P(), rows), rows))
  variables = jax.device_put(variables, layout.everywhere)
  return lambda: jax.block_until_ready(divided(variables, tokens))


def torch_prefill(
  models: Mapping[str, Callable[[], Any]], tokens, *, rounds: int
):
  """The same with transformers in its fastest variant."""
  import torch

  ids = torch.from_numpy(tokens.astype(np.int64))

  def make(make_model):
    model = make_model().eval()

    def run():
      with torch.inference_mode():
        model(ids, use_cache=True, logits_to_keep=1)

    return run

  return interleave.fastest_usable(
    {name: functools.partial(make, m) for name, m in models.items()},
    rounds=rounds,
  )


def measure_model(name: str, folder: pathlib.Path, arguments) -> dict[str, Any]:
  """Training, prefill and sampling of one model."""
  model, variables = rlm.load_checkpoint(folder, dtype="float32")
  cfg = MODELS[name]
  model = Transformer(cfg)
  models = torch_models(cfg, folder, arguments.experts)
  first = next(iter(models.values()))
  result: dict[str, Any] = {
    "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
    "largest_logit_difference": largest_difference(model, variables, first),
  }
  if "train" in arguments.measure:
    tokens = bench_train.random_tokens(cfg, *arguments.train)
    made = {}
    for microbatches in (1, 2, 4):
      rows = len(tokens) // microbatches
      made[f"microbatch_rows={rows}"], _ = bench_train.rlm_steps(
        cfg,
        tokens,
        arguments.steps,
        rows,
        devices=arguments.devices,
        # The step gives its state's memory away.
        variables=jax.tree.map(jnp.copy, variables),
      )
    best, seconds = interleave.fastest(made, rounds=arguments.variant_rounds)
    theirs, _, tried = bench_train.torch_steps(
      cfg,
      tokens,
      arguments.steps,
      rounds=arguments.variant_rounds,
      models=models,
    )
    result["train"] = _race(
      {"rlm": made[best], "torch": theirs},
      tokens.size * arguments.steps,
      arguments.rounds,
      rlm_variants={"variant": best, "seconds": seconds},
      torch_variants=tried,
    )
  if "prefill" in arguments.measure:
    tokens = bench_train.random_tokens(cfg, *arguments.prefill)
    ours = rlm_prefill(model, variables, tokens, devices=arguments.devices)
    theirs, tried = torch_prefill(
      models, tokens, rounds=arguments.variant_rounds
    )
    result["prefill"] = _race(
      {"rlm": ours, "torch": theirs},
      tokens.size,
      arguments.rounds,
      torch_variants=tried,
    )
  if "sampling" in arguments.measure:
    rows, length, new = arguments.sampling
    prompts = bench_sampling.random_prompts(cfg, rows, length)
    ours = bench_sampling.rlm_generate(
      cfg, prompts, new, devices=arguments.devices, variables=variables
    )
    theirs, tried = bench_sampling.torch_generate(
      cfg,
      prompts,
      new,
      rounds=arguments.variant_rounds,
      models=models,
    )
    result["sampling"] = _race(
      {"rlm": ours, "torch": theirs},
      rows * new,
      arguments.rounds,
      torch_variants=tried,
    )
  return result


def _race(rivals, tokens: int, rounds: int, **more) -> dict[str, Any]:
  measured = interleave.rates(rivals, tokens=tokens, rounds=rounds)
  median = {name: statistics.median(r) for name, r in measured.items()}
  return {
    **{name: interleave.summary(r) for name, r in measured.items()},
    **more,
    "ratio": median["rlm"] / median["torch"],
    "load_average": os.getloadavg()[0],
  }


def measure_contexts(folder: pathlib.Path, arguments) -> list[dict[str, Any]]:
  """See tools/decode_by_context.py."""
  _, variables = rlm.load_checkpoint(folder, dtype="float32")
  models = torch_models(MODELS["v3"], folder, arguments.experts)
  theirs = {name: make().eval() for name, make in models.items()}
  return decode_by_context.measure(
    Transformer(MODELS["v3"]), variables, theirs, arguments
  )


def main() -> None:
  """Reads the flags, measures, prints JSON, draws the plot."""
  launch.use_huge_pages()  # as a run does; it serves both sides
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
  parts = ("train", "prefill", "sampling", "contexts")
  add("--measure", nargs="+", default=parts, choices=parts)
  # batched_mm gathers the matrices of every choice of every token: one training
  # step of these sizes takes 20 s, with the others 0.7 s.
  add("--experts", nargs="+", default=("eager", "grouped_mm"))
  add("--train", type=int, nargs=2, default=(16, 128), help="rows, tokens")
  add("--prefill", type=int, nargs=2, default=(16, 256), help="rows, tokens")
  add(
    "--sampling",
    type=int,
    nargs=3,
    default=(64, 16, 64),
    help="rows, tokens of a prompt, new tokens",
  )
  add("--decode", type=int, nargs=2, default=(16, 16), help="rows, steps")
  add("--contexts", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
  add("--steps", type=int, default=3, help="training steps of one round")
  add("--rounds", type=int, default=7)
  add("--variant_rounds", type=int, default=3, help="to choose variants")
  add("--threads", type=int, default=os.cpu_count(), help="torch's threads")
  add("--devices", type=int, default=2, help="that share our rows")
  add("--plot", help="also draw the cost by context here, a PNG")
  add("--output", help="also write the JSON here")
  arguments = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", arguments.devices)
  import torch

  torch.set_num_threads(arguments.threads)
  result = interleave.circumstances(
    ("jax", "flax", "torch", "transformers"), arguments.threads
  )
  result["precision"], result["devices"] = "float32", arguments.devices
  with tempfile.TemporaryDirectory() as made:
    for name in arguments.models:
      folder = pathlib.Path(made) / name
      save_model(MODELS[name], folder)
      result[name] = measure_model(name, folder, arguments)
      if arguments.output:  # it takes minutes: what is done is kept
        text = json.dumps(result, indent=2)
        pathlib.Path(arguments.output).write_text(text + "\n")
    if "contexts" in arguments.measure and "v3" in arguments.models:
      result["milliseconds_per_step_by_context"] = measure_contexts(
        pathlib.Path(made) / "v3", arguments
      )
  interleave.report(result, arguments.output)
  if arguments.plot and "milliseconds_per_step_by_context" in result:
    points = result["milliseconds_per_step_by_context"]
    decode_by_context.plot(points, arguments.plot)


if __name__ == "__main__":
  main()
