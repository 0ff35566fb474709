"""The chat template of a published model: messages -> the text it was given.

A template is a Jinja program in the model's own folder, and nobody's text is
trusted here: it runs in `template_sandbox`, sees plain data only, and what goes
wrong in it is a ValueError that names its file. Files, variables and the
preparation of messages are those of transformers 5's `apply_chat_template`,
which `tools/check_chat.py` compares against a real folder.
"""

import datetime
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from rlm import files
from rlm.data import template_purse, template_sandbox

Message = Mapping[str, Any]

# Names under which a message brings its thinking; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Room that a template has for its own words, and for repeating or indenting
# what it is given.
_OWN_CHARS, _GROWTH = 1_000_000, 16


class ChatTemplate:
  """The chat template in a model's folder.

  Looked for in chat_template.jinja and additional_chat_templates/*.jinja;
  without those, under "chat_template" in tokenizer_config.json, which is a text
  or a list of {"name", "template"}. The template "tool_use" serves
  conversations with tools, "default" all others; one alone serves both.

  Args:
    folder: of the model.
    now: the time that a template is told if it asks.

  Attributes:
    special_tokens: "bos_token" and the like -> string, as the template is
      given them.

  Raises:
    ValueError: there is no template, or one that Jinja does not read.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    now: template_sandbox.Clock = datetime.datetime.now,
  ):
    self._folder = pathlib.Path(folder)
    config = read_tokenizer_config(folder)
    self.special_tokens = special_tokens(config)
    self._sources = _sources(self._folder, config)
    environment = template_sandbox.Environment(now)
    self._compiled: dict[str, jinja2.Template] = {}
    for name in ("default", "tool_use"):
      if name in self._sources:
        path, source = self._sources[name]
        self._compiled[name] = _compile(environment, path, source)

  def path(self, *, with_tools: bool = False) -> pathlib.Path:
    """The file that the template in use comes from."""
    return self._sources[self._name(with_tools)][0]

  def source(self, *, with_tools: bool = False) -> str:
    """The Jinja text of the template in use."""
    return self._sources[self._name(with_tools)][1]

  def render(
    self,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **extra: Any,
  ) -> str:
    """The conversation as the model was trained to read it.

    Args:
      messages: {"role", "content", ...} each, of JSON's types; a key with the
        value None is as if absent. Thinking that stands apart from the content
        may be called "reasoning_content", "thinking" or "reasoning".
      tools: JSON schemas of the functions that the model may call.
      add_generation_prompt: end where the assistant's turn begins.
      **extra: further variables that the template reads, such as `thinking` or
        `enable_thinking`; they replace special tokens of the same name.

    Raises:
      ValueError: the template does not accept these messages, it does what the
        sandbox forbids, or it does not end; or they are no plain data.
    """
    if not messages:
      raise ValueError("the conversation is empty. Give at least one message.")
    name = self._name(tools is not None)
    variables = {
      "documents": None,
      **self.special_tokens,
      **_plain(extra, "extra"),
      "messages": [
        _prepared(message, f"messages[{i}]")
        for i, message in enumerate(messages)
      ],
      "tools": None if tools is None else _plain(list(tools), "tools"),
      "add_generation_prompt": add_generation_prompt,
    }
    path, source = self._sources[name]
    try:
      return template_sandbox.render(
        self._compiled[name],
        variables,
        max_chars=_OWN_CHARS + _GROWTH * (len(source) + _count(variables)),
      )
    except template_sandbox.RefusalError as error:
      raise ValueError(
        f"the chat template of {path} refuses these messages: {error}"
      ) from error
    except template_purse.RunawayError as error:
      raise ValueError(
        f"the chat template of {path} was stopped: {error}. Look at what it"
        " does before you trust the folder."
      ) from error
    except jinja2.sandbox.SecurityError as error:
      raise ValueError(
        f"the chat template of {path} does what no template may: {error}. Look"
        " at what it does before you trust the folder."
      ) from error
    except Exception as error:  # whatever an operation on our values raises
      raise ValueError(
        f"the chat template of {path} fails on these messages:"
        f" {type(error).__name__}: {error}"
      ) from error

  def _name(self, with_tools: bool) -> str:
    if with_tools and "tool_use" in self._compiled:
      return "tool_use"
    if "default" not in self._compiled:
      raise ValueError(
        f"{self._folder} has a chat template for conversations with tools only."
        " Give tools."
      )
    return "default"


def read_tokenizer_config(folder: str | os.PathLike) -> dict[str, Any]:
  """tokenizer_config.json of a model's folder; {} if there is none.

  Raises:
    ValueError: it is no JSON object.
  """
  path = pathlib.Path(folder) / "tokenizer_config.json"
  if not path.is_file():
    return {}
  config = files.read_json(path)
  if not isinstance(config, dict):
    raise ValueError(f"{path} holds a {type(config).__name__}, not an object.")
  return config


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
  """The keys of tokenizer_config.json that name a token -> the string.

  Args:
    config: where a token is a string, or {"content": string, ...}.
  """
  found = {}
  for key, value in config.items():
    content = value.get("content") if isinstance(value, dict) else value
    if key.endswith("_token") and isinstance(content, str):
      found[key] = content
  return found


def _sources(
  folder: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, tuple[pathlib.Path, str]]:
  """Name -> (file, Jinja text) of the templates of a folder."""
  found = {}
  paths = {"default": folder / "chat_template.jinja"}
  for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
    paths[path.stem] = path
  for name, path in paths.items():
    if path.is_file():
      found[name] = (path, path.read_text(encoding="utf-8"))
  path = folder / "tokenizer_config.json"
  if not found:
    entry = config.get("chat_template")
    if isinstance(entry, str):
      entry = [{"name": "default", "template": entry}]
    for item in entry or []:
      if not isinstance(item, dict) or not {"name", "template"} <= item.keys():
        raise ValueError(
          f'{path}: "chat_template" is neither a text nor a list of'
          ' {"name": ..., "template": ...}.'
        )
      found[item["name"]] = (path, item["template"])
  if not found.keys() & {"default", "tool_use"}:
    raise ValueError(
      f"no chat template in {folder}: neither a file chat_template.jinja nor"
      ' "chat_template" in tokenizer_config.json, with the name "default" if'
      f" there are several. Found: {', '.join(found) or 'none'}. Copy the file"
      " from where the model was published."
    )
  return found


def _compile(
  environment: jinja2.Environment, path: pathlib.Path, source: Any
) -> jinja2.Template:
  if not isinstance(source, str):
    raise ValueError(
      f"{path}: a chat template is a {type(source).__name__}, not a text."
    )
  try:
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(
      f"the chat template of {path} is no Jinja that can be read, line"
      f" {error.lineno}: {error.message}"
    ) from error
  except RecursionError as error:
    raise ValueError(
      f"the chat template of {path} nests too deep to be read."
    ) from error


def _prepared(message: Any, where: str) -> dict[str, Any]:
  """A message as transformers hands it over: no None, thinking by its names."""
  if not isinstance(message, Mapping):
    raise ValueError(
      f"{where} is a {type(message).__name__}. A message is an object such as"
      ' {"role": "user", "content": "..."}.'
    )
  plain = _plain(
    {key: value for key, value in message.items() if value is not None}, where
  )
  for name in REASONING:
    if name in plain:
      return {
        "thinking": plain[name],
        **plain,
        "reasoning_content": plain[name],
      }
  return plain


def _plain(value: Any, where: str) -> Any:
  """A copy in JSON's types, so that no object's methods reach a template."""
  if value is None or type(value) in (str, int, float, bool):
    return value
  if isinstance(value, Mapping):
    return {
      _plain(key, where): _plain(item, f"{where}[{key!r}]")
      for key, item in value.items()
    }
  if isinstance(value, list | tuple):
    return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
  raise ValueError(
    f"{where} is a {type(value).__name__}. A chat template is given texts,"
    " numbers, lists and objects only: convert it."
  )


def _count(value: Any) -> int:
  """Characters of all texts in a value, and one for each other part."""
  if isinstance(value, str):
    return len(value)
  if isinstance(value, Mapping):
    return sum(_count(key) + _count(item) for key, item in value.items())
  if isinstance(value, list):
    return sum(map(_count, value))
  return 1
