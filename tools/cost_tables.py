"""The ledger of tools/cost.py as tables."""

from typing import Any

from rich.table import Table


def tables(ledger: dict[str, Any]) -> list[Table]:
  """Rich tables, from what `make_ledger` gave."""
  model = ledger["model"]
  found = [
    _parameters(model),
    _flops(model),
    _table(
      "Cache per token, bytes",
      ["attention", "bytes", "times this model's"],
      [
        [
          name + (" (this model)" if name == model["attention"] else ""),
          f"{size:,}",
          f"{size / model['cache_bytes'][model['attention']]:.2f}",
        ]
        for name, size in model["cache_bytes"].items()
      ],
    ),
    _memory(ledger),
  ]
  if "training" in ledger:
    found.append(_training(ledger))
  return found


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
  table = Table(title=title, title_justify="left")
  for i, column in enumerate(columns):
    table.add_column(column, justify="right" if i else "left", no_wrap=True)
  for row in rows:
    table.add_row(*row)
  return table


def _parameters(model: dict[str, Any]) -> Table:
  rows = [
    [kind, _count(part["total"]), _count(part["activated"])]
    for kind, part in model["parts"].items()
    if part["total"]
  ]
  without = _count(model["activated_without_embedding"])
  rows += [
    ["total", _count(model["total"]), _count(model["activated"])],
    ["total without the embedding's lookup", "", without],
  ]
  if model["mtp"]["total"]:
    mtp = model["mtp"]
    rows.append(
      ["MTP modules, beside", _count(mtp["total"]), _count(mtp["activated"])]
    )
  return _table("Parameters", ["kind", "all", "activated per token"], rows)


def _flops(model: dict[str, Any]) -> Table:
  forward, backward = model["forward_flops"], model["backward_flops"]

  def row(name: str, ahead: float, back: float) -> list[str]:
    return [name, *(_scaled(x) for x in (ahead, back, ahead + back))]

  rows = [
    row(kind, forward[kind], backward[kind])
    for kind in forward
    if forward[kind]
  ]
  mtp = forward.get("MTP modules", 0)
  ahead = sum(forward.values()) - mtp
  rows.append(row("total" + " without MTP" * (mtp > 0), ahead, 2 * ahead))
  if mtp:
    ahead += mtp
    rows.append(row("total with MTP", ahead, 2 * ahead))
  cached = f"{model['row_length']:,} cached"
  rows.append(
    [f"decoding over {cached}", _scaled(model["decode_flops"]), "", ""]
  )
  title = f"FLOPs per token, rows of {model['row_length']:,} tokens, causal"
  return _table(title, ["part", "forward", "backward", "both"], rows)


def _memory(ledger: dict[str, Any]) -> Table:
  kept, chips = ledger["memory"], ledger["chips"]
  columns = ["kind", "in all"]
  if chips is not None:
    columns.append(f"on each of {chips:,} chips")

  def row(name: str, size: float) -> list[str]:
    return [name, f"{_scaled(size)}B"] + (
      [] if chips is None else [f"{_scaled(size / chips)}B"]
    )

  rows = [row(kind, size) for kind, size in kept.items()]
  rows.append(row("total, activations apart", sum(kept.values())))
  if "hardware" in ledger:
    chip = ledger["hardware"]
    held = ledger["chips_to_hold"]
    rows.append(
      [f"chips of {_scaled(chip['hbm_bytes'])}B that hold it", f"{held:,}"]
      + [""] * (len(columns) - 2)
    )
  return _table("Memory that a run keeps, divided evenly", columns, rows)


def _training(ledger: dict[str, Any]) -> Table:
  training, chip = ledger["training"], ledger["hardware"]
  rate, total = (
    training["tokens_per_second_per_chip"],
    training["total_chip_hours"],
  )
  rows = [
    ["tokens", _count(training["tokens"])],
    ["FLOPs", f"{training['flops']:.4g}"],
    ["tokens per second and chip", _plain(rate)],
    ["MFU of the bfloat16 peak", f"{training['mfu']:.1%}"],
  ]
  if training["mfu_without_mtp"] != training["mfu"]:
    without = training["mfu_without_mtp"]
    rows.append(["MFU, MTP not counted", f"{without:.1%}"])
  hours = training["chip_hours"]
  rows += [[f"chip-hours: {name}", _plain(hours[name])] for name in hours]
  if len(hours) > 1:
    rows.append(["chip-hours in all", _plain(total)])
  if ledger["chips"] is not None:
    days = total / ledger["chips"] / 24
    rows.append([f"days on {ledger['chips']:,} chips", _plain(days)])
  dollars, energy = training["dollars"], training["energy_kwh"]
  rows.append(
    [
      "dollars",
      "unknown: give --dollars_per_chip_hour"
      if dollars is None
      else _plain(dollars),
    ]
  )
  rows.append(
    [
      "energy of the chips alone, kWh",
      "unknown: give --watts_per_chip" if energy is None else _plain(energy),
    ]
  )
  title = f"Training on {chip['name']}"
  if ledger["is_rl"]:
    title += ", sampling apart"
  if training["at_peak"]:
    title += ": at least, as no rate was given"
  return _table(title, ["what", "how much"], rows)


def _scaled(x: float, letters: str = "TGMk") -> str:
  """A number in thousands, millions, billions or trillions, and its letter."""
  for power, letter in zip((12, 9, 6, 3), letters, strict=True):
    if abs(x) >= 10**power:
      return f"{x / 10**power:,.3f} {letter}"
  return f"{x:,.0f} "


def _plain(x: float) -> str:
  """A number in full, or in five figures where it is small."""
  return f"{x:,.0f}" if x >= 1e4 else f"{x:,.5g}"


def _count(x: float) -> str:
  """Parameters or tokens, whose thousand millions are B."""
  return _scaled(x, "TBMk").rstrip()
