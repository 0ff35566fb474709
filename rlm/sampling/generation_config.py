"""generation_config.json: how a published model asks to be sampled."""

import os
import pathlib
from typing import Any, NamedTuple

from rlm import files

# The sampling advised for DeepSeek-R1, taken where a folder says nothing.
TEMPERATURE, TOP_P, TOP_K = 0.6, 0.95, 0

# What changes the distribution and is not computed here -> when it does not.
_NOT_APPLIED = {
  "repetition_penalty": 1.0,
  "encoder_repetition_penalty": 1.0,
  "no_repeat_ngram_size": 0,
  "min_p": 0.0,
  "typical_p": 1.0,
  "epsilon_cutoff": 0.0,
  "eta_cutoff": 0.0,
  "min_new_tokens": 0,
  "num_beams": 1,
}


class GenerationConfig(NamedTuple):
  """What a folder says of sampling.

  Attributes:
    temperature: 0 where it says do_sample=false.
    top_p: probability kept at each token.
    top_k: tokens kept; 0 keeps all.
    not_applied: such as "min_p=0.1", asked for and not computed here.
  """

  temperature: float = TEMPERATURE
  top_p: float = TOP_P
  top_k: int = TOP_K
  not_applied: tuple[str, ...] = ()


def read_generation_config(folder: str | os.PathLike) -> GenerationConfig:
  """Reads a folder's file; what it does not say, or no file, takes a default.

  Raises:
    ValueError: it is no JSON object, or a value is no number.
  """
  path = pathlib.Path(folder) / "generation_config.json"
  if not path.is_file():
    return GenerationConfig()
  fields = files.read_json(path)
  if not isinstance(fields, dict):
    raise ValueError(f"{path} holds a {type(fields).__name__}, not an object.")

  def number(name: str, default: float, kinds: Any = (int, float)) -> Any:
    value = fields.get(name)
    if value is None:
      return default
    if isinstance(value, bool) or not isinstance(value, kinds):
      raise ValueError(f"{path}: {name}={value!r} is no number. Correct it.")
    return value

  temperature = number("temperature", TEMPERATURE)
  if fields.get("do_sample") is False:
    temperature = 0.0
  return GenerationConfig(
    temperature=float(temperature),
    top_p=float(number("top_p", TOP_P)),
    top_k=number("top_k", TOP_K, int),
    not_applied=tuple(
      f"{name}={fields[name]}"
      for name, inert in _NOT_APPLIED.items()
      if fields.get(name) not in (None, inert)
    ),
  )
