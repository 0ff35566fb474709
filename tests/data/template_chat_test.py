import pytest
import tokenizers

from rlm.data.model_tokenizer import ModelTokenizer
from rlm.data.template_chat import INSTRUCTION, TemplateChat
from tests.data import published_folder as published

U, A = "<｜User｜>", "<｜Assistant｜>"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  """Template -> a folder with it; each made once."""
  root, made = tmp_path_factory.mktemp("template_chat"), {}

  def folder(template):
    if template not in made:
      path = root / str(len(made))
      if "im_start" in template:
        published.write_qwen(path, template)
      else:
        published.write_deepseek(path, template)
      made[template] = path
    return made[template]

  return folder


def _messages(*turns):
  return [{"role": role, "content": content} for role, content in turns]


def _shown(chat, turn):
  """What a document says: without loss, then with."""
  tokens, mask = turn
  assert sorted(mask) == mask  # nothing is learned before the response
  said = mask.index(True)
  return chat.tokenizer.decode(tokens[:said]), chat.tokenizer.decode(
    tokens[said:]
  )


PLAIN = _messages(
  ("system", "Add."), ("user", "1+1? naïve"), ("assistant", "2, café")
)


@pytest.mark.parametrize("template", ["V3", "V2", "CHATML"])
def test_plain_turns_are_the_templates_own_rendering(folder_of, template):
  chat = TemplateChat(folder_of(getattr(published, template)))
  messages = [*PLAIN, *_messages(("user", "2+2?"), ("assistant", "4"))]
  first, second = chat.encode_messages(messages)
  for turn, shown in ((first, messages[:3]), (second, messages)):
    tokens, mask = turn
    whole = chat.tokenizer.encode_chat(shown, add_generation_prompt=False)
    assert tokens == whole[: len(tokens)]
    # A newline may follow the token that ends a turn; it is not generated.
    rest = chat.tokenizer.decode(whole[len(tokens) :])
    assert rest in ("", "\n")
    asked = chat.tokenizer.encode_chat(shown[:-1])
    assert tokens[: mask.index(True)] == asked
    assert tokens[-1] == chat.stop_tokens[0] and mask[-1]


def test_r1_opens_thinking_and_drops_it_from_earlier_turns(folder_of):
  chat = TemplateChat(folder_of(published.R1))
  assert chat.opened == "<think>\n"
  first, second = chat.encode_messages(
    _messages(
      ("user", "u"),
      ("assistant", "<think>\nt1\n</think>\n\na1"),
      ("user", "v"),
      ("assistant", "<think>t2</think>a2"),
    )
  )
  assert _shown(chat, first) == (
    f"{BOS}{U}u{A}<think>\n",
    f"t1\n</think>\n\na1{EOS}",
  )
  assert _shown(chat, second) == (
    f"{BOS}{U}u{A}\n\na1{EOS}{U}v{A}<think>\n",
    f"t2</think>a2{EOS}",
  )
  end_think = chat.tokenizer.special_ids["</think>"]
  for tokens, mask in (first, second):
    # One token, and learned: R1's template by itself would have cut it off.
    at = [i for i, token in enumerate(tokens) if token == end_think]
    assert len(at) == 1 and mask[at[0]]


def test_r1_0528_thinks_by_itself(folder_of):
  chat = TemplateChat(folder_of(published.R1_0528))
  [turn] = chat.encode_messages(
    _messages(("user", "u"), ("assistant", "<think>\nt\n</think>\na"))
  )
  assert _shown(chat, turn) == (
    f"{BOS}{U}u{A}",
    f"<think>\nt\n</think>\na{EOS}",
  )


def test_qwen3_writes_empty_thinking_where_there_is_none(folder_of):
  chat = TemplateChat(folder_of(published.QWEN3))
  asked = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
  for content, said in (
    ("a", "<think>\n\n</think>\n\na<|im_end|>"),
    ("<think>\nt\n</think>\n\na", "<think>\nt\n</think>\n\na<|im_end|>"),
  ):
    messages = _messages(("user", "u"), ("assistant", content))
    [turn] = chat.encode_messages(messages)
    assert _shown(chat, turn) == (asked, said)
    whole = chat.tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert turn[0] == whole[: len(turn[0])]


def test_thinking_may_stand_apart(folder_of):
  chat = TemplateChat(folder_of(published.R1))
  asked = {"role": "user", "content": "u"}
  said = {"role": "assistant", "content": "a"}
  for name in ("reasoning_content", "thinking"):
    [turn] = chat.encode_messages([asked, said | {name: "\nt\n"}])
    assert _shown(chat, turn)[1] == f"t\n</think>\n\na{EOS}"
  with pytest.raises(ValueError, match=r"message 1 .* has tool_calls"):
    chat.encode_messages([asked, said | {"tool_calls": [{}]}])


def test_the_date_of_a_template_is_one_for_all_days(folder_of):
  folder = folder_of(published.DATED)
  assert "26 Jul 2024" in _prompt(TemplateChat(folder).tokenizer)
  assert "26 Jul 2024" not in _prompt(ModelTokenizer(folder))


def _prompt(tokenizer):
  return tokenizer.decode(tokenizer.encode_chat(_messages(("user", "u"))))


def test_markup_of_the_assistant_is_learned_as_it_is_sampled(folder_of):
  chat = TemplateChat(folder_of(published.CHATML))
  call = "<tool_call>{}</tool_call>"
  [(tokens, mask)] = chat.encode_messages(
    _messages(("user", call), ("assistant", call))
  )
  for name in ("<tool_call>", "</tool_call>"):
    token = chat.tokenizer.special_ids[name]
    assert [mask[i] for i, t in enumerate(tokens) if t == token] == [True]


def test_a_probe_in_the_templates_own_words(folder_of):
  # A default system prompt that ends by the same token as a turn.
  template = "{{ '<|im_start|>system\\n?!<|im_end|>\\n' }}" + published.CHATML
  chat = TemplateChat(folder_of(template))
  [turn] = chat.encode_messages(_messages(("user", "u"), ("assistant", "a")))
  assert _shown(chat, turn)[1] == "a<|im_end|>"
  end = "{{- '<|im_end|>\n' }}\n{%- endfor"
  assert end in template
  open_end = template.replace(
    end, "{%- if not loop.last %}{{- '<|im_end|>\n' }}{% endif %}\n{%- endfor"
  )
  with pytest.raises(ValueError, match="ends the assistant's turn by none of"):
    TemplateChat(folder_of(open_end))


def test_control_tokens_in_a_text_stay_text(folder_of):
  chat = TemplateChat(folder_of(published.R1))
  [(tokens, _)] = chat.encode_messages(
    _messages(
      ("user", f"x</think>{A}{EOS}"),
      ("assistant", f"<think>t</think>a{EOS}{U}"),
    )
  )
  special = chat.tokenizer.special_ids
  assert [t for t in tokens if t in special.values()] == [
    *(special[BOS], special[U], special[A], special["<think>"]),
    *(special["</think>"], special[EOS]),
  ]


def test_a_worked_solution_is_what_the_parser_reads(folder_of):
  from rlm.rewards.answers import PARSERS

  for name in ("R1", "R1_0528", "CHATML", "V2", "V31", "QWEN3", "OPENED"):
    chat = TemplateChat(folder_of(getattr(published, name)))
    assert bool(chat.opened) == (name in ("R1", "OPENED"))
    said = chat.encode_response("1+1=2", r"\frac{4}{2}")
    assert said[-1] == chat.stop_tokens[0]
    text = chat.response_text(said[:-1])
    response = PARSERS[chat.answer_format](text)
    assert response.well_formed and response.answer == r"\frac{4}{2}"
    if name == "V31":  # which has closed thinking
      assert text == "1+1=2\n\n\\boxed{\\frac{4}{2}}"
    else:
      expected = "<think>\n1+1=2\n</think>\n\n\\boxed{\\frac{4}{2}}"
      assert text == " " * (name == "V2") + expected
      assert response.thinking == "\n1+1=2\n"
    # As a conversation of the same text would be.
    [turn] = chat.encode_messages(
      _messages(("user", chat.question("1+1?")), ("assistant", text))
    )
    assert turn == chat.encode_turn("1+1?", "1+1=2", r"\frac{4}{2}")


def test_a_problem_asks_for_a_box_once(folder_of):
  chat = TemplateChat(folder_of(published.V3))
  assert chat.question("2+2?") == f"2+2?\n{INSTRUCTION}"
  assert chat.question(r"2+2? In \boxed{}.") == r"2+2? In \boxed{}."
  asked = chat.tokenizer.decode(chat.encode_prompt("2+2?"))
  assert asked == f"{BOS}{U}2+2?\n{INSTRUCTION}{A}"


def test_the_end_is_the_one_that_the_template_writes(folder_of, tmp_path):
  # Llama 3's generation_config.json names its end of a text first, which no
  # turn of a chat ends with.
  folder = published.write_qwen(tmp_path)
  ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  end, text_end = map(ids.token_to_id, ("<|im_end|>", "<|endoftext|>"))
  published.write_json(
    folder, "generation_config.json", eos_token_id=[text_end, end]
  )
  assert ModelTokenizer(folder).eos_ids == (text_end, end)
  chat = TemplateChat(folder)
  assert chat.stop_tokens == (end, text_end)
  assert chat.encode_response("t", "a")[-1] == end
  endless = published.CHATML.replace("<|im_end|>", "")
  with pytest.raises(ValueError, match="ends the assistant's turn by none of"):
    TemplateChat(published.write_qwen(tmp_path / "endless", endless))


@pytest.mark.parametrize(
  ("template", "messages", "error"),
  [
    ("V3", _messages(("user", "u")), "roles are user; needed: a conversation"),
    ("V3", _messages(("assistant", "a")), "roles are assistant; needed"),
    ("V3", [], "roles are none; needed"),
    (
      "V3",
      _messages(("user", "u"), ("assistant", " ")),
      r"message 1 \(assistant\) has empty content",
    ),
    (
      "V3",
      _messages(("user", "u"), ("assistant", "a<think>t</think>")),
      r"message 1 \(assistant\) has broken markup",
    ),
    (
      "V3",
      _messages(("user", "u"), ("assistant", "<think>t")),
      r"message 1 \(assistant\) has broken markup",
    ),
    (
      "R1",
      _messages(("user", "u"), ("assistant", "a")),
      r"does not think, but the model's template begins a turn with <think>",
    ),
    (
      "V31",
      _messages(("user", "u"), ("assistant", "<think>t</think>a")),
      r"thinks, but the model's template closes thinking by </think>",
    ),
    (
      "AFTER_USER",
      _messages(("user", "u"), ("tool", "s"), ("assistant", "a")),
      r"message 2 \(assistant\) follows the role 'tool', after which",
    ),
    (
      "CHATML",
      [
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        *_messages(("assistant", "a")),
      ],
      r"message 0 \(user\) has empty content, or none that is a text",
    ),
    (
      "CHATML",
      _messages(("user", "\ud800"), ("assistant", "a")),
      "character 1 of the text is half a surrogate pair",
    ),
  ],
)
def test_errors(folder_of, template, messages, error):
  chat = TemplateChat(folder_of(getattr(published, template)))
  with pytest.raises(ValueError, match=error):
    chat.encode_messages(messages)
