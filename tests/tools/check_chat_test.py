import sys

import pytest

from rlm.data.model_tokenizer import ModelTokenizer
from tests.data import published_folder as published
from tools import check_chat

STYLES = {
  "v3": published.V3,
  "r1": published.R1,
  "r1_0528": published.R1_0528,
  "v31": published.V31,
  "v2": published.V2,
}


class Fake:
  """Stands for transformers' tokenizer: ours, with a fault."""

  def __init__(self, tokenizer, fault=lambda text: text, shift=0):
    self._tokenizer, self._fault, self._shift = tokenizer, fault, shift

  def apply_chat_template(self, messages, *, tokenize, **options):
    options.pop("return_dict", None)
    text = self._tokenizer.chat_template.render(messages, **options)
    if not tokenize:
      return self._fault(text)
    ids = self._tokenizer.encode_chat(messages, **options)
    return [i + self._shift for i in ids]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
  folder = tmp_path_factory.mktemp("published") / "qwen"
  return ModelTokenizer(published.write_qwen(folder))


@pytest.fixture
def compare_all(qwen):
  def compare(**faults):
    cases = check_chat.battery(qwen.chat_template.source())
    fake = Fake(qwen, **faults)
    return [check_chat.compare(qwen, fake, case) for case in cases]

  return compare


def test_without_transformers(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "transformers", None)  # as if not installed
  assert check_chat.main([f"--folder={tmp_path}"]) == 2
  assert "pip install 'rlm[parity]'" in capsys.readouterr().err


def test_the_folder_is_required(capsys):
  with pytest.raises(SystemExit):
    check_chat.main([])
  assert "--folder" in capsys.readouterr().err


def test_the_battery_follows_the_template(qwen):
  names = [c.name for c in check_chat.battery(qwen.chat_template.source())]
  assert len(set(names)) == len(names)
  assert {"plain, prompt", "plain, enable_thinking=False"} <= set(names)
  assert "plain, thinking=True" not in names
  assert "tool result, object, prompt" in names
  plain = [c.name for c in check_chat.battery(published.V3)]
  assert "plain" in plain and not any("tool" in n or "=" in n for n in plain)


def test_equal_sides(compare_all):
  verdicts = compare_all()
  assert all(v.equal for v in verdicts)
  remarks = {v.name: v.remark for v in verdicts}
  assert remarks["the assistant first"] == "both refuse"


def test_differences_are_shown(compare_all, qwen, capsys):
  verdicts = compare_all(fault=lambda text: text.replace("17", "1\x1b7"))
  by_name = {v.name: v for v in verdicts}
  assert not by_name["plain"].equal
  assert by_name["plain"].remark.startswith(
    r"from character 26: ours '\nWhat is 17 * 23?<|im_end|>"
  )
  verdicts = compare_all(shift=-1)
  assert "from token 0: ours ['<|im_start|>'" in verdicts[0].remark
  check_chat.show(verdicts, check_chat.Console(width=200))
  out = capsys.readouterr().out
  assert "\x1b" not in out
  different = sum(not v.equal for v in verdicts)
  assert 0 < different < len(verdicts)  # both refuse some
  assert f"{len(verdicts)} cases, {different} differ." in out


def test_one_side_refuses(compare_all):
  def refuse(text):
    raise KeyError("no such thing")

  verdicts = compare_all(fault=refuse)
  assert "only theirs refuses: KeyError: 'no such thing'" == verdicts[0].remark
  assert not verdicts[0].equal


def test_a_hostile_user(qwen):
  verdict = check_chat.check_hostile_user(qwen)
  assert verdict.equal and verdict.name.startswith("7 control tokens")


@pytest.mark.parametrize("style", [*STYLES, "qwen"])
def test_against_transformers(style, tmp_path, capsys):
  pytest.importorskip("transformers")
  if style == "qwen":
    folder = published.write_qwen(tmp_path)
  else:
    folder = published.write_deepseek(tmp_path, STYLES[style])
  status = check_chat.main([f"--folder={folder}"])
  assert status == 0, capsys.readouterr().out
