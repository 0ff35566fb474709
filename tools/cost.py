r"""What a model is and what training it costs: the ledger, by formula.

  python tools/cost.py --config=configs/pretrain/deepseek_v3.py --hardware=v5p
  python tools/cost.py --config=DeepSeek-V2-Lite --sequence_length=4096
  python tools/cost.py --config=configs/pretrain/deepseek_v3.py \
    --hardware=h800 --tokens=14.8e12 --tokens_per_second_per_chip=1543.21 \
    --extra_chip_hours=extension=119e3 --extra_chip_hours=post-training=5e3

Parameters by component, FLOPs per token, cache bytes per token beside those of
other attentions, memory by kind, and chip-hours, dollars and energy. --config
is a config file, a published model's folder or config.json, or a run's folder.
The last command is DeepSeek-V3's own account (arXiv:2412.19437, table 1): the
rate is its 180K H800 hours per trillion tokens, 1e12 / (180e3 * 3600).

A run's own rate is `tokens_per_second` of its timing.jsonl over its chips.
Without a rate, hours are those at the chip's peak: fewer are impossible. Of RL
the learner's share alone is counted, and not the sampling, whose operations a
run records as it goes (rlm/rl/cost.py).
"""

import argparse
import dataclasses
import json
import pathlib
import runpy
import sys
from typing import Any


def make_parser() -> argparse.ArgumentParser:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--config", required=True, metavar="FILE|DIR")
  add("--init_from", metavar="DIR", help="the model that the config leaves out")
  add("--hardware", metavar="CHIP", help="such as h800, v5p: rlm/hardware.py")
  add("--chips", type=int, metavar="N", help="memory per chip, and days")
  add("--sequence_length", type=int, help="default: the config's rows")
  add("--without_mtp", action="store_true", help="leave MTP out of all FLOPs")
  add("--tokens", type=float, help="trained on; default: the config's steps")
  rate = parser.add_mutually_exclusive_group()
  rate.add_argument("--tokens_per_second_per_chip", type=float, metavar="RATE")
  rate.add_argument("--mfu", type=float, help="the rate as a share of the peak")
  add(
    "--extra_chip_hours",
    action="append",
    default=[],
    metavar="[NAME=]HOURS",
    help="of a phase known by its hours; may be repeated",
  )
  add("--dollars_per_chip_hour", type=float, metavar="PRICE")
  add("--watts_per_chip", type=float, metavar="WATTS")
  add("--json", metavar="FILE", help="write the ledger there too")
  return parser


# --- What is asked: the model, its rows, its training. ------------------------


def load_settings(path: str, init_from: str | None) -> dict[str, Any]:
  """A config as plain data, whose `model` is a ModelConfig.

  Args:
    path: a config file, a published model's folder or config.json, or a run's.
    init_from: the folder that a config file leaves sizes to; None takes the
      config's own.

  Raises:
    ValueError: it is none of these, or has no model.
  """
  from rlm.config import build, plain
  from rlm.models.config import ModelConfig

  place = pathlib.Path(path)
  if place.suffix == ".py":
    if not place.is_file():
      raise ValueError(f"--config={path}: there is no such file.")
    namespace = runpy.run_path(path)
    if "get_config" not in namespace:
      raise ValueError(f"--config={path} has no get_config().")
    settings = plain(namespace["get_config"]())
  else:
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
      raise ValueError(
        f"--config={path}: there is no {file}. Name a config file (.py), or the"
        " folder or config.json of a published model or of a run."
      )
    try:
      settings = json.loads(file.read_text())
    except ValueError as error:
      raise ValueError(f"{file} is not JSON: {error}") from error
    if "model_type" in settings:
      return {"model": ModelConfig.from_hf(file)}
  model = settings.get("model")
  if not isinstance(model, dict):
    others = settings.get("models")
    raise ValueError(
      f"--config={path} has no section `model`"
      + (f", but models {', '.join(others)} of a recipe" if others else "")
      + ". Name the config of one stage, such as configs/pretrain/laptop.py."
    )
  source = init_from or settings.get("init_from")
  needed = {
    field.name
    for field in dataclasses.fields(ModelConfig)
    if field.default is dataclasses.MISSING
  }
  if missing := sorted(needed - set(model)):
    if source is None:
      raise ValueError(
        f"--config={path} leaves {', '.join(missing)} to init_from, which is"
        " None. Name the model's folder by --init_from."
      )
    base = load_settings(source, None)["model"]
    model = plain(dataclasses.asdict(base)) | model
  settings["model"] = build(ModelConfig, model, "config.model")
  return settings


def row_length(settings: dict[str, Any], asked: int | None) -> int:
  """T: as asked, or of the config's rows; in RL, prompt and completion.

  Raises:
    ValueError: neither says.
  """
  if asked is not None:
    return asked
  if "row_length" in settings.get("data", {}):
    return settings["data"]["row_length"]
  if "prompt_length" in settings:
    return settings["prompt_length"] + settings["sampling"]["max_new_tokens"]
  raise ValueError(
    "the config says nothing of the length of rows, by which attention costs."
    " Give --sequence_length, such as 4096."
  )


def config_tokens(settings: dict[str, Any]) -> float | None:
  """Tokens of the config's steps, of full rows; None where it has no batch."""
  from rlm.optim.schedule import batch_rows

  batch = settings.get("batch")
  if batch is None or "data" not in settings:
    return None
  steps, ramp = settings["steps"], min(batch["ramp_steps"], settings["steps"])
  rows = (steps - ramp) * batch["rows"] + sum(
    batch_rows(
      step,
      first_rows=batch["first_rows"],
      last_rows=batch["rows"],
      ramp_steps=batch["ramp_steps"],
      multiple=batch["microbatch_rows"],
    )
    for step in range(ramp)
  )
  return float(rows * settings["data"]["row_length"])


def trains_mtp(settings: dict[str, Any]) -> bool:
  """Whether training runs the MTP modules: RL and a weight of 0 do not."""
  if not settings["model"].num_nextn_predict_layers:
    return False
  is_rl = "objective" in settings
  return not is_rl and settings.get("mtp_weight", 1.0) != 0


def memory(settings: dict[str, Any]) -> dict[str, int]:
  """`cost.memory_by_kind` of what the config trains."""
  from rlm import cost
  from rlm.config import build
  from rlm.optim.config import OptimizerConfig
  from rlm.rl.config import ObjectiveConfig
  from rlm.rl.objectives import make_objective

  optimizer, reference = None, False
  if "optimizer" in settings:
    optimizer = build(OptimizerConfig, settings["optimizer"], "optimizer")
  if is_rl := "objective" in settings:
    section = build(ObjectiveConfig, settings["objective"], "objective")
    reference = make_objective(section).kl_weight > 0 or settings["monitor_kl"]
  return cost.memory_by_kind(
    settings["model"],
    optimizer=optimizer,
    ema=settings.get("ema_decay") is not None,
    reference=reference,
    mtp_trained=not is_rl,
  )


def extra_hours(phases: list[str]) -> dict[str, float]:
  """`[NAME=]HOURS`, as often as given, by name.

  Raises:
    ValueError: the hours are no number, or a name comes twice.
  """
  hours: dict[str, float] = {}
  for phase in phases:
    name, _, number = phase.rpartition("=")
    name = name or "extra"
    if name in hours:
      raise ValueError(
        f"--extra_chip_hours={phase}: {name!r} was given before. Name each"
        " phase otherwise, as NAME=HOURS."
      )
    try:
      hours[name] = float(number)
    except ValueError:
      raise ValueError(
        f"--extra_chip_hours={phase}: {number!r} is no number of hours. Write"
        " NAME=HOURS, such as extension=119e3."
      ) from None
  return hours


# --- The ledger as data. ------------------------------------------------------


def make_ledger(arguments: argparse.Namespace) -> dict[str, Any]:
  """Everything that the tables and --json say.

  Raises:
    ValueError: the config or a flag cannot be used, and why.
  """
  from rlm import cost
  from rlm.hardware import find_chip

  chip = None if arguments.hardware is None else find_chip(arguments.hardware)
  if chip is None:
    _check_no_hardware(arguments)
  if arguments.chips is not None and arguments.chips < 1:
    raise ValueError(f"--chips={arguments.chips} must be at least 1.")
  settings = load_settings(arguments.config, arguments.init_from)
  length = row_length(settings, arguments.sequence_length)
  mtp = trains_mtp(settings) and not arguments.without_mtp
  model = cost.model_cost(settings["model"], length, mtp=mtp)
  kept = memory(settings)
  ledger: dict[str, Any] = {
    "config": arguments.config,
    "model": dataclasses.asdict(model)
    | {
      "backward_flops": model.backward_flops,
      "train_flops": model.train_flops,
    },
    "memory": kept,
    "chips": arguments.chips,
    "is_rl": "objective" in settings,
  }
  if chip is None:
    return ledger
  ledger["hardware"] = dataclasses.asdict(chip)
  ledger["chips_to_hold"] = cost.chips_to_hold(kept, chip)
  tokens = arguments.tokens
  if tokens is None:
    tokens = config_tokens(settings)
  given = arguments.tokens_per_second_per_chip, arguments.mfu
  if tokens is None:
    if given != (None, None) or arguments.extra_chip_hours:
      raise ValueError(
        f"--config={arguments.config} does not say on how many tokens it"
        " trains. Give --tokens."
      )
    return ledger
  no_rate = given == (None, None)
  training = cost.training_cost(
    chip,
    tokens=tokens,
    flops_per_token=model.train_flops,
    tokens_per_second_per_chip=given[0],
    mfu=1.0 if no_rate else given[1],
    extra_chip_hours=extra_hours(arguments.extra_chip_hours),
    dollars_per_chip_hour=arguments.dollars_per_chip_hour,
    watts_per_chip=arguments.watts_per_chip,
  )
  ledger["training"] = dataclasses.asdict(training) | {
    "total_chip_hours": training.total_chip_hours,
    "at_peak": no_rate,
    "mfu_without_mtp": cost.utilisation(
      training.tokens_per_second_per_chip,
      cost.model_cost(settings["model"], length, mtp=False).train_flops,
      chip,
    ),
  }
  return ledger


def _check_no_hardware(arguments: argparse.Namespace) -> None:
  names = (
    "chips tokens_per_second_per_chip mfu extra_chip_hours"
    " dollars_per_chip_hour watts_per_chip"
  )
  unset: tuple[object, ...] = (None, [])
  given = [n for n in names.split() if getattr(arguments, n) not in unset]
  if given:
    raise ValueError(
      f"--{given[0]} needs to know the chip: give --hardware, such as v5p."
    )


def main(argv: list[str] | None = None) -> None:
  """Reads the flags and prints the ledger."""
  arguments = make_parser().parse_args(argv)
  try:
    ledger = make_ledger(arguments)
    if arguments.json is not None:
      text = json.dumps(ledger, indent=2) + "\n"
      pathlib.Path(arguments.json).write_text(text)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  from rich.console import Console

  from tools import cost_tables

  console = Console(highlight=False, width=100)
  for table in cost_tables.tables(ledger):
    console.print(table)
  if "hardware" in ledger:
    chip = ledger["hardware"]
    console.print(f"Of {chip['name']}: {chip['source']}.", markup=False)


if __name__ == "__main__":
  # Run as a file, the repository is not where imports look.
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  main()
