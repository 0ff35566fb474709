"""Sampling speed of rlm and of transformers' DeepseekV3, tokens per second.

  python -m tools.bench_sampling --config=configs/r1/laptop.py \
    --batch_size 64 --precision float32 mixed --output=sampling.json

needs the extra `parity`; `--alone` measures rlm without it. Both sides complete
the same prompts, all of one length, by as many tokens at temperature 1, prefill
included; ours also returns log-probs and routes. No row of torch's can end
early; a row of ours that draws the end token keeps its slot to the end, so that
both sides take as many steps with as many rows, and those are counted. `mixed`
is bfloat16 compute over float32 parameters on our side, and the faster of
autocast and bfloat16 weights on torch's. Torch runs eagerly, in the fastest of
its attention and expert implementations, by `generate` or by a plain loop over
its cache. Rounds alternate; the ratio is that of the medians. Run it on an idle
machine.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments import launch
from rlm.models.config import ModelConfig
from rlm.models.transformer import Transformer
from rlm.parallel.config import replicas
from rlm.sampling.config import SamplingConfig
from rlm.sampling.sampler import Sampler
from tools import interleave
from tools.bench_train import load_model_config


def random_prompts(cfg: ModelConfig, rows: int, length: int) -> np.ndarray:
  """int32 [rows, length] of ids in use; ids 0 and 1 are pad and end."""
  rng = np.random.default_rng(0)
  return rng.integers(2, cfg.n_vocab_used, (rows, length), dtype=np.int32)


def rlm_generate(
  cfg: ModelConfig,
  prompts: np.ndarray,
  new_tokens: int,
  *,
  devices: int,
  variables: Any = None,
) -> Callable[[], None]:
  """A function that completes all prompts once; None is random variables."""
  model = Transformer(cfg)
  rows, length = prompts.shape
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), prompts.shape)
  if variables is None:
    variables = jax.jit(model.init)(
      jax.random.key(0), prompts, positions, np.ones_like(prompts)
    )
  sampling = SamplingConfig(
    temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens
  )
  sampler = Sampler(
    model,
    sampling,
    slots=rows,
    prompt_length=length,
    mesh=replicas(devices),
    eos_token=1,
    pad_token=0,
  )
  requests = prompts.tolist()
  keys = jax.random.split(jax.random.key(1), rows)

  def run():
    completions = sampler.generate(variables, requests, keys)
    if completions.lengths.max() != new_tokens:
      raise RuntimeError("Every row ended early: fewer steps were timed.")

  return run


def torch_generate(
  cfg: ModelConfig,
  prompts: np.ndarray,
  new_tokens: int,
  *,
  rounds: int,
  models: Mapping[str, Callable[[], Any]],
) -> tuple[Callable[[], None], dict[str, object]]:
  """The same with transformers, in the fastest variant for these shapes.

  Args:
    cfg: our config; its dtype says the precision.
    prompts: int32 [rows, length].
    new_tokens: of each row.
    rounds: repetitions of each variant, to pick one.
    models: name of each variant -> what makes its model.

  Returns:
    One repetition, and what was tried.
  """
  import torch

  ids = torch.from_numpy(prompts.astype(np.int64))

  def by_loop(model, autocast):
    with (
      torch.inference_mode(),
      torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
      out = model(ids, use_cache=True, logits_to_keep=1)
      for step in range(new_tokens):
        probs = out.logits[:, -1].float().softmax(-1)
        token = torch.multinomial(probs, 1)
        if step + 1 < new_tokens:
          out = model(
            token, past_key_values=out.past_key_values, use_cache=True
          )

  def by_generate(model, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
      tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        pad_token_id=0,
      )
    if tokens.shape != (ids.shape[0], ids.shape[1] + new_tokens):
      raise RuntimeError(f"generate gave tokens of shape {tokens.shape}.")

  ways = {"loop": by_loop, "generate": by_generate}
  precisions = {"float32": (torch.float32, False)}
  if cfg.dtype == "bfloat16":
    precisions = {
      "autocast": (torch.float32, True),
      "bfloat16 weights": (torch.bfloat16, False),
    }

  @functools.cache  # both ways share one
  def model_of(variant, precision):
    return models[variant]().to(precisions[precision][0]).eval()

  def make(variant, precision, way):
    model, autocast = model_of(variant, precision), precisions[precision][1]
    return lambda: ways[way](model, autocast)

  variants = itertools.product(models, precisions, ways)
  return interleave.fastest_usable(
    {",".join(names): functools.partial(make, *names) for names in variants},
    rounds=rounds,
  )


def compare(cfg: ModelConfig, rows: int, arguments: argparse.Namespace) -> dict:
  """One case: both sides at one batch size and one precision."""
  prompts = random_prompts(cfg, rows, arguments.prompt_length)
  new_tokens = arguments.new_tokens
  ours = rlm_generate(cfg, prompts, new_tokens, devices=arguments.devices)
  rivals, result = {"rlm": ours}, {}
  if not arguments.alone:
    from tools import torch_deepseek

    rivals["torch"], result["torch_variants"] = torch_generate(
      cfg,
      prompts,
      new_tokens,
      rounds=arguments.variant_rounds,
      models=torch_deepseek.random_models(cfg),
    )
  measured = interleave.rates(
    rivals, tokens=rows * new_tokens, rounds=arguments.rounds
  )
  for name, rounds in measured.items():
    result[name] = interleave.summary(rounds)
  if not arguments.alone:
    median = {n: statistics.median(rounds) for n, rounds in measured.items()}
    result["ratio"] = median["rlm"] / median["torch"]
  return result


def main() -> None:
  """Reads the flags, measures every case, prints JSON."""
  launch.use_huge_pages()  # as a run does; it serves both sides
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--config", required=True, help="a config file with a model")
  add("--batch_size", type=int, nargs="+", default=[64], help="rows")
  add("--experts", type=int, help="routed experts; default: the config's")
  add("--precision", nargs="+", default=["float32"], metavar="float32|mixed")
  add("--prompt_length", type=int, default=24)
  add("--new_tokens", type=int, default=40)
  add("--rounds", type=int, default=7)
  add("--variant_rounds", type=int, default=1, help="rounds to pick torch's")
  add("--threads", type=int, default=os.cpu_count(), help="torch's threads")
  add("--devices", type=int, default=2, help="that share our slots")
  add("--alone", action="store_true", help="without torch")
  add("--output", help="also write the JSON here")
  arguments = parser.parse_args()
  dtypes = {"float32": "float32", "mixed": "bfloat16"}
  if set(arguments.precision) - set(dtypes):
    parser.error(f"--precision takes {', '.join(dtypes)}")
  jax.config.update("jax_num_cpu_devices", arguments.devices)
  packages = ("jax", "flax")
  if not arguments.alone:
    import torch

    torch.set_num_threads(arguments.threads)
    packages += ("torch", "transformers")
  cfg = load_model_config(arguments.config)
  experts = arguments.experts or cfg.n_routed_experts
  cases = []
  for rows in arguments.batch_size:
    for precision in arguments.precision:
      case = dataclasses.replace(
        cfg,
        n_routed_experts=experts,
        num_nextn_predict_layers=0,
        dtype=dtypes[precision],
        param_dtype="float32",
      )
      shape = {
        "experts": experts,
        "precision": precision,
        "batch_size": rows,
        "prompt_length": arguments.prompt_length,
        "new_tokens": arguments.new_tokens,
        "devices": arguments.devices,
      }
      cases.append({**shape, **compare(case, rows, arguments)})
  result = interleave.circumstances(packages, arguments.threads)
  interleave.report({**result, "cases": cases}, arguments.output)


if __name__ == "__main__":
  main()
