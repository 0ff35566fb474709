r"""Chats in the terminal with a model: one that a run trained, or a published.

  python -m experiments.sample --workdir=runs/quickstart
  python -m experiments.sample --workdir=runs/quickstart --stage=rl \
    --prompt='e89d51c71b77?' --temperature=0
  python -m experiments.sample --checkpoint=DeepSeek-R1-Distill-Qwen-1.5B
  python -m experiments.sample --checkpoint=DeepSeek-R1-Distill-Qwen-1.5B \
    --prompts=questions.jsonl --output=answers.jsonl

--workdir is a run's folder, or a recipe's with its stages. Every line typed is
a conversation of its own, asked as in training; at the start an example of what
the model was trained on is shown. A problem of the training task is checked by
rule, also if you made it up. An empty line draws another example. The example
above is the recipe's: 8577 + 9117 in columns named e, d, c and b, each with its
two digits; the answer 17694 reads f1e7d6c9b4.

--checkpoint is a published model's folder (config.json with model_type,
safetensors, tokenizer.json), one that tools/convert_checkpoint.py made, or a
run's. Nothing is downloaded. What is typed goes on with the conversation, by
the model's own chat template; /new starts another one. A base model, which has
no template, continues each line as text.

In both the answer streams in, its thinking dimmed; Ctrl-C stops an answer,
Ctrl-D ends.

--prompts answers the lines of a file, each an object with one of "prompt",
"messages" or "prompt_ids". Each line of --output is that object with
"completion", "completion_ids", "thinking", "answer" and "finish_reason" ("stop"
or "length"). Lines are written in order as they are done: the same command
continues after an interruption, and the file ends the same to the bit.
FILE.jsonl.settings.json beside it says what it was made with.
"""

import pathlib
import sys

from absl import flags

from experiments import launch, sample_batch, sample_checkpoint
from experiments.sample_run import Chat, converse, find_run, show_answer
from experiments.terminal import interruptible, offer_history
from rlm.sampling.config import SamplingConfig
from rlm.sampling.generation_config import GenerationConfig

# Flags that mean something with one of the kinds of folder only.
_OF_RUNS = ("stage",)
_OF_CHECKPOINTS = (
  *("dtype", "output", "prompts", "quantize", "slots", "system"),
)


def define_flags() -> flags.FlagValues:
  """The command line of this program."""
  values = flags.FlagValues()

  def define(kind, name, default, text):
    getattr(flags, f"DEFINE_{kind}")(name, default, text, flag_values=values)

  define("string", "workdir", None, "Folder of a run, or of a recipe.")
  define("string", "stage", None, "Stage of a recipe; default: its last one.")
  define("string", "checkpoint", None, "Folder of a model: published, or ours.")
  define("string", "dtype", None, "float32 or bfloat16; default: the folder's.")
  define(
    "string", "quantize", None, "int8: weights in a quarter of the memory."
  )
  define("string", "system", None, "System message of the conversation.")
  define("string", "prompt", None, "Answer this once, and exit.")
  define("string", "prompts", None, "File of prompts, one JSON object a line.")
  define("string", "output", None, "File to write their completions to.")
  define("integer", "slots", 16, "Completions of --prompts decoded together.")
  define(
    *("float", "temperature", None),
    "0 takes the likeliest token each time. Default: generation_config.json's,"
    " else 0.6.",
  )
  define(
    *("float", "top_p", None),
    "Probability kept at each token, in (0, 1]. Default: likewise, else 0.95.",
  )
  define(
    *("integer", "top_k", None),
    "Tokens kept at each step; 0 keeps all. Default: likewise, else 0.",
  )
  define(
    *("integer", "max_new_tokens", None),
    "Longest answer in tokens; the context ends it in any case. Default: 1024"
    " with --workdir, 4096 with --checkpoint.",
  )
  define("integer", "seed", 0, "The same seed and prompts, the same answers.")
  return values


def check_flags(values: flags.FlagValues) -> None:
  """Refuses what does not go together; nothing is imported or read for it."""
  if values.workdir and values.checkpoint:
    raise ValueError(
      "--workdir and --checkpoint both name a model: give one of them."
    )
  if not values.workdir and not values.checkpoint:
    raise ValueError(
      "--workdir is missing: name the folder of a run, such as"
      " --workdir=runs/quickstart, or a model's with --checkpoint."
    )
  kind = "workdir" if values.workdir else "checkpoint"
  for name in _OF_CHECKPOINTS if values.workdir else _OF_RUNS:
    if values[name].present:
      raise ValueError(f"--{name} does not go with --{kind}. Leave it out.")
  if values.prompt is not None and not values.prompt.strip():
    raise ValueError("--prompt is empty: give it a text.")
  if values.dtype not in (None, "float32", "bfloat16"):
    raise ValueError(
      f"--dtype={values.dtype} is not one of float32 and bfloat16."
    )
  if values.quantize not in (None, "int8"):
    raise ValueError(f"--quantize={values.quantize} is unknown; there is int8.")
  if values.checkpoint:
    if not pathlib.Path(values.checkpoint, "config.json").is_file():
      raise ValueError(
        f"--checkpoint={values.checkpoint}: there is no such folder with a"
        " config.json in it."
      )
    if not 0 <= values.seed < 1 << 32:
      raise ValueError(f"--seed={values.seed} must lie in 0..4294967295.")
  make_sampling(values, GenerationConfig())
  _check_batch_flags(values)


def _check_batch_flags(values: flags.FlagValues) -> None:
  if bool(values.prompts) != bool(values.output):
    raise ValueError("--prompts and --output go together: give both files.")
  if not values.prompts:
    if values["slots"].present:
      raise ValueError("--slots goes with --prompts. Leave it out.")
    return
  for name in ("prompt", "system"):
    if values[name].present:
      raise ValueError(
        f"--{name} does not go with --prompts, whose lines say all. Leave it"
        " out."
      )
  if values.slots < 1:
    raise ValueError(f"--slots={values.slots} must be at least 1.")
  if not pathlib.Path(values.prompts).is_file():
    raise ValueError(f"--prompts={values.prompts}: there is no such file.")
  output = pathlib.Path(values.output)
  if output.is_dir():
    raise ValueError(f"--output={output} is a folder. Name a file in it.")
  if output.exists() and output.samefile(values.prompts):
    raise ValueError(f"--output={output} is the file of --prompts.")


def make_sampling(
  values: flags.FlagValues, defaults: GenerationConfig
) -> SamplingConfig:
  """How to draw, by the flags and what holds where they are not given."""

  def given(name, default):
    value = getattr(values, name)
    return default if value is None else value

  return SamplingConfig(
    temperature=given("temperature", defaults.temperature),
    top_p=given("top_p", defaults.top_p),
    top_k=given("top_k", defaults.top_k),
    max_new_tokens=given("max_new_tokens", 1024 if values.workdir else 4096),
  )


def body(values: flags.FlagValues) -> None:
  """Answers once, converses, or answers a file."""
  check_flags(values)
  if values.prompts:
    sample_batch.run(values, make_sampling)
    return
  if values.checkpoint:
    sample_checkpoint.run(values, make_sampling)
    return
  folder = find_run(values.workdir, values.stage)
  launch.keep_compiled(values.workdir)
  from rich.console import Console

  console = Console(highlight=False)
  with interruptible():
    sampling = make_sampling(values, GenerationConfig())
    chat = Chat(folder, sampling, values.seed)
    if values.prompt is not None:
      show_answer(chat, values.prompt, 0, console)
      return
    offer_history()
    converse(chat, console)


if __name__ == "__main__":
  launch.command(body, __doc__, define_flags(), sys.argv)
