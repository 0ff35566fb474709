import pytest

from rlm.data.chat_formats import load_chat, load_model_chat
from rlm.data.r1_chat import R1Chat
from rlm.data.template_chat import TemplateChat
from rlm.data.tokenizer import ByteTokenizer, HFTokenizer, add_markers
from tests.data import published_folder as published


def test_a_folder_brings_its_own_format(tmp_path):
  assert isinstance(load_chat("bytes").tokenizer, ByteTokenizer)
  folder = published.write_deepseek(tmp_path / "r1", published.R1)
  chat = load_chat(str(folder))
  assert isinstance(chat, TemplateChat)
  with pytest.raises(ValueError, match=r"needs the markers .*add_markers"):
    _ = chat.markers
  add_markers(folder, tmp_path / "marked")
  chat = load_chat(str(tmp_path / "marked"))
  assert isinstance(chat, R1Chat) and isinstance(chat.markers, HFTokenizer)


def test_errors(tmp_path):
  base = published.write_deepseek(tmp_path / "base", None)
  with pytest.raises(
    ValueError, match=r"<answer>, .*add_markers .* own format: no chat template"
  ):
    load_chat(str(base))
  with pytest.raises(ValueError, match=r"no file .*tokenizer\.json"):
    load_chat(str(tmp_path / "absent"))
  with pytest.raises(
    ValueError, match="n_vocab_used=5, but the tokenizer 'bytes' uses 268 ids"
  ):
    load_model_chat("bytes", 5)
