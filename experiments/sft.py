r"""Supervised fine-tuning: a cold start on traces, or on your conversations.

  python -m experiments.sft \
    --config=configs/sft/cold_start.py --workdir=runs/cold_start

Pretraining's loop from the weights of another run (`init_from`), with the loss
on responses alone.  Traces come from sources of kind "task" (worked problems
with tagged=1.0) or "messages" (a JSONL file, also the one that rejection
sampling writes); a source of pretraining data beside them is replay.
"""

import pathlib
from typing import Any

from experiments import launch, pretrain
from experiments.from_checkpoint import fill_model
from rlm.config import build
from rlm.data.sources import MessagesSource, TaskSource

Config = pretrain.Config


def check(cfg: Config) -> None:
  """Raises ValueError where a config of `Config` is not one of SFT."""
  if cfg.init_from is None:
    raise ValueError(
      "config.init_from is None: fine-tuning starts from a run. Name its"
      " folder, such as runs/pretrain."
    )
  check_isolated(cfg)


def check_isolated(cfg: Config) -> None:
  """Raises ValueError where a response could read another document."""
  responses = (TaskSource, MessagesSource)
  for name, source in cfg.data.sources.items():
    if isinstance(source, responses) and source.layout == "cross_document":
      raise ValueError(
        f"config.data.sources.{name}.layout='cross_document' lets a response"
        " read other documents. Use 'isolated', or 'single' for one to a row."
      )


def check_inputs(cfg: Config, pending: pathlib.Path) -> None:
  """As pretraining's, and `check`."""
  check(cfg)
  pretrain.check_inputs(cfg, pending)


def run(c: Any, workdir: str, *, console: Any = None) -> dict[str, Any]:
  """Fine-tunes, or continues the run in `workdir`; returns its summary."""
  c = fill_model(c, workdir)
  cfg = build(Config, c)
  check(cfg)
  return pretrain.train(cfg, c, workdir, console)


if __name__ == "__main__":
  launch.main(run, __doc__, several_processes=True)
