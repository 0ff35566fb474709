r"""Distils a teacher's traces into a small dense student, by SFT alone.

  python -m experiments.distill \
    --config=configs/distill/laptop.py --workdir=runs/distill

As R1 did (arXiv:2501.12948, section 2.4): the student never sees the teacher's
probabilities, only its verified traces, a `messages` JSONL file.  The student
is the same Transformer without experts; `init_from` is its own pretraining.
"""

import pathlib
from typing import Any

from experiments import launch, pretrain, sft
from experiments.from_checkpoint import fill_model
from rlm.config import build
from rlm.data.sources import MessagesSource

Config = pretrain.Config


def check(cfg: Config) -> None:
  """Raises ValueError where a config of `Config` is not one of distillation."""
  model = cfg.model
  if not model.is_dense:
    raise ValueError(
      "config.model: a student is dense, but"
      f" first_k_dense_replace={model.first_k_dense_replace} leaves"
      f" {model.num_moe_layers} layers with experts. Set it to"
      f" num_hidden_layers={model.num_hidden_layers}."
    )
  sources = cfg.data.sources.values()
  if not any(isinstance(s, MessagesSource) and s.weight for s in sources):
    raise ValueError(
      "config.data.sources holds no traces: add one of kind 'messages' with"
      " the path of the teacher's file."
    )
  sft.check_isolated(cfg)


def check_inputs(cfg: Config, pending: pathlib.Path) -> None:
  """As pretraining's, and `check`."""
  check(cfg)
  pretrain.check_inputs(cfg, pending)


def run(c: Any, workdir: str, *, console: Any = None) -> dict[str, Any]:
  """Trains the student, or continues; returns the summary."""
  c = fill_model(c, workdir)
  cfg = build(Config, c)
  check(cfg)
  return pretrain.train(cfg, c, workdir, console)


if __name__ == "__main__":
  launch.main(run, __doc__, several_processes=True)
