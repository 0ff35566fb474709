"""Answers a file of prompts; the same command continues an interrupted one."""

from typing import Any

from absl import flags

from experiments.sample_checkpoint import MakeSampling, open_model
from experiments.terminal import loading_bar, note

# Lines answered between two writes, in slots: fewer would leave slots idle at
# the end of each part more often, more would lose more to a kill.
ROUNDS = 4
_ENVIRONMENT = ("versions", "platform", "device_kind", "devices", "threads")


def run(values: flags.FlagValues, make_sampling: MakeSampling) -> None:
  """Writes the completions that --output still lacks."""
  import jax
  from rich.console import Console

  from rlm.checkpoint.initial import digest as weights_digest
  from rlm.progress import Progress
  from rlm.sampling.answering import Answerer, batch_prompt_length
  from rlm.sampling.completions_file import CompletionsFile
  from rlm.sampling.prompts_file import answered, digest, read_requests
  from rlm.sampling.sampler import request_keys
  from rlm.stopping import Stopped, catch_signals
  from rlm.workdir import environment

  # --- Input, checked to its last line ---------------------------------------
  console = Console(highlight=False)
  checkpoint, sampling = open_model(values, make_sampling, console)
  requests = read_requests(values.prompts, checkpoint)
  lengths = [len(request.ids) for request in requests]
  # The shape follows from the whole input, so that no line depends on how many
  # were left to do.
  shape = dict(
    slots=min(values.slots, len(requests)),
    prompt_length=batch_prompt_length(max(lengths)),
    longest=checkpoint.context - min(lengths),
  )
  settings = _settings(values, checkpoint, sampling)
  settings |= {"prompts": digest(requests), "shape": shape}
  with CompletionsFile(
    values.output, [request.record for request in requests], settings
  ) as output:
    total = len(requests)
    if output.done == total:
      note(console, f"{output.path} is finished: {total} lines.")
      return

    # --- Model ---------------------------------------------------------------
    with loading_bar(console) as on_read:
      variables = checkpoint.load(on_read)
    here = environment()
    output.begin(
      weights=weights_digest(variables),
      environment={name: here[name] for name in _ENVIRONMENT},
    )
    answerer = Answerer(checkpoint, variables, sampling)
    sampler = answerer.make_sampler(**shape)
    keys = request_keys(jax.random.key(values.seed), total)

    # --- Loop ----------------------------------------------------------------
    with (
      catch_signals() as stop,
      Progress(console, "sample", total=total, done=output.done) as bar,
    ):
      while output.done < total:
        if stop.requested:
          raise Stopped(_progress_text(output, total), None)
        now = slice(output.done, output.done + ROUNDS * sampler.slots)
        part = requests[now]
        completions = answerer.complete(
          sampler, [request.ids for request in part], keys[now]
        )
        output.append(
          [
            answered(request, tokens, reason, checkpoint.prompts)
            for request, (tokens, reason) in zip(part, completions, strict=True)
          ]
        )
        bar.update(output.done)
  note(console, f"{output.path} is finished: {total} lines.")


def _progress_text(output: Any, total: int) -> str:
  return f"sampling into {output.path} ({output.done} of {total} lines)"


def _settings(values: Any, checkpoint: Any, sampling: Any) -> dict[str, Any]:
  """What completions depend on, besides the prompts, shape and weights."""
  import dataclasses

  from rlm.config import plain

  drawn = dataclasses.asdict(sampling)
  drawn["stop_tokens"] = list(checkpoint.stop_tokens)
  return {
    "seed": values.seed,
    "sampling": drawn,
    "model": plain(dataclasses.asdict(checkpoint.cfg)),
  }
