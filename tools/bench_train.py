"""Training speed of rlm and of transformers' DeepseekV3, tokens per second.

  python -m tools.bench_train --config=configs/r1/laptop.py \
    --experts 8 64 --precision float32 mixed --output=train.json

needs the extra `parity`; `--alone` measures rlm without it. Both sides take
the model section of the config (without MTP, which transformers does not
train), the same random tokens, next-token loss, clipping and AdamW with float32
parameters and moments. `mixed` is bfloat16 compute over float32 parameters:
dtype on our side, autocast on torch's. Torch runs eagerly, in the fastest of
its attention and expert implementations on this machine; rlm cuts the batch
into the fastest number of microbatches, and these among --devices. Rounds
alternate; the ratio is that of the medians. Run it on an idle machine.
"""

import argparse
import dataclasses
import functools
import os
import runpy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments import launch
from rlm.config import build
from rlm.losses import global_weights, make_pretrain_loss
from rlm.models.config import ModelConfig
from rlm.models.layout import make_layout
from rlm.models.transformer import Transformer
from rlm.optim.optimizer import OptimizerConfig, make_optimizer
from rlm.parallel.config import replicas
from rlm.train import init_state, make_train_step, split_microbatches
from tools import interleave

ADAMW = OptimizerConfig(
  clip_norm=1.0,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  weight_decay=0.1,
  moment_dtype="float32",
  muon=None,
)
LEARNING_RATE = 1e-3


def load_model_config(path: str) -> ModelConfig:
  """The model of a config file; of a recipe, the one it calls "model"."""
  config = runpy.run_path(path)["get_config"]()
  section = config.model if "model" in config else config.models.model
  return build(ModelConfig, section, "config.model")


def random_tokens(cfg: ModelConfig, rows: int, length: int) -> np.ndarray:
  """int32 [rows, length] of ids in use."""
  rng = np.random.default_rng(0)
  return rng.integers(cfg.n_vocab_used, size=(rows, length), dtype=np.int32)


def rlm_steps(
  cfg: ModelConfig,
  tokens: np.ndarray,
  steps: int,
  microbatch_rows: int,
  *,
  devices: int,
  variables: Any = None,
) -> tuple[Callable[[], None], int]:
  """A function that takes `steps` training steps, and the parameter count.

  They start from `variables`, or from random ones.
  """
  model, tx = Transformer(cfg), make_optimizer(ADAMW)
  rows, length = tokens.shape
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  batch = split_microbatches(
    jax.device_get(
      global_weights(
        {
          "tokens": tokens,
          "positions": positions,
          "segment_ids": np.ones_like(tokens),
          "loss_mask": np.ones(tokens.shape, bool),
        },
        mtp_depth=cfg.num_nextn_predict_layers,
      )
    ),
    microbatch_rows=microbatch_rows,
    num_microbatches=rows // microbatch_rows,
  )
  batch["mtp_weight"] = np.float32(0.3)
  batch["learning_rate"] = np.float32(LEARNING_RATE)
  batch["bias_update_rate"] = np.float32(1e-3)
  if variables is None:
    variables = jax.jit(model.init)(
      jax.random.key(0), tokens, positions, np.ones_like(tokens)
    )
  layout = make_layout(model, replicas(devices), "--devices")
  step = jax.jit(
    make_train_step(
      make_pretrain_loss(
        layout.model,
        train_mtp=cfg.num_nextn_predict_layers > 0,
        balance_weight=1e-4,
      ),
      tx,
      num_microbatches=rows // microbatch_rows,
      ema_decay=None,
      skip_nonfinite=True,
      layout=layout,
    ),
    donate_argnums=0,
    out_shardings=layout.everywhere,
  )
  state = jax.device_put(
    init_state(variables, tx, ema_decay=None), layout.everywhere
  )

  def run():
    nonlocal state
    for _ in range(steps):
      state, metrics = step(state, batch, jax.random.key(0))
    jax.block_until_ready((state, metrics))

  return run, sum(x.size for x in jax.tree.leaves(variables["params"]))


def torch_steps(
  cfg: ModelConfig,
  tokens: np.ndarray,
  steps: int,
  *,
  rounds: int,
  models: Mapping[str, Callable[[], Any]],
) -> tuple[Callable[[], None], int, dict[str, object]]:
  """The same with transformers, in the fastest variant for these shapes.

  Args:
    cfg: our config; its dtype says the precision.
    tokens: int32 [rows, length].
    steps: of one repetition.
    rounds: repetitions of each variant, to pick one.
    models: name of each variant -> what makes its model.

  Returns:
    One repetition, the number of parameters, and what was tried.
  """
  import torch

  from tools import torch_deepseek

  ids = torch.from_numpy(tokens.astype(np.int64))

  counts = set()

  def make(make_model):
    model = make_model().train()
    counts.add(torch_deepseek.count_parameters(model))
    optimizer = torch.optim.AdamW(
      model.parameters(),
      lr=LEARNING_RATE,
      betas=(ADAMW.b1, ADAMW.b2),
      eps=ADAMW.eps,
      weight_decay=ADAMW.weight_decay,
      fused=True,
    )
    mixed = cfg.dtype == "bfloat16"

    def run():
      for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
          loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.clip_norm)
        optimizer.step()
      loss.item()

    return run

  run, tried = interleave.fastest_usable(
    {name: functools.partial(make, m) for name, m in models.items()},
    rounds=rounds,
  )
  (count,) = counts
  return run, count, tried


def compare(cfg: ModelConfig, arguments: argparse.Namespace) -> dict:
  """One case: both sides at one number of experts and one precision."""
  tokens = random_tokens(cfg, arguments.batch_size, arguments.length)
  made = {}
  for microbatches in (1, 2, 4):
    rows, rest = divmod(len(tokens), microbatches)
    if not rest:
      name = f"microbatch_rows={rows}"
      made[name], count = rlm_steps(
        cfg, tokens, arguments.steps, rows, devices=arguments.devices
      )
  name, seconds = interleave.fastest(made, rounds=arguments.rounds)
  rivals = {"rlm": made[name]}
  result: dict = {"rlm_variants": {"variant": name, "seconds": seconds}}
  if not arguments.alone:
    from tools import torch_deepseek

    run, torch_count, tried = torch_steps(
      cfg,
      tokens,
      arguments.steps,
      rounds=arguments.rounds,
      models=torch_deepseek.random_models(cfg),
    )
    if count != torch_count:
      raise ValueError(
        f"rlm has {count} parameters and torch {torch_count}: not one model."
      )
    rivals["torch"], result["torch_variants"] = run, tried
  measured = interleave.rates(
    rivals, tokens=tokens.size * arguments.steps, rounds=arguments.rounds
  )
  for name, rounds in measured.items():
    result[name] = interleave.summary(rounds)
  if not arguments.alone:
    median = {n: statistics.median(rounds) for n, rounds in measured.items()}
    result["ratio"] = median["rlm"] / median["torch"]
  return {"parameters": count, **result}


def main() -> None:
  """Reads the flags, measures every case, prints JSON."""
  launch.use_huge_pages()  # as a run does; it serves both sides
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--config", required=True, help="a config file with a model")
  add("--experts", type=int, nargs="+", default=[8, 64])
  add("--precision", nargs="+", default=["float32"], metavar="float32|mixed")
  add("--batch_size", type=int, default=64, help="rows of one step")
  add("--length", type=int, default=64, help="tokens of one row")
  add("--steps", type=int, default=5, help="steps of one round")
  add("--rounds", type=int, default=7)
  add("--threads", type=int, default=os.cpu_count(), help="torch's threads")
  add("--devices", type=int, default=2, help="that share our rows")
  add("--alone", action="store_true", help="without torch")
  add("--output", help="also write the JSON here")
  arguments = parser.parse_args()
  dtypes = {"float32": "float32", "mixed": "bfloat16"}
  if set(arguments.precision) - set(dtypes):
    parser.error(f"--precision takes {', '.join(dtypes)}")
  jax.config.update("jax_num_cpu_devices", arguments.devices)
  packages = ("jax", "flax", "optax")
  if not arguments.alone:
    import torch

    torch.set_num_threads(arguments.threads)
    packages += ("torch", "transformers")
  cfg = load_model_config(arguments.config)
  cases = []
  for experts in arguments.experts:
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
        "batch_size": arguments.batch_size,
        "length": arguments.length,
        "devices": arguments.devices,
      }
      cases.append({**shape, **compare(case, arguments)})
  result = interleave.circumstances(packages, arguments.threads)
  interleave.report({**result, "cases": cases}, arguments.output)


if __name__ == "__main__":
  main()
