import json

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlm.data import tokenizer as tokenizer_lib
from rlm.data.tokenizer import (
  MARKERS,
  ByteTokenizer,
  HFTokenizer,
  StreamDecoder,
  add_markers,
  missing_markers,
)


def _train_bpe(folder, markers, *, decoder=None):
  """A byte-level BPE laid out as DeepSeek's: some markers not "special"."""
  tok = tokenizers.Tokenizer(models.BPE())
  tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tok.decoder = decoder or decoders.ByteLevel()
  tok.train_from_iterator(
    ["the cat sat on the mat, naïve café 東京"] * 4,
    trainers.BpeTrainer(
      vocab_size=300,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  tok.add_special_tokens([m for m in markers if "think" not in m])
  tok.add_tokens([m for m in markers if "think" in m])
  tok.add_tokens(["    "])  # added, but ordinary text
  folder.mkdir(exist_ok=True)
  tok.save(str(folder / "tokenizer.json"))
  return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
  return HFTokenizer(
    _train_bpe(tmp_path_factory.mktemp("tok") / "full", MARKERS)
  )


def test_byte_ids_by_hand():
  tok = ByteTokenizer()
  assert tok.encode("aé") == [97, 0xC3, 0xA9]
  assert (tok.bos_id, tok.eos_id, tok.pad_id) == (256, 257, 258)
  assert (tok.think_id, tok.end_think_id) == (264, 265)
  assert (tok.answer_id, tok.end_answer_id) == (266, 267)
  assert tok.n_vocab_used == 268
  assert tok.encode("<think>a</think>", allow_special=True) == [264, 97, 265]


def test_markers_are_deepseeks_strings():
  # The published strings: full-width bars U+FF5C, word breaks U+2581.
  assert tokenizer_lib.BOS == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
  assert tokenizer_lib.PAD == "<\uff5c\u2581pad\u2581\uff5c>"
  assert tokenizer_lib.FIM_HOLE == "<\uff5cfim\u2581hole\uff5c>"
  assert len(set(MARKERS)) == 12


@given(st.text())
def test_bytes_round_trip(text):
  tok = ByteTokenizer()
  ids = tok.encode(text)
  assert tok.decode_bytes(ids) == text.encode()
  assert tok.decode(ids) == text
  assert tok.encode_batch([text])[0].tolist() == ids


@given(st.lists(st.sampled_from([*MARKERS, "a", "<", "think>", "é"])))
def test_user_text_never_becomes_a_marker(parts):
  tok = ByteTokenizer()
  text = "".join(parts)
  assert not any(tok.is_special(i) for i in tok.encode(text))
  marked = tok.encode(text, allow_special=True)
  assert tok.decode(marked) == text


@given(st.lists(st.integers(0, 267)))
def test_stream_equals_decode_for_any_bytes(ids):
  tok = ByteTokenizer()
  stream = StreamDecoder(tok)
  text = "".join(map(stream.push, ids)) + stream.finish()
  assert text == tok.decode(ids)


def test_stream_holds_back_half_a_character():
  tok = ByteTokenizer()
  stream = StreamDecoder(tok)
  assert [stream.push(i) for i in tok.encode("é€")] == ["", "é", "", "", "€"]
  assert stream.push(0xE2) == ""
  assert stream.finish() == "\ufffd"
  assert stream.push(97) == "a"  # ready again


@given(text=st.text())
def test_hf_round_trip(hf, text):
  ids = hf.encode(text)
  assert hf.decode_bytes(ids) == text.encode()
  assert hf.encode_batch([text])[0].tolist() == ids
  stream = StreamDecoder(hf)
  assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_hf_markers_only_when_asked(hf):
  for marker in MARKERS:
    text = f"the {marker} cat"
    assert not any(hf.is_special(i) for i in hf.encode(text)), marker
    assert hf.decode(hf.encode(text)) == text
    ids = hf.encode(text, allow_special=True)
    assert hf.special_ids[marker] in ids
    assert hf.decode(ids) == text


def test_hf_plain_text_has_the_ids_of_the_file(hf):
  # Ordinary added tokens ("    ") keep their id though markers are hidden.
  reference = tokenizers.Tokenizer.from_file(str(hf._path))
  text = "the cat    sat on 東京"
  assert hf.encode(text) == reference.encode(text, add_special_tokens=False).ids
  assert reference.token_to_id("    ") in hf.encode(text)


def test_text_lengths_count_bytes_and_not_markers(hf):
  for tok in (ByteTokenizer(), hf):
    text = "the café"
    ids = [tok.bos_id, *tok.encode(text), tok.eos_id]
    assert tok.text_lengths()[np.array(ids)].sum() == len(text.encode())
    assert tok.text_lengths().shape == (tok.n_vocab_used,)


def test_hf_names_every_missing_marker_and_add_markers_cures(tmp_path):
  have = [m for m in MARKERS if "answer" not in m]
  folder = _train_bpe(tmp_path / "r1", have)
  with pytest.raises(
    ValueError, match=r"lacks the single tokens <answer>, </answer>\. Write"
  ):
    HFTokenizer(folder)
  assert missing_markers(folder) == ["<answer>", "</answer>"]
  before = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  (folder / "chat_template.jinja").write_text("{{ messages }}")
  added = add_markers(folder, tmp_path / "new")
  assert (tmp_path / "new" / "chat_template.jinja").is_file()
  assert added == ["<answer>", "</answer>"]
  tok = HFTokenizer(tmp_path / "new")
  assert tok.answer_id == before.get_vocab_size()
  assert tok.think_id == before.token_to_id("<think>")


def test_errors_of_a_folder(tmp_path):
  with pytest.raises(ValueError, match=r"no file .*tokenizer\.json.*\"bytes\""):
    HFTokenizer(tmp_path / "byte")
  (tmp_path / "tokenizer.json").write_text("{]")
  with pytest.raises(ValueError, match="no tokenizer file that the"):
    HFTokenizer(tmp_path)
  folder = _train_bpe(tmp_path / "meta", MARKERS, decoder=decoders.Metaspace())
  with pytest.raises(ValueError, match=r"\['Metaspace'\], not ByteLevel"):
    HFTokenizer(folder)


def test_hf_refuses_a_model_that_spells_a_marker(tmp_path):
  folder = _train_bpe(tmp_path / "leaky", MARKERS)
  path = folder / "tokenizer.json"
  spec = json.loads(path.read_text())
  spec["pre_tokenizer"] = None  # whole strings reach the model
  spec["model"]["ignore_merges"] = True  # and match its words
  path.write_text(json.dumps(spec))
  with pytest.raises(ValueError, match=r"spells .*<think>.* as a marker"):
    HFTokenizer(folder)


def test_token_bytes_outside_the_vocabulary():
  with pytest.raises(ValueError, match=r"token id 268 is outside .* 0\.\.267"):
    ByteTokenizer().decode([268])
