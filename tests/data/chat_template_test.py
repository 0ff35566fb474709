import json
import re

import jinja2
import pytest

from rlm.data import template_purse
from rlm.data.chat_template import ChatTemplate
from tests.data import published_folder as published

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "2+2?"}
THOUGHT = {"role": "assistant", "content": "<think>\nadd</think>\n\n4"}
SAID = {"role": "assistant", "content": "4"}
AGAIN = {"role": "user", "content": "And 3+3?"}
TOOL = {
  "type": "function",
  "function": {"name": "add", "description": "a < b & é", "parameters": {}},
}


@pytest.fixture
def template(tmp_path):
  def load(source, **config):
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    config = {"chat_template": source, **tokens, **config}
    published.write_json(tmp_path, "tokenizer_config.json", **config)
    return ChatTemplate(tmp_path)

  return load


# What the published templates write, spelt out: bars U+FF5C, breaks U+2581.
BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"


@pytest.mark.parametrize(
  ("source", "messages", "extra", "expected"),
  [
    (
      published.V3,
      [SYSTEM, ASK, SAID, AGAIN],
      {},
      f"{BOS}Be brief.<｜User｜>2+2?<｜Assistant｜>4{EOS}"
      "<｜User｜>And 3+3?<｜Assistant｜>",
    ),
    (
      published.V3,
      [SYSTEM, {"role": "system", "content": "In French."}, ASK],
      {},
      f"{BOS}Be brief.\n\nIn French.<｜User｜>2+2?<｜Assistant｜>",
    ),
    (
      published.R1,
      [ASK, THOUGHT, AGAIN],
      {},
      f"{BOS}<｜User｜>2+2?<｜Assistant｜>\n\n4{EOS}"
      "<｜User｜>And 3+3?<｜Assistant｜><think>\n",
    ),
    (
      published.R1_0528,
      [SYSTEM, ASK, THOUGHT, AGAIN],
      {},
      f"{BOS}Be brief.<｜User｜>2+2?<｜Assistant｜>\n\n4{EOS}"
      "<｜User｜>And 3+3?<｜Assistant｜>",
    ),
    (
      published.V31,
      [ASK, THOUGHT, AGAIN],
      {"thinking": True},
      f"{BOS}<｜User｜>2+2?<｜Assistant｜></think>\n\n4{EOS}"
      "<｜User｜>And 3+3?<｜Assistant｜><think>",
    ),
    (
      published.V31,
      [ASK],
      {},
      f"{BOS}<｜User｜>2+2?<｜Assistant｜></think>",
    ),
    (
      published.V2,
      [SYSTEM, ASK, SAID, AGAIN],
      {},
      f"{BOS}Be brief.\n\nUser: 2+2?\n\nAssistant: 4{EOS}"
      "User: And 3+3?\n\nAssistant:",
    ),
    (
      published.CHATML,
      [SYSTEM, ASK],
      {},
      "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?"
      "<|im_end|>\n<|im_start|>assistant\n",
    ),
  ],
)
def test_the_styles_of_the_sheet(template, source, messages, extra, expected):
  loaded = template(source, bos_token=BOS, eos_token=EOS)
  text = loaded.render(messages, add_generation_prompt=True, **extra)
  assert text == expected
  without = loaded.render(messages, **extra)
  assert expected.startswith(without) and without != expected


def test_tools_and_their_calls(template):
  call = {"type": "function", "function": {"name": "add", "arguments": "é"}}
  messages = [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
  text = template(published.CHATML).render(messages, tools=[TOOL])
  assert (
    text
    == (
      "<|im_start|>system\n<tools>\n"
      + json.dumps(TOOL, ensure_ascii=False)
      # Neither HTML nor ASCII: & and é as they are.
      + "\n</tools><|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
      '<|im_start|>assistant\n\n<tool_call>\n{"name": "add", "arguments": "é"}'
      "\n</tool_call><|im_end|>\n"
    )
  )


def test_thinking_by_any_of_its_names(template):
  loaded = template("{{ messages[0].reasoning_content }}")
  for name in ("reasoning_content", "thinking", "reasoning"):
    assert loaded.render([{"role": "assistant", name: "hm"}]) == "hm"
  assert template("{{ messages[0].thinking }}").render([{"reasoning": "hm"}])


def test_which_file_and_which_template(tmp_path, template):
  config = tmp_path / "tokenizer_config.json"
  assert template("from the config").render([ASK]) == "from the config"
  several = [
    {"name": "default", "template": "plain"},
    {"name": "tool_use", "template": "with tools"},
    {"name": "rag", "template": "{% unread"},
  ]
  loaded = template(several)
  assert loaded.render([ASK]) == "plain"
  assert loaded.render([ASK], tools=[TOOL]) == "with tools"
  assert loaded.source(with_tools=True) == "with tools"
  assert loaded.path() == config
  (tmp_path / "chat_template.jinja").write_text("from the file")
  loaded = template(several)
  assert loaded.render([ASK], tools=[TOOL]) == "from the file"
  assert loaded.path() == tmp_path / "chat_template.jinja"
  (tmp_path / "additional_chat_templates").mkdir()
  path = tmp_path / "additional_chat_templates" / "tool_use.jinja"
  path.write_text("from the other file")
  assert template(several).render([ASK], tools=[TOOL]) == "from the other file"
  (tmp_path / "chat_template.jinja").unlink()
  with pytest.raises(ValueError, match="for conversations with tools only"):
    template(None).render([ASK])


def test_no_template(template):
  for nothing in (None, [], [{"name": "rag", "template": ""}]):
    with pytest.raises(ValueError, match=r"no chat template in .*\.jinja"):
      template(nothing)
  with pytest.raises(ValueError, match="neither a text nor a list"):
    template(["text"])
  with pytest.raises(ValueError, match="is a int, not a text"):
    template([{"name": "default", "template": 3}])


def test_special_tokens_as_strings_or_objects(template):
  source = "{{ bos_token }}{{ eos_token }}{{ pad_token }}"
  pad = {"content": "<pad>", "lstrip": False}
  loaded = template(source, pad_token=pad, add_bos_token=True, unk_token=None)
  assert loaded.special_tokens == {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
  }
  assert loaded.render([ASK]) == "<s></s><pad>"
  assert loaded.render([ASK], eos_token="!") == "<s>!<pad>"


def test_the_language_is_that_of_transformers(template):
  source = """
  {%- for m in messages %}
    {%- if loop.index == 3 %}{% break %}{% endif %}
    {% generation %}
{{ m.role }},
    {% endgeneration %}
  {%- endfor %}
{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}
{% set captured %}{{ twice("ab") }}{% endset %}
{{ captured }} {{ dict(a=1) | tojson(indent=1) }} {{ "%s!" % 7 }}
{{ tools is none }} {{ documents is none }} {{ strftime_now("%Y") }}"""
  text = template(source).render([ASK] * 4)
  assert re.fullmatch(
    'user,\nuser,\nabab {\n "a": 1\n} 7!\nTrue True \\d{4}', text.lstrip()
  ), text


def test_a_refusal_has_the_words_of_the_template(template, tmp_path):
  with pytest.raises(
    ValueError, match=r"tokenizer_config\.json refuses .*cannot speak first"
  ):
    template(published.CHATML).render([SAID])


def test_a_template_that_cannot_be_read(template):
  with pytest.raises(
    ValueError, match=r"tokenizer_config\.json is no Jinja .* line 2"
  ):
    template("\n{% if %}")
  with pytest.raises(ValueError, match="line 1: No filter named 'center'"):
    template("{{ 'a' | center(1000000000) }}")
  with pytest.raises(ValueError, match="nests too deep"):
    template("{{ " + "(" * 5000 + ")" * 5000 + " }}")


@pytest.mark.parametrize(
  "source",
  [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ namespace(__class__=1) }}",
    "{% set n = namespace() %}{% set n._x = 1 %}",
    "{{ '{0.__class__.x}'.format(messages) }}",
    "{{ dict.__call__.x }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ (5).to_bytes(1000000000) }}",
  ],
)
def test_the_sandbox_holds(template, source):
  with pytest.raises(
    ValueError, match=r"config\.json does what no template may: .*trust"
  ):
    template(source).render([ASK])


@pytest.mark.parametrize(
  "source",
  [
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}"
    "{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{% for i in range(9999) %}{{ 'long' * 1000 }}{% endfor %}",
  ],
)
def test_a_runaway_is_stopped(template, source, monkeypatch):
  monkeypatch.setattr(template_purse, "MAX_WORK", 30_000_000)
  with pytest.raises(ValueError, match=r"config\.json was stopped: it"):
    template(source).render([ASK])


def test_recursion_and_range_are_bounded(template):
  loop = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
  with pytest.raises(ValueError, match="RecursionError"):
    template(loop).render([ASK])
  with pytest.raises(ValueError, match="OverflowError"):
    template("{{ range(10**7) }}").render([ASK])


def test_long_conversations_are_no_runaways(template):
  messages = [{"role": "user", "content": "x" * 50}] * 5000
  text = template(published.CHATML).render(messages)
  assert text.count("x") == 250_000


def test_an_error_in_an_operation_names_the_file(template):
  with pytest.raises(
    ValueError, match=r"config\.json fails on these messages: TypeError"
  ):
    template("{{ messages[0].content + 1 }}").render([ASK])


def test_messages_are_plain_data(template):
  loaded = template("{{ messages }}")
  with pytest.raises(ValueError, match="conversation is empty"):
    loaded.render([])
  with pytest.raises(ValueError, match=r"messages\[1\] is a str"):
    loaded.render([ASK, "hi"])
  with pytest.raises(
    ValueError, match=r"messages\[0\]\['content'\] is a Undef"
  ):
    loaded.render([{"role": "user", "content": jinja2.Undefined()}])


def test_a_config_that_is_no_object(tmp_path):
  (tmp_path / "tokenizer_config.json").write_text("[]")
  with pytest.raises(ValueError, match="holds a list, not an object"):
    ChatTemplate(tmp_path)
