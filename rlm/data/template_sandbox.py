"""Jinja as transformers sets it up for chat templates, with bounds on work.

A chat template is a program that came with somebody's weights. jinja2's
immutable sandbox keeps it from Python's internals and from changing what it is
given; it does not keep it from looping for hours or filling the memory. So
each rendering has a purse (`template_purse`), and two rules hold:

- No value, with all that it holds, exceeds the largest output allowed. An
  operation that can make more than it is given (a product, replace, join, a
  format, ...) is measured before it is done.
- What is built is paid for, in bytes of memory or nearly, and so is each pass
  of a loop, by the length of its body. All filters give lists, not generators.

Of filters and methods there are those below, which is more than published
templates use; any other is an error that names it. Work is counted, not timed,
so that a template fails everywhere or nowhere.

Memory is thus bounded by what may be paid, MAX_WORK bytes or 100 times the
largest output if that is more, and in one operation by a small factor: the
text of a list, JSON, `upper` or what is added to `safe` may be a dozen times as
long as what goes in before it is seen. Time is bounded loosely: comparing and
searching are paid by the pass around them, whatever their operands. Compiling
is not bounded, save that it computes nothing. This is no jail: whoever serves
templates of strangers to strangers renders in a child process with limits of
the system.
"""

import datetime
import functools
import json
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.sandbox
import jinja2.utils
import markupsafe
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from rlm.data import template_purse

STEP_COST = 1000  # what a pass of a loop costs at least, in bytes built

FILTERS = frozenset(
  "abs capitalize count d default dictsort first float format indent int items"
  " join last length list lower map max min reject rejectattr replace reverse"
  " safe select selectattr sort string title tojson trim unique upper".split()
)
METHODS = {
  str: frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isascii"
    " isdecimal isdigit islower isnumeric isspace istitle isupper join lower"
    " lstrip partition removeprefix removesuffix replace rfind rindex"
    " rpartition rsplit rstrip split splitlines startswith strip swapcase title"
    " upper".split()  # format is wrapped where it is looked up
  ),
  list: frozenset(("copy", "count", "index")),
  tuple: frozenset(("count", "index")),
  dict: frozenset(("copy", "get", "items", "keys", "values")),
}

_MAX_INDENT = 16

Clock = Callable[[], datetime.datetime]


class RefusalError(jinja2.TemplateError):
  """The template called raise_exception."""


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """The sandbox of chat templates.

  Args:
    now: the time that templates are told.
  """

  intercepted_binops = frozenset({"+", "*", "**", "%"})

  def __init__(self, now: Clock = datetime.datetime.now):
    super().__init__(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[_Generation, jinja2.ext.loopcontrols],
      finalize=_written,
    )
    filters = self.filters | {
      "format": _format,
      "indent": _indent,
      "join": _join,
      "list": iter,
      "replace": _replace,
      "sort": _sort,
      "title": _title,
      "tojson": _to_json,
    }
    self.filters = {name: _paid(filters[name]) for name in FILTERS}
    del self.globals["lipsum"]  # draws random text
    self.globals |= {
      "dict": _Dict(),
      "namespace": _Namespace,
      "raise_exception": _raise_exception,
      "strftime_now": lambda format: _strftime(now(), format),
    }

  def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
    return super()._generate(_Metering().visit(source), *args, **kwargs)

  # What `_Metering` calls.

  def step(self, cost: int) -> str:
    """Pays for a pass of a loop or a call of a macro."""
    template_purse.current.get().pay(cost)
    return ""

  def admit(self, value: Any) -> Any:
    return template_purse.current.get().admit(value)

  def charge(self, value: Any) -> Any:
    return template_purse.current.get().charge(value)

  def concat(self, parts: Iterable) -> str:
    """What jinja joins captured output with."""
    return template_purse.current.get().join("", map(str, parts))

  def call_binop(
    self, context: Any, operator: str, left: Any, right: Any
  ) -> Any:
    purse = template_purse.current.get()
    if operator == "+" and isinstance(left, list) and isinstance(right, list):
      size = purse.size(left) + purse.size(right)
      purse.check(size)
      return purse.charge(template_purse.SizedList(left + right, size))
    if operator == "*":
      for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(value, str):
          purse.check(len(value) * times)
        elif isinstance(times, int) and isinstance(value, list | tuple):
          purse.check(purse.size(value) * times)
        elif isinstance(times, int) and isinstance(value, int):
          purse.check_bits(value.bit_length() + times.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
      purse.check_bits(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, str):
      purse.check_format(left, template_purse.percent_fields(left), right)
    return purse.admit(super().call_binop(context, operator, left, right))

  def call(__self, __context, __obj, *args, **kwargs):
    owner = getattr(__obj, "__self__", None)
    if owner is __self:  # by `_Metering`
      return __obj(*args)
    purse = template_purse.current.get()
    given = {
      name: value
      for name, value in kwargs.items()
      if name not in ("_block_vars", "_loop_vars")  # jinja's own
    }
    # A macro may keep them, as `varargs` and `kwargs`.
    purse.charge((*args, *given.values()))
    purse.check(purse.size((*args, *given.values())))
    if isinstance(__obj, types.BuiltinMethodType) or isinstance(owner, str):
      _check_method(purse, owner, __obj.__name__, (*args, *given.values()))
    return purse.admit(super().call(__context, __obj, *args, **kwargs))

  def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
    wrapped = super().wrap_str_format(value)
    if wrapped is None:
      return None

    def bounded(*args, **kwargs):
      text = value.__self__
      fields = template_purse.brace_fields(text)
      template_purse.current.get().check_format(text, fields, (args, kwargs))
      return wrapped(*args, **kwargs)

    return bounded


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
  purse = template_purse.Purse(max_chars, variables)
  token = template_purse.current.set(purse)
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
    template_purse.current.reset(token)


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
  """Makes loops, macros and whatever builds a value pay."""

  def visit_For(self, node: nodes.For) -> nodes.Node:
    step = _step(node)
    self.generic_visit(node)
    if node.test is None:
      node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
    else:  # passes that it leaves out are passes
      node.test = nodes.Or(step, node.test, lineno=node.lineno)
    return node

  def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
    step = _step(node)
    self.generic_visit(node)
    node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
    return node

  visit_Block = visit_CallBlock = visit_Macro

  def visit_List(self, node: nodes.Expr) -> nodes.Node:
    self.generic_visit(node)
    return _call("admit", node, node)

  visit_Dict = visit_List

  def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
    if node.ctx == "load":
      return self.visit_List(node)
    return self.generic_visit(node)

  def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
    self.generic_visit(node)
    if isinstance(node.arg, nodes.Slice):  # a copy
      return _call("charge", node, node)
    return node

  def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
    self.generic_visit(node)
    return _call("concat", node, nodes.List(node.nodes, lineno=node.lineno))

  def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
    raise jinja2.TemplateSyntaxError("autoescape is not offered", node.lineno)


def _step(node: nodes.Node) -> nodes.Call:
  length = sum(1 for _ in node.find_all(nodes.Node))
  cost = max(STEP_COST, template_purse.POINTER_COST * length)
  return _call("step", node, nodes.Const(cost, lineno=node.lineno))


def _call(method: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Call:
  """A call of a method of `Environment`, in the place of a node."""
  attribute = nodes.EnvironmentAttribute(method)
  call = nodes.Call(attribute, list(args), [], None, None, lineno=node.lineno)
  if node.environment is not None:
    call.set_environment(node.environment)
  return call


def _written(value: Any) -> Any:
  """What {{ value }} writes, which a macro may keep for long."""
  purse = template_purse.current.get(None)
  if purse is None or isinstance(value, str):  # None: while it is compiled
    return value
  return purse.admit(str(value))


def _paid(function: Callable) -> Callable:
  """A filter that pays for its result; attributes that jinja reads stay."""

  @functools.wraps(function)
  def paid(*args, **kwargs):
    # There is none while one compiles, so that nothing is computed then.
    purse = template_purse.current.get()
    return purse.admit(function(*args, **kwargs))

  return paid


def _check_method(
  purse: template_purse.Purse, owner: Any, name: str, args: tuple
) -> None:
  """Refuses a method that is not known, or one that would make too much."""
  kind = next((kind for kind in METHODS if isinstance(owner, kind)), None)
  if kind is None or name not in METHODS[kind]:
    raise jinja2.sandbox.SecurityError(
      f"it calls {type(owner).__name__}.{name}, which is not offered"
    )
  if kind is not str:
    return
  if name == "replace" and len(args) >= 2:
    new = args[1]
    if isinstance(owner, markupsafe.Markup):
      new = owner.escape(new)
    purse.check_replace(owner, args[0], new, *args[2:])
  elif name == "join" and args and hasattr(args[0], "__len__"):
    purse.check(purse.size(args[0]) + len(owner) * len(args[0]))
  elif name in ("split", "rsplit"):
    between = next((arg for arg in args if isinstance(arg, str)), "")
    pieces = owner.count(between) if between else len(owner) // 2
    purse.pay(template_purse.OBJECT_COST * pieces)
  elif name == "splitlines":
    purse.pay(template_purse.OBJECT_COST * template_purse.count_lines(owner))


# Filters in place of jinja's, which do not look at sizes.


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
  text = str(value)
  fields = template_purse.percent_fields(text)
  template_purse.current.get().check_format(text, fields, (args, kwargs))
  return jinja2.filters.do_format(value, *args, **kwargs)


def _indent(
  value: str, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
  purse, lines = template_purse.current.get(), template_purse.count_lines(value)
  size = len(width) if isinstance(width, str) else width
  purse.check(len(value) + lines * (1 + size))
  purse.pay(template_purse.OBJECT_COST * lines)
  return jinja2.filters.do_indent(value, width, first, blank)


@jinja2.pass_environment
def _join(
  environment: jinja2.Environment,
  value: Iterable,
  d: str = "",
  attribute: str | int | None = None,
) -> str:
  if attribute is not None:
    value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
  return template_purse.current.get().join(str(d), map(str, value))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
  text, old, new = str(value), str(old), str(new)
  count = -1 if count is None else count
  template_purse.current.get().check_replace(text, old, new, count)
  return text.replace(old, new, count)


@jinja2.pass_environment
def _sort(
  environment: jinja2.Environment,
  value: Iterable,
  reverse: bool = False,
  case_sensitive: bool = False,
  attribute: str | int | None = None,
) -> list:
  purse, values = template_purse.current.get(), list(value)
  keys = str(attribute).count(",") + 1  # each is a copy in small letters
  purse.check(keys * purse.size(values))
  return jinja2.filters.do_sort(
    environment, values, reverse, case_sensitive, attribute
  )


def _title(value: Any) -> str:
  text = str(value)
  # It is cut into words.
  template_purse.current.get().pay(template_purse.OBJECT_COST * len(text))
  return jinja2.filters.do_title(text)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | str | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """JSON as it is: jinja's own filter escapes for HTML and spells out é."""
  if indent is not None:
    size = len(indent) if isinstance(indent, str) else indent
    if size > _MAX_INDENT:
      raise template_purse.RunawayError(
        f"it indents by {size}, where {_MAX_INDENT} are allowed"
      )
  encoder = json.JSONEncoder(
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )
  return template_purse.current.get().join("", encoder.iterencode(value))


def _raise_exception(message: str) -> None:
  raise RefusalError(message)


def _strftime(now: datetime.datetime, format: str) -> str:
  # The buffer that Python may take for it.
  template_purse.current.get().check(256 * len(format))
  return now.strftime(format)


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

  def __repr__(self) -> str:  # may hold itself, or more than was measured
    return "<Namespace>"


def _check_name(name: str) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.sandbox.SecurityError(f"a namespace has no attribute {name!r}")
