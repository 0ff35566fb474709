"""What a config leaves to the folder that its run starts from.

`config.model` may hold only the fields that the run decides for itself, such as
dtype and remat; those that `config.init_from` settles are read there. So one
config fine-tunes any published model: `--config.init_from=DIR`.
"""

import dataclasses
import pathlib
from typing import Any

from rlm import files
from rlm.config import plain


def fill_model(c: Any, workdir: str) -> Any:
  """A config with the whole of `model`, and `tokenizer` where it is None.

  Args:
    c: of an experiment; with or without `init_from`.
    workdir: of the run; where it has begun, its config.json has what was
      filled in then, and `init_from` is not looked at again.

  Returns:
    `c` itself where nothing is left out; else a plain copy, filled.

  Raises:
    ValueError: something is left out and init_from is no model's folder.
  """
  from rlm.models.config import ModelConfig

  values = plain(c)
  given, source = values.get("model"), values.get("init_from")
  if source is None or not isinstance(given, dict):
    return c
  needed = [
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.default is dataclasses.MISSING
  ]
  if set(needed) <= set(given) and values.get("tokenizer") is not None:
    return c
  begun = pathlib.Path(workdir) / "config.json"
  if begun.is_file():
    saved = files.read_json(begun)
    if values.get("tokenizer") is None:
      values["tokenizer"] = saved.get("tokenizer")
    values["model"] = saved.get("model", {}) | given
    return values
  config_file = pathlib.Path(source) / "config.json"
  if not config_file.is_file():
    raise ValueError(
      f"config.model leaves {', '.join(n for n in needed if n not in given)} to"
      f" config.init_from={source!r}, which holds no config.json. Name the"
      " folder of a published model or of a run."
    )
  from rlm.checkpoint.convert import PUBLISHED
  from rlm.data.chat_formats import load_chat

  saved = files.read_json(config_file)
  if "model_type" in saved:
    model = plain(dataclasses.asdict(ModelConfig.from_hf(source)))
    tokenizer = source
  else:
    model, tokenizer = saved.get("model", {}), saved.get("tokenizer")
    if tokenizer is None and "converted_from" in saved:
      tokenizer = str(pathlib.Path(source) / PUBLISHED)
  if values.get("tokenizer") is None:
    values["tokenizer"] = tokenizer
  if values["tokenizer"] is None:
    raise ValueError(
      f"config.tokenizer is None, and config.init_from={source!r} has none."
      ' Name a folder with a tokenizer.json, or "bytes".'
    )
  if "n_vocab_used" not in given:
    # Published sizes count rows; the head is masked to the ids in use.
    used = load_chat(values["tokenizer"]).tokenizer.n_vocab_used
    model = model | {"n_vocab_used": used}
  values["model"] = model | given
  return values
