"""Jinja as transformers sets it up for chat templates, with bounds on work.

A chat template is a program that came with somebody's weights. jinja2's
immutable sandbox keeps it from Python's internals and from changing what it is
given; it does not keep it from looping for hours or filling the memory. So
each rendering has a purse: passes of loops, calls of macros and characters
built are paid from it, and no single value exceeds the largest output allowed.
Work is counted, not timed, so that a template fails everywhere or nowhere.

This stops a template that runs away, and the usual bombs. It is no jail:
whoever serves templates of strangers to strangers renders in a child process
with limits of the system.
"""

import contextvars
import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

STEP_COST = 1000  # what a pass of a loop costs, in characters built
MAX_WORK = 250_000_000  # of one rendering: 250,000 passes, a second or two

# Filters and formats that turn a number into that many characters or pieces.
_FILLING = ("batch", "center", "indent", "round", "slice", "truncate")
_WIDE = re.compile(  # %1000000d, %*d, {:1000000d}, {:{}}
  r"%[^a-zA-Z%]*(?:\*|\d{6})|\{[^{}]*:[^{}]*(?:\{|\d{6})"
)


class RefusalError(jinja2.TemplateError):
  """The template called raise_exception."""


class RunawayError(jinja2.TemplateRuntimeError):
  """The template does more work, or builds more, than it may."""


class _Purse:
  """What one rendering may still do.

  Attributes:
    max_chars: the largest value or output, in characters or items.
    work: what is left, in characters built.
  """

  def __init__(self, max_chars: int):
    self.max_chars = max_chars
    self.work = max(MAX_WORK, 100 * max_chars)

  def pay(self, cost: int) -> None:
    self.work -= cost
    if self.work < 0:
      raise RunawayError("its loops do not come to an end")

  def check(self, size: int) -> None:
    if size > self.max_chars:
      raise RunawayError(
        f"it builds a value of {size} characters or items, where"
        f" {self.max_chars} are allowed"
      )

  def admit(self, value: Any) -> Any:
    """`value`, paid for if it is a text or a list."""
    if isinstance(value, str | bytes | list | tuple):
      self.check(len(value))
      self.pay(len(value))
    return value


_purse: contextvars.ContextVar[_Purse] = contextvars.ContextVar("purse")


def _current() -> _Purse:
  """The purse of this rendering; a small one while a template is compiled."""
  try:
    return _purse.get()
  except LookupError:
    return _Purse(1_000_000)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """The sandbox of chat templates."""

  intercepted_binops = frozenset({"+", "*", "**", "%"})

  def __init__(self):
    super().__init__(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    self.filters["tojson"] = _to_json
    self.filters = {
      name: _bounded(name, function) for name, function in self.filters.items()
    }
    del self.globals["lipsum"]  # draws random text
    self.globals |= {
      "dict": _Dict(),
      "namespace": _Namespace,
      "raise_exception": _raise_exception,
      "strftime_now": _strftime_now,
    }

  def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
    return super()._generate(_Metering().visit(source), *args, **kwargs)

  def step(self) -> str:
    """Pays for a pass of a loop or a call of a macro."""
    _current().pay(STEP_COST)
    return ""

  def admit(self, value: Any) -> Any:
    """Pays for a value."""
    return _current().admit(value)

  def call_binop(
    self, context: Any, operator: str, left: Any, right: Any
  ) -> Any:
    purse = _current()
    if operator == "*":
      for value, times in ((left, right), (right, left)):
        if isinstance(value, int):
          purse.check(value.bit_length())
        elif isinstance(value, str | bytes | list | tuple) and _is_int(times):
          purse.check(len(value) * times)
    elif operator == "**" and _is_int(left) and _is_int(right):
      purse.check(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, str):
      _check_format(left)
    return purse.admit(super().call_binop(context, operator, left, right))

  def call(__self, __context, __obj, *args, **kwargs):
    if isinstance(getattr(__obj, "__self__", None), str | bytes | int):
      _check_numbers((*args, *kwargs.values()))  # "x".center(10**9)
    return _current().admit(super().call(__context, __obj, *args, **kwargs))

  def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
    wrapped = super().wrap_str_format(value)
    if wrapped is not None:
      _check_format(value.__self__)
    return wrapped


def render(
  template: jinja2.Template, variables: Mapping[str, Any], *, max_chars: int
) -> str:
  """The text that a template writes.

  Args:
    template: compiled by `Environment`.
    variables: what it may read; plain data.
    max_chars: of the text, and of every value on the way.

  Raises:
    RefusalError: the template does not take what it is given.
    RunawayError: it wrote or worked more than it may.
    Exception: any other, from an operation that does not suit a value.
  """
  purse = _Purse(max_chars)
  token = _purse.set(purse)
  try:
    parts: list[str] = []
    length = 0
    for part in template.generate(variables):
      parts.append(part)
      length += len(part)
      purse.check(length)
      purse.pay(len(part))
    return "".join(parts)
  finally:
    _purse.reset(token)


class _Generation(jinja2.ext.Extension):
  """{% generation %}..{% endgeneration %}, as plain content.

  transformers marks by it what an assistant wrote.
  """

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.Scope(body, lineno=line)


class _Metering(NodeTransformer):
  """Makes loops, macros, `~` and captured blocks pay."""

  def visit_For(self, node: nodes.For) -> nodes.Node:
    self.generic_visit(node)
    node.body.insert(0, nodes.ExprStmt(_call("step", node), lineno=node.lineno))
    return node

  def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
    return self.visit_For(node)  # type: ignore[arg-type]

  def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
    self.generic_visit(node)
    return _call("admit", node, node)

  def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
    self.generic_visit(node)
    node.filter = nodes.Filter(  # "string" is a filter, so it is `_bounded`
      node.filter, "string", [], [], None, None, lineno=node.lineno
    )
    return node


def _call(method: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Call:
  """A call of a method of `Environment`, in the place of a node."""
  attribute = nodes.EnvironmentAttribute(method)
  call = nodes.Call(attribute, list(args), [], None, None, lineno=node.lineno)
  call.set_environment(node.environment)  # type: ignore[arg-type]
  return call


def _bounded(name: str, function: Callable) -> Callable:
  """A filter that pays for its result; attributes that jinja reads stay."""

  @functools.wraps(function)
  def bounded(*args, **kwargs):
    if name in _FILLING:  # the first argument is its input, or the environment
      _check_numbers((*args[1:], *kwargs.values()))
    elif name == "format":
      _check_format(str(args[0]))
    return _current().admit(function(*args, **kwargs))

  return bounded


def _is_int(value: Any) -> bool:
  return isinstance(value, int)


def _check_numbers(values: tuple) -> None:
  for value in filter(_is_int, values):
    _current().check(abs(value))


def _check_format(text: str) -> None:
  """Refuses a format that grows within one operation."""
  if _WIDE.search(text):
    raise RunawayError("it formats with a width of six digits, or a free one")


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """JSON as it is: jinja's own filter escapes for HTML and spells out é."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise_exception(message: str) -> None:
  raise RefusalError(message)


def _strftime_now(format: str) -> str:
  return datetime.datetime.now().strftime(format)


class _Dict:
  """`dict(...)` without the attributes of the type."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
    return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
  """A namespace that takes no name with an underscore in front."""

  def __init__(*args: Any, **kwargs: Any):
    self, values = args[0], dict(*args[1:], **kwargs)
    for name in values:
      _check_name(name)
    jinja2.utils.Namespace.__init__(self, values)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: str) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.sandbox.SecurityError(f"a namespace has no attribute {name!r}")
