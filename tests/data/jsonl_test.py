import pytest

from rlm.data.jsonl import read_jsonl


def test_lines_are_numbered_and_blank_ones_skipped(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "é"}\n\n  \r\n{"text": "b"}', encoding="utf-8")
  assert read_jsonl(path) == [(1, {"text": "é"}), (4, {"text": "b"})]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'{"a": 1}\n{"a": \xff}\n', r"a\.jsonl:2: byte 0xff at column 7 is not"),
    (b'{"a": 1}\n\n{"a": }\n', r"a\.jsonl:3: invalid JSON at column 7: Expect"),
    (b"[1, 2]\n", r"a\.jsonl:1: expected an object \{\.\.\.\}, got list"),
    (b"", r"a\.jsonl is empty: it has no line"),
    (b"\n \n", r"a\.jsonl is empty: it has no line"),
  ],
)
def test_errors_name_file_and_line(tmp_path, content, message):
  path = tmp_path / "a.jsonl"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read_jsonl(path)


def test_missing_file_and_folder(tmp_path):
  with pytest.raises(ValueError, match=r"no file .*none\.jsonl"):
    read_jsonl(tmp_path / "none.jsonl")
  with pytest.raises(ValueError, match=r"is a folder; a \.jsonl file is"):
    read_jsonl(tmp_path)
