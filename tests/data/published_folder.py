"""Folders laid out as published models' are, with templates of our own.

The templates are written for these tests, in the styles that DeepSeek's and
Qwen's folders have; the tokenizers are trained on the spot.
"""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlm.data.tokenizer import ASSISTANT, BOS, EOS, PAD, USER

V3 = """
{%- set ns = namespace(system='', first=true) %}
{%- for m in messages if m['role'] == 'system' %}
  {%- if ns.first %}{% set ns.system = m['content'] %}{% set ns.first = false %}
  {%- else %}{% set ns.system = ns.system + '\n\n' + m['content'] %}
  {%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for m in messages %}
  {%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}
  {%- elif m['role'] == 'assistant' %}
    {{- '<｜Assistant｜>' + m['content'] + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}
"""

_CUT = """
    {%- set content = m['content'] %}
    {%- if '</think>' in content %}
      {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<｜Assistant｜>' + content + eos_token }}
"""
R1_0528 = V3.replace(
  "\n    {{- '<｜Assistant｜>' + m['content'] + eos_token }}\n", _CUT
)
R1 = R1_0528.replace(
  "{{ '<｜Assistant｜>' }}{% endif", "{{ '<｜Assistant｜><think>\\n' }}{% endif"
)
V31 = R1_0528.replace(
  "'<｜Assistant｜>' + content", "'<｜Assistant｜></think>' + content"
).replace(
  "{{ '<｜Assistant｜>' }}{% endif",
  "{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif",
)

V2 = """
{{- bos_token }}
{%- for m in messages %}
  {%- if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}
  {%- elif m['role'] == 'assistant' %}
    {{- 'Assistant: ' + m['content'] + eos_token }}
  {%- else %}{{ m['content'] + '\n\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""

CHATML = """
{%- if tools %}
  {{- '<|im_start|>system\n<tools>' }}
  {%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
  {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
  {%- if loop.first and m.role == 'assistant' %}
    {{- raise_exception('The assistant cannot speak first.') }}
  {%- endif %}
  {{- '<|im_start|>' + m.role + '\n' }}
  {%- if m.role == 'assistant' and m.reasoning_content is defined
      and not loop.last %}
    {{- (m.content or '') | trim }}
  {%- elif m.reasoning_content is defined %}
    {{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' + m.content }}
  {%- else %}{{ m.content | trim }}
  {%- endif %}
  {%- for call in m.tool_calls or [] %}
    {{- '\n<tool_call>\n' }}{{ call.function | tojson }}{{ '\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and not enable_thinking %}
    {{- '<think>\n\n</think>\n\n' }}
  {%- endif %}
{%- endif %}
"""

# Qwen3's: thinking that the last turn brings is written anew, empty if none.
QWEN3 = """
{%- for m in messages %}
  {{- '<|im_start|>' + m.role + '\\n' }}
  {%- if m.role == 'assistant' %}
    {%- set reasoning = '' %}
    {%- set content = m.content %}
    {%- if '</think>' in content %}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.last %}
      {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content }}
  {%- else %}{{ m.content }}{% endif %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
# Qwen3-Thinking's: the prompt opens what the last turn writes, too.
_BEGIN = "<|im_start|>assistant\\n"
OPENED = QWEN3.replace(
  _BEGIN + "' }}{% endif", _BEGIN + "<think>\\n' }}{% endif"
)
_BY_USER = " and messages[-1]['role'] == 'user'"
AFTER_USER = V3.replace(
  "add_generation_prompt", "add_generation_prompt" + _BY_USER
)
# Llama 3's: a system message with the date.
DATED = (
  "{{ '<|im_start|>system\\n' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}"
  + CHATML
)

DEEPSEEK_SPECIAL = (BOS, EOS, PAD)
DEEPSEEK_ADDED = (USER, ASSISTANT, "<think>", "</think>")  # not flagged special
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def train(folder, special, added, *, decoder=None):
  """Writes the tokenizer.json of a small byte-level BPE."""
  tok = tokenizers.Tokenizer(models.BPE())
  tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tok.decoder = decoder or decoders.ByteLevel()
  tok.train_from_iterator(
    ["the cat sat on the mat, naïve café 東京 think User: Assistant"] * 4,
    trainers.BpeTrainer(
      vocab_size=340,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  tok.add_special_tokens(list(special))
  tok.add_tokens(list(added))
  tok.add_tokens(["    "])  # added, but ordinary text
  folder.mkdir(parents=True, exist_ok=True)
  tok.save(str(folder / "tokenizer.json"))
  return folder


def write_json(folder, name, **values):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(json.dumps(values))
  return folder


def write_deepseek(folder, template, **config):
  """A folder in the style of DeepSeek's, whose pad token is EOS."""
  train(folder, DEEPSEEK_SPECIAL, DEEPSEEK_ADDED)
  values = {
    "tokenizer_class": "LlamaTokenizerFast",
    "bos_token": {"__type": "AddedToken", "content": BOS},
    "eos_token": {"__type": "AddedToken", "content": EOS},
    "pad_token": {"__type": "AddedToken", "content": EOS},
    "add_bos_token": True,
    "chat_template": template,
  }
  return write_json(folder, "tokenizer_config.json", **(values | config))


def write_qwen(folder, template=CHATML):
  """A folder in the style of Qwen's: no BOS, two tokens that end."""
  train(folder, QWEN_SPECIAL, QWEN_ADDED)
  (folder / "chat_template.jinja").write_text(template)
  ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  ends = [ids.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
  write_json(folder, "generation_config.json", eos_token_id=ends)
  return write_json(
    folder,
    "tokenizer_config.json",
    tokenizer_class="Qwen2Tokenizer",
    bos_token=None,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    add_bos_token=False,
  )
