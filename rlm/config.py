"""Plain config sections -> frozen dataclasses, with errors a person can act on.

Config files hold plain data; every section of one has a dataclass that lives
with its noun (`OptimizerConfig` in `rlm/optim/optimizer.py`).  `build` joins
the two, and is the one place where a misspelt key or a wrong type stops:

  @dataclasses.dataclass(frozen=True)
  class ScheduleConfig:
    warmup_steps: int
    peak: float

  build(ScheduleConfig, {"warmup_step": 10, "peak": 1e-3}, "config.schedule")
  # ValueError: config.schedule: unknown key 'warmup_step'; did you mean
  # 'warmup_steps'? ...

Nothing here imports jax, so that a wrong key is reported at once.
"""

import collections.abc
import dataclasses
import difflib
import math
import numbers
import types
import typing
from typing import Any, TypeVar

import ml_collections

T = TypeVar("T")


def build(cls: type[T], mapping: Any, where: str = "config") -> T:
  """Builds a config dataclass from a plain mapping, checking every key.

  Nested dataclass fields are built recursively; so are tuples, lists and dicts
  of dataclasses.  Fields typed `dict` without parameters receive plain nested
  dicts.  Values are checked, never guessed: an int is taken for a float, a
  list for a tuple, and nothing else is converted.

  Args:
    cls: a dataclass whose annotations use bool, int, float, str, None, Any,
      Literal, unions, tuples, lists, dicts and other dataclasses.
    mapping: a dict or `ml_collections.ConfigDict`, or a `cls` made earlier.
    where: dotted path of this section, for the messages.

  Returns:
    `cls(**mapping)`, its `__post_init__` having run.

  Raises:
    ValueError: a key is unknown or missing, a value has another type than its
      field, or `cls` refuses the values; the message starts with the path.
  """
  if isinstance(mapping, cls):
    return mapping
  values = plain(mapping)
  if not isinstance(values, dict):
    raise ValueError(
      f"{where}: expected a section with keys, got {_describe(mapping)}."
      f" Write a dict with the keys {', '.join(_field_names(cls))}."
    )
  names = _field_names(cls)
  unknown = [key for key in values if key not in names]
  if unknown:
    raise ValueError(
      f"{where}: "
      + "; ".join(
        f"unknown key {key!r}{did_you_mean(key, names)}" for key in unknown
      )
      + f" {cls.__name__} has the keys {', '.join(names)}."
    )
  missing = [
    f.name
    for f in dataclasses.fields(cls)  # type: ignore[arg-type]
    if f.init
    and f.name not in values
    and f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(
      f"{where}: missing {', '.join(map(repr, missing))}. Every choice that"
      f" changes results is set in the config: add it to {where}"
      f" ({cls.__name__})."
    )
  hints = typing.get_type_hints(cls)
  built = {
    name: _convert(value, hints[name], f"{where}.{name}")
    for name, value in values.items()
  }
  try:
    return cls(**built)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def plain(value: Any) -> Any:
  """The same data as nested dicts, lists, tuples and scalars."""
  if isinstance(value, ml_collections.ConfigDict):
    # items() resolves field references, which JSON could not hold.
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, collections.abc.Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, list):
    return [plain(item) for item in value]
  if isinstance(value, tuple):
    return tuple(plain(item) for item in value)
  return value


def id_list(value: Any, where: str) -> tuple[int, ...]:
  """Token ids that a file gives as one, as a list or as null.

  Args:
    value: of `eos_token_id`, say.
    where: what it is, for the message.

  Raises:
    ValueError: it is something else.
  """
  ids = [] if value is None else value if isinstance(value, list) else [value]
  if not all(type(i) is int for i in ids):
    raise ValueError(f"{where}={value!r} is no id and no list of ids.")
  return tuple(ids)


def did_you_mean(name: Any, names: collections.abc.Iterable[str]) -> str:
  """Closes a sentence about an unknown `name`: '; did you mean ...?' or '.'."""
  near = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
  return f"; did you mean {near[0]!r}?" if near else "."


def _field_names(cls: type) -> list[str]:
  return [f.name for f in dataclasses.fields(cls) if f.init]


def _convert(value: Any, hint: Any, where: str) -> Any:
  """`value` as the annotation `hint` asks, or ValueError."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return value
  if dataclasses.is_dataclass(hint):
    return build(typing.cast(type, hint), value, where)
  if origin in (typing.Union, types.UnionType):
    return _convert_union(value, hint, args, where)
  if origin is typing.Literal:
    # By type too: True == 1, and a config that says 1 does not mean True.
    if any(value == arg and type(value) is type(arg) for arg in args):
      return value
    choices = ", ".join(map(repr, args))
    raise ValueError(
      f"{where}: expected one of {choices}, got {value!r}"
      + did_you_mean(value, [arg for arg in args if isinstance(arg, str)])
    )
  container = origin or hint
  if container in (dict, collections.abc.Mapping):
    if not isinstance(value, dict):
      raise _wrong_type(value, "a dict", where)
    if not args:
      return value
    return {
      _convert(key, args[0], f"{where} (key)"): _convert(
        item, args[1], f"{where}.{key}"
      )
      for key, item in value.items()
    }
  if container in (tuple, list, collections.abc.Sequence):
    return _convert_sequence(value, container, args, where)
  return _convert_scalar(value, hint, where)


def _convert_union(value: Any, hint: Any, args: tuple, where: str) -> Any:
  if value is None and type(None) in args:
    return None
  rest = [arg for arg in args if arg is not type(None)]
  if len(rest) == 1:  # Optional: the inner message is the useful one
    return _convert(value, rest[0], where)
  # Sections that say what they are by a key `type` of one choice each.
  for arg in rest:
    if isinstance(value, dict) and _says_type(arg, value.get("type")):
      return _convert(value, arg, where)
  # An exact type first, so that 1 in `float | int` stays an int.
  rest.sort(key=lambda arg: type(value) is not arg)
  for arg in rest:
    try:
      return _convert(value, arg, where)
    except ValueError:
      continue
  raise _wrong_type(value, _name(hint), where)


def _says_type(hint: Any, name: Any) -> bool:
  """Whether a dataclass has the field `type: Literal[name]`."""
  if not dataclasses.is_dataclass(hint):
    return False
  choice = typing.get_type_hints(hint).get("type")
  return typing.get_args(choice) == (name,)


def _convert_sequence(
  value: Any, container: Any, args: tuple, where: str
) -> tuple | list:
  if not isinstance(value, (list, tuple)):
    raise _wrong_type(value, "a list or tuple", where)
  as_list = container is list
  if not args:
    return list(value) if as_list else tuple(value)
  if container is tuple and args[-1] is not Ellipsis:
    if len(value) != len(args):
      raise ValueError(
        f"{where}: expected {len(args)} values, got {len(value)}: {value!r}."
      )
    hints = args
  else:
    hints = (args[0],) * len(value)
  items = [
    _convert(item, hint, f"{where}[{i}]")
    for i, (item, hint) in enumerate(zip(value, hints, strict=True))
  ]
  return items if as_list else tuple(items)


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
  is_bool = isinstance(value, bool)
  if hint is type(None) and value is None:
    return None
  if hint is bool and is_bool:
    return value
  if hint is int and not is_bool and isinstance(value, numbers.Integral):
    return int(value)
  if hint is float and not is_bool and isinstance(value, numbers.Real):
    if math.isnan(value):
      raise ValueError(f"{where}: is not a number (nan).")
    return float(value)
  if hint is str and isinstance(value, str):
    return value
  if hint in (bool, int, float, str, type(None)):
    raise _wrong_type(value, _name(hint), where)
  if isinstance(hint, type):
    if isinstance(value, hint):
      return value
    raise _wrong_type(value, _name(hint), where)
  raise TypeError(f"{where}: build does not know the annotation {hint!r}")


def _wrong_type(value: Any, expected: str, where: str) -> ValueError:
  return ValueError(f"{where}: expected {expected}, got {_describe(value)}.")


def _describe(value: Any) -> str:
  text = repr(value)
  return f"{text[:60]}{'...' * (len(text) > 60)} ({type(value).__name__})"


def _name(hint: Any) -> str:
  if hint is type(None):
    return "None"
  return hint.__name__ if isinstance(hint, type) else str(hint)
