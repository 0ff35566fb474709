import json
import subprocess
import sys

import pytest

from rlm.data import template_sandbox

# 'x' is 900,000 characters, near the most that a value may have.
X = "{% set x = 'c' * 900000 %}"
TWICE = "{% set n = namespace(x=['a']) %}{% for i in range(99) %}"
BOMBS = [
  "{{ ('a' * 40000).replace('a', 'b' * 20000) }}",
  "{{ ('a' * 40000) | replace('a', 'b' * 20000) }}",
  "{{ ('a' * 40000) | safe | replace('', 'b' * 20000) }}",
  "{{ (('a' * 40000) | safe).replace('a', '<' * 20000) }}",
  "{{ [[1]] | tojson(indent=900000000) }}",
  X + "{{ [1] | tojson(indent=x) }}",
  X + "{{ range(9999) | list | tojson(separators=(x, ':')) }}",
  X + "{{ [x] * 1000 }}",
  X + "{{ ([x] * 1000) | tojson }}",
  X + "{{ ([x] * 1000) | string }}",
  X + "{{ ([x] * 1000) | upper }}",
  X + "{{ ([x] * 1000) | sort }}",
  X + "{{ ['C' * 900] | sort(attribute='0,' * 100000) }}",
  X + "{{ [(x | safe).strip] * 1000 }}",
  X + "{{ [" + "x," * 1000 + "] }}",
  X + "{{ (" + "x," * 1000 + ")[1:] }}",
  X + "{{ {" + "".join(f"{i}: x," for i in range(1000)) + "} }}",
  X + "{{ dict.fromkeys(range(1000), x) }}",
  X + "{{ " + " ~ ".join(["x"] * 1000) + " }}",
  X + "{% set y %}" + "{{ x }}" * 1000 + "{% endset %}",
  X + "{% macro f() %}" + "{{ x }}" * 1000 + "{% endmacro %}{{ f() }}",
  X + "{% filter upper %}" + "{{ x }}" * 1000 + "{% endfilter %}",
  X + "{% set l = [x] %}{% set y %}{% for i in range(9999) %}{{ l }}"
  "{% endfor %}{% endset %}",
  X + "{{ x.join('ccc' * 1000) }}",
  X + "{{ x.join(['c'] * 1000) }}",
  X + "{{ range(1000) | join(x) }}",
  X + "{{ '%(a)s' * 1000 % {'a': x} }}",
  X + "{{ ('%(a)s' * 1000) % {'a': x} }}",
  X + "{{ ('%(a)s' * 1000) | format(a=x) }}",
  X + "{{ ('{0}{00}' * 1000).format(x) }}",
  X + "{{ ('{a}' * 1000).format_map({'a': x}) }}",
  "{{ ('%99999d' * 9999) % range(9999) }}",
  "{{ '%(a)900000000d' % {'a': 1} }}",
  "{{ '%.900000000f' % 1 }}",
  "{{ '%*d' % (900000000, 1) }}",
  "{{ '{:٩٠٠٠٠٠٠٠٠}'.format(1) }}",
  "{{ '{:{}}'.format(1, 900000000) }}",
  "{{ ('a\\n' * 40000) | indent('b' * 60000) }}",
  "{{ 'a\\nb' | indent(900000000) }}",
  "{{ ('a' * 40000) | wordwrap(1, wrapstring='b' * 60000) }}",
  "{{ '\\t'.expandtabs(900000000) }}",
  "{{ 'a'.translate({97: 'b' * 900000}) }}",
  "{{ 'a'.center(900000000) }}{{ 'a'.ljust(900000000) }}",
  "{{ 'a'.zfill(900000000) }}",
  "{{ (1).to_bytes(900000000, 'big') }}",
  "{{ 'a' | center(900000000) }}",
  "{{ 'a' | batch(900000000, 'b') | list }}",
  "{{ 'a' | slice(900000000) | list }}",
  "{{ [[0] * 100000] * 9999 | sum(start=[]) }}",
  "{{ {'a': 'b'} | xmlattr }}{{ 'a' | urlize }}{{ 'a' | attr('upper') }}",
  "{{ 2 ** 900000000 }}",
  "{% set n = namespace(x=3) %}{% for i in range(40) %}"
  "{% set n.x = n.x * n.x %}{% endfor %}",
  TWICE + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
  TWICE + "{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x == 1 }}",
  TWICE + "{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}{{ n.x }}",
  TWICE + "{% set n.x = dict(a=n.x, b=n.x).values() %}{% endfor %}",
  TWICE + "{% set n.x = {1: n.x, 2: n.x} | items %}{% endfor %}",
  "{% set n = namespace(x=1) %}{% macro f() %}{% set n.x = varargs %}"
  "{% endmacro %}{% for i in range(99) %}{{ f(n.x, n.x) }}{% endfor %}",
  "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
  "{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
  "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
  "{% set n.x = n.x | map('upper') %}{% endfor %}{{ n.x | tojson }}"
  "{{ 'a' * 900000000 }}",
  X + "{% set n = namespace(l=[]) %}{% for i in range(9999) %}"
  "{% set n.l = [x[1:]] %}{% endfor %}",
  "{% for i in range(99999) %}{% for j in range(99999) if false %}"
  "{% endfor %}{% endfor %}",
  "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
  "{% autoescape 'a' * 900000000 %}{% endautoescape %}",
  "{{ 'a' | replace('a', 'b') | indent(900000) }}" * 3
  + "{{ 'a' * 900000000 }}",
  "{{ strftime_now('%c' * 400000) }}",
]

# Renders the templates it is given, and says how each ended and the memory
# that all of them took at most. MAX_WORK is lowered, as a template may well
# hold as many bytes once it has paid for them. Without limits of the system a
# failing test would take the machine down.
CHILD = """
import json, resource, sys
from rlm.data import template_purse, template_sandbox
template_purse.MAX_WORK = 100_000_000
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
ends = []
for source in json.load(sys.stdin):
  try:
    template = template_sandbox.Environment().from_string(source)
    template_sandbox.render(template, {}, max_chars=1_000_000)
    ends.append("rendered")
  except Exception as error:
    ends.append(type(error).__name__)
with open("/proc/self/status") as status:
  peak = next(line for line in status if line.startswith("VmHWM"))
json.dump([ends, int(peak.split()[1])], sys.stdout)
"""
REFUSALS = {
  "RecursionError",
  "RunawayError",
  "SecurityError",
  "TemplateAssertionError",  # no such filter
  "TemplateSyntaxError",
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_bomb_fills_the_memory():
  done = subprocess.run(
    [sys.executable, "-c", CHILD],
    input=json.dumps(BOMBS),
    capture_output=True,
    text=True,
    check=True,
    timeout=60,
  )
  ends, peak_kb = json.loads(done.stdout)
  passed = [
    (end, source[:120])
    for end, source in zip(ends, BOMBS, strict=True)
    if end not in REFUSALS
  ]
  assert not passed
  assert peak_kb < 150_000


def render(source, **variables):
  template = template_sandbox.Environment().from_string(source)
  return template_sandbox.render(template, variables, max_chars=1_000_000)


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    ("{{ 'a-b'.replace('-', '+') }}{{ 'aa' | replace('a', 'b', 1) }}", "a+bba"),
    ("{{ ('a<' | safe).replace('a', '<') }}", "&lt;<"),
    ("{{ ('<' | safe) + '<' }}{{ ('<' | safe) ~ '<' }}", "<&lt;<<"),
    ("{{ 'a, b'.split(', ') | join('|') }}", "a|b"),
    ("{{ [d, d] | join('|', attribute='k') }}", "é|é"),
    ("{{ '|'.join(['a', 'b'] + ['c']) }}", "a|b|c"),
    ("{{ 'a\\nb' | indent(2) }}", "a\n  b"),
    ("{{ 'a\\nb' | indent('>', true) }}", ">a\n>b"),
    ("{{ '%s %5.2f%%' % ('a', 1.5) }}", "a  1.50%"),
    ("{{ '%(a)s%(a)s' | format(a=1) }}", "11"),
    ("{{ '{} {a[k]:>3}'.format(1, a=d) }}", "1   é"),
    ("{{ '{{\"a\": {0}}} {0}'.format(1) }}", '{"a": 1} 1'),
    ("{{ d | tojson }}", '{"k": "é"}'),
    ("{{ d | tojson(ensure_ascii=true) }}", '{"k": "\\u00e9"}'),
    ("{{ [1, [2]] | tojson(indent=1) }}", "[\n 1,\n [\n  2\n ]\n]"),
    ("{{ d | tojson(separators=(',', ':')) }}", '{"k":"é"}'),
    ("{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}", "ké"),
    ("{% for k, v in d | items %}{{ k }}{{ v }}{% endfor %}", "ké"),
    ("{{ d.keys() | list }} {{ 'k' in d.keys() }}", "['k'] True"),
    ("{{ ['b', 'A'] | sort | join }} {{ 'it is' | title }}", "Ab It Is"),
    ("{{ range(3) | list }} {{ 'ab' | list }}", "[0, 1, 2] ['a', 'b']"),
    ("{{ [d, {}] | selectattr('k', 'defined') | list | length }}", "1"),
    ("{{ ['a', 1] | select('string') | map('upper') | first }}", "A"),
    ("{{ x | default([]) | length }}{{ (x | d('y')) is string }}", "0True"),
    ("{{ 'abc'[::-1] }}{{ [1, 2, 3][1:] }}{{ (1, 2)[0] }}", "cba[2, 3]1"),
    (
      "{% for i in range(4) if i % 2 %}{{ loop.last }}{% endfor %}",
      "FalseTrue",
    ),
    ("{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1, b=3) }}", "13"),
    ("{% call(x) f() %}{{ x }}{% endcall %}", "7"),
    ("{{ namespace(a=[1]) }}{{ none }}{{ 1.5 }}{{ x }}", "<Namespace>None1.5"),
    ("{{ (messages + [d])[-1].k }}{{ messages == [d] }}", "éTrue"),
    ("{{ dict(d, j=1) }}", "{'k': 'é', 'j': 1}"),
  ],
)
def test_what_templates_do_is_as_in_jinja(source, expected):
  if "call(x)" in source:
    source = "{% macro f() %}{{ caller(7) }}{% endmacro %}" + source
  assert render(source, d={"k": "é"}, messages=[{"k": "é"}]) == expected


def test_appending_in_a_loop_is_cheap():
  source = (
    "{% set n = namespace(l=[]) %}{% for m in messages %}"
    "{% set n.l = n.l + [m] %}{% endfor %}{{ n.l | length }}"
  )
  messages = [{"role": "user", "content": "x"} for _ in range(5000)]
  assert render(source, messages=messages) == "5000"


def test_json_of_large_tools_is_no_bomb():
  tools = [{"name": "é" * 100, "parameters": {"a": [1, None]}}] * 1000
  text = render("{{ tools | tojson }}", tools=tools)
  assert text == json.dumps(tools, ensure_ascii=False)
