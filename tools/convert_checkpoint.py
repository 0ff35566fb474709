r"""Converts weights between the published format and ours.

  python -m tools.convert_checkpoint --input=DeepSeek-V2-Lite \
    --output=converted --format=rlm --dtype=bfloat16
  python -m tools.convert_checkpoint --input=runs/quickstart/rl_final \
    --output=exported --format=hf

The input is recognised: a published folder (config.json with model_type and
safetensors), a run's or a recipe stage's workdir, or a folder converted before.
`hf` is the layout that transformers loads: config.json, generation config,
tokenizer files, shards and their index, MTP included. A published folder may be
written as `hf` in another dtype. To `rlm` an interrupted conversion continues;
to `hf` it starts anew. `fp8` is E4M3 in blocks of 128x128; weights that came in
FP8 and were not touched keep their blocks and scales.
"""

import argparse
import sys


def make_parser() -> argparse.ArgumentParser:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--input", required=True, metavar="DIR")
  add("--output", required=True, metavar="DIR")
  add("--format", required=True, choices=["rlm", "hf"])
  add(
    "--dtype",
    choices=["float32", "bfloat16", "fp8"],
    help="of the weights written; default: as the input has them",
  )
  add(
    "--without_mtp",
    action="store_true",
    help="leave the MTP modules out (to rlm only)",
  )
  add("--max_shard_bytes", type=int, default=5 * 10**9, help="of one file (hf)")
  return parser


def convert(arguments: argparse.Namespace) -> None:
  """Does what the flags say, with a progress bar.

  Raises:
    ValueError: the two formats and the dtype do not go together, or the input
      is not what it says.
  """
  # After the flags are known to be right: these import jax.
  from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
  )

  from rlm.checkpoint import convert as conversion

  columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
  with Progress(*columns) as progress:
    task = progress.add_task("convert", total=None)

    def report(done: int, total: int) -> None:
      progress.update(task, completed=done, total=total)

    if arguments.format == "rlm":
      if arguments.dtype == "fp8":
        raise ValueError(
          "--dtype=fp8 goes with --format=hf: we compute in float32 or"
          " bfloat16. The FP8 scales of the input are kept for the way back."
        )
      conversion.import_published(
        arguments.input,
        arguments.output,
        dtype=arguments.dtype,
        mtp=not arguments.without_mtp,
        on_read=report,
      )
      return
    if arguments.without_mtp:
      raise ValueError("--without_mtp goes with --format=rlm.")
    conversion.export_checkpoint(
      arguments.input,
      arguments.output,
      stored=arguments.dtype,
      max_shard_bytes=arguments.max_shard_bytes,
      on_write=report,
    )


def main() -> None:
  """Reads the flags and converts."""
  arguments = make_parser().parse_args()
  try:
    convert(arguments)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  print(f"Wrote {arguments.output}.")


if __name__ == "__main__":
  main()
