"""Safetensors are read as the library reads them; hostile files are refused."""

import json
import os
import pathlib
import struct
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.checkpoint.tensor_files import DTYPES, open_tensors

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = bytes(range(24))
# Two tensors in 24 bytes: the smallest file with something to get wrong.
HEADER = {
  "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
  "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
  return tmp_path_factory.mktemp("fuzzed")


def file_of(header, data=DATA):
  """A safetensors file of a header, which may be JSON text or bytes."""
  if not isinstance(header, (str, bytes)):
    header = json.dumps(header)
  raw = header.encode() if isinstance(header, str) else header
  return struct.pack("<Q", len(raw)) + raw + data


def entry(name, **changes):
  return {**HEADER, name: {**HEADER[name], **changes}}


def save(folder, tensors, name="model.safetensors"):
  safetensors.numpy.save_file(tensors, folder / name)


def save_shards(folder, shards, **index):
  """A folder with an index; `index` replaces entries of it."""
  weight_map = {}
  for i, tensors in enumerate(shards, 1):
    name = f"model-{i:05}-of-{len(shards):05}.safetensors"
    save(folder, tensors, name)
    weight_map |= dict.fromkeys(tensors, name)
  content = {"metadata": {}, "weight_map": weight_map, **index}
  (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def tensors_of_every_dtype():
  rng = np.random.default_rng(0)
  found = {}
  for name, dtype in DTYPES.items():
    if name != "F8_E8M0":  # the library's numpy face has none
      data = rng.integers(0, 2 if name == "BOOL" else 100, (3, 4, 5))
      found[f"x.{name}"] = data.astype(dtype)
  found["scalar"] = np.array(3, np.float32)
  found["empty"] = np.zeros((0, 7), np.float16)
  found["vector"] = np.arange(11, dtype=np.int64)
  return found


def assert_same(a, b):
  assert a.dtype == b.dtype and a.shape == b.shape
  assert a.tobytes() == b.tobytes()


def test_every_dtype_as_the_library_writes_it(tmp_path):
  tensors = tensors_of_every_dtype()
  save(tmp_path, tensors)
  opened = open_tensors(tmp_path)
  assert sorted(opened.names()) == sorted(tensors)
  for name, tensor in tensors.items():
    assert name in opened and opened.nbytes(name) == tensor.nbytes
    assert opened.shape(name) == tensor.shape
    assert opened.dtype(name) == tensor.dtype
    read = opened.read(name)
    assert_same(read, tensor)
    assert read.flags.owndata and read.flags.writeable
  assert "y" not in opened and 3 not in opened


def test_a_file_by_hand(tmp_path):
  data = np.array([1.5, -2], np.float32).tobytes() + bytes([127, 128])
  header = (
    '{"__metadata__":{"format":"pt"},'
    '"s":{"dtype":"F8_E8M0","shape":[2,1],"data_offsets":[8,10]},'
    '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}   '
  )
  (tmp_path / "any name.safetensors").write_bytes(file_of(header, data))
  opened = open_tensors(tmp_path)
  assert opened.names() == ["w", "s"]  # by place
  assert opened.read("w").tolist() == [1.5, -2]
  scale = opened.read("s")
  assert scale.dtype == ml_dtypes.float8_e8m0fnu
  assert scale.astype(np.float32).tolist() == [[1], [2]]


def test_shards_are_found_by_the_index(tmp_path):
  shards = [
    {"w": np.ones(3, np.float32)},
    {"w_scale": np.arange(2), "v": np.zeros(1)},
  ]
  save_shards(tmp_path, shards)
  opened = open_tensors(str(tmp_path))
  assert sorted(opened.names()) == ["v", "w", "w_scale"]
  for shard in shards:
    for name, tensor in shard.items():
      assert_same(opened.read(name), tensor)
  # Downloads of the hub are links to files elsewhere.
  linked = tmp_path / "linked"
  linked.mkdir()
  for path in tmp_path.glob("model*"):
    (linked / path.name).symlink_to(path)
  assert_same(open_tensors(linked).read("w"), shards[0]["w"])


def test_a_file_beats_an_index_as_in_transformers(tmp_path):
  save_shards(tmp_path, [{"old": np.ones(1)}, {"older": np.ones(1)}])
  save(tmp_path, {"new": np.ones(1)})
  assert open_tensors(tmp_path).names() == ["new"]


slices = st.slices(8).filter(lambda s: s.step in (None, 1))


@settings(max_examples=60)
@given(st.lists(slices, max_size=3))
def test_a_part_equals_numpy_s(fuzzed, index):
  whole = np.arange(6 * 5 * 7, dtype=np.int16).reshape(6, 5, 7)
  save(fuzzed, {"before": np.ones(3), "x": whole, "y": np.ones(3)})
  part = open_tensors(fuzzed).read("x", tuple(index))
  assert_same(part, whole[tuple(index)])
  assert part.flags.owndata


def test_a_part_that_is_read_in_pieces(tmp_path, monkeypatch):
  monkeypatch.setattr("rlm.checkpoint.tensor_files._CHUNK_BYTES", 100)
  whole = np.arange(33 * 10, dtype=np.float32).reshape(33, 10)
  save(tmp_path, {"x": whole})
  part = np.s_[2:31, 3:9]
  assert_same(open_tensors(tmp_path).read("x", part), whole[part])


@pytest.mark.parametrize(
  "index",
  [np.s_[::2,], np.s_[::-1,], (0,), (...,), slice(1), np.s_[:, :, :]],
)
def test_another_index_is_refused(tmp_path, index):
  (tmp_path / "model.safetensors").write_bytes(file_of(HEADER))
  with pytest.raises(ValueError, match=r"'a' with shape \(2, 2\).*at most 2"):
    open_tensors(tmp_path).read("a", index)


def test_an_unknown_name_is_told_what_there_is(tmp_path):
  (tmp_path / "model.safetensors").write_bytes(file_of(HEADER))
  opened = open_tensors(tmp_path)
  for method in (opened.read, opened.shape, opened.dtype, opened.nbytes):
    with pytest.raises(ValueError, match=r"no tensor 'c' in .*2: 'a', 'b'"):
      method("c")


def test_a_file_that_shrank_later_is_noticed(tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(file_of(HEADER))
  opened = open_tensors(tmp_path)
  os.truncate(path, path.stat().st_size - 1)
  assert opened.read("a").shape == (2, 2)
  with pytest.raises(ValueError, match=r"ends within tensor 'b'"):
    opened.read("b")


def test_a_bool_is_0_or_1(tmp_path):
  header = {"m": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}
  path = tmp_path / "model.safetensors"
  path.write_bytes(file_of(header, bytes([0, 2])))
  with pytest.raises(ValueError, match=r"'m' is BOOL and holds bytes other"):
    open_tensors(tmp_path).read("m")


F32 = HEADER["a"]
BROKEN = {
  "cut in the header": (file_of(HEADER)[:30], "30 bytes is truncated or no sa"),
  "empty": (b"", "of 0 bytes is truncated or no safetensors"),
  "only a length": (struct.pack("<Q", 0), "would have 0 bytes"),
  "length beyond the file": (
    struct.pack("<Q", 1 << 63) + DATA,
    "9223372036854",
  ),
  "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
  "not JSON": (file_of("{'a'}"), "header of model.safetensors is not valid JS"),
  "not UTF-8": (file_of(b'{"\xff":1}'), "not valid JSON"),
  "too deep": (file_of("[" * 200_000), "not valid JSON"),
  "a huge number": (file_of('{"a":' + "9" * 9999 + "}"), "not valid JSON"),
  "a list": (file_of("[]"), "header of model.safetensors is no JSON object"),
  "twice": (
    file_of(f'{{"a":{json.dumps(F32)},"a":{json.dumps(F32)}}}'),
    "'a' is there twice",
  ),
  "no object": (file_of({**HEADER, "b": 3}), "'b' in.*object is needed, not 3"),
  "no dtype": (file_of(entry("b", dtype=None)), "'b' in .* dtype None is unk"),
  "dtype": (file_of(entry("b", dtype="F4")), "tensor 'b' in .*'F4' is unknown"),
  "dtype list": (file_of(entry("b", dtype=["F32"])), r"\['F32'\] is unknown"),
  "no shape": (file_of(entry("a", shape=None)), "shape None is no list"),
  "negative": (file_of(entry("a", shape=[-2, -2])), r"shape \[-2, -2\] is no"),
  "float": (file_of(entry("a", shape=[2.0, 2])), r"shape \[2.0, 2\] is no"),
  "true": (file_of(entry("a", shape=[True, 4])), r"shape \[True, 4\] is no"),
  "NaN": (file_of(entry("a", shape=[float("nan")])), r"shape \[nan\] is no"),
  "huge": (file_of(entry("a", shape=[0, 1 << 70])), "is no list of sizes"),
  "rank": (file_of(entry("a", shape=[1] * 99)), "is no list of sizes"),
  "offsets": (file_of(entry("b", data_offsets=[16])), "are not two offsets"),
  "text": (file_of(entry("b", data_offsets="ab")), "'ab' are not two offsets"),
  "reversed": (
    file_of(entry("b", data_offsets=[24, 16])),
    "24 to 16 do not",
  ),
  "too few": (
    file_of(entry("b", shape=[5])),
    r"16 to 24 do not fit BF16 \[5",
  ),
  "overlap": (
    file_of(entry("b", data_offsets=[8, 16]), DATA[:16]),
    "'b' in .*: the offsets 8 to 16 overlap others",
  ),
  "hole": (
    file_of(entry("b", data_offsets=[17, 25]), DATA + b"x"),
    "offsets 17 to 25 leave a hole",
  ),
  "rest": (file_of(HEADER, DATA + b"xyz"), "ends with 3 bytes of no tensor"),
  "cut": (file_of(HEADER, DATA[:20]), "'b' in .* is cut: 4 of 8 bytes are th"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_told(tmp_path, case):
  data, message = BROKEN[case]
  (tmp_path / "model.safetensors").write_bytes(data)
  with pytest.raises(ValueError, match=message):
    open_tensors(tmp_path)
  # The library refuses each of them as well.
  with pytest.raises((safetensors.SafetensorError, ValueError, KeyError)):
    safetensors.numpy.load_file(tmp_path / "model.safetensors")


def test_a_header_beyond_the_bound_is_not_read(tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(struct.pack("<Q", 100_000_001))
  os.truncate(path, 200_000_000)  # sparse
  with pytest.raises(ValueError, match=r"at most 100000000"):
    open_tensors(tmp_path)


def test_every_problem_is_listed_at_once(tmp_path):
  weight_map = {
    "a": "1.safetensors",
    "lost": "1.safetensors",
    "b": "2.safetensors",
    "c": "3.safetensors",
    "d": "absent.safetensors",
    "e": "../1.safetensors",
    "f": "/etc/passwd",
    "g": "a\0.safetensors",
    "h": "\ud800.safetensors",
    "i": "x" * 300 + ".safetensors",
    "j": "pytorch_model.bin",
    "k": "folder.safetensors",
  }
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  (tmp_path / "folder.safetensors").mkdir()
  (tmp_path / "1.safetensors").write_bytes(file_of(HEADER))
  (tmp_path / "2.safetensors").write_bytes(file_of(HEADER, DATA[:10]))
  (tmp_path / "3.safetensors").write_bytes(b"nothing")
  with pytest.raises(ValueError) as caught:
    open_tensors(tmp_path)
  text = str(caught.value)
  lines = text.splitlines()
  assert lines[0] == f"{tmp_path} does not hold sound safetensors:"
  assert lines[-1] == "Download or export these files again."
  for line in (
    "- the shard absent.safetensors, named by model.safetensors.index.json,"
    " does not exist",
    "- the shard folder.safetensors, named by",
    "names the shard '../1.safetensors', which is not the name of a",
    "names the shard '/etc/passwd'",
    r"names the shard 'a\x00.safetensors'",
    r"names the shard '\ud800.safetensors'",
    "names the shard 'xxx",
    "names the shard 'pytorch_model.bin'",
    "- tensor 'a' in 2.safetensors is cut: 10 of 16 bytes are there",
    "- tensor 'b' in 2.safetensors is cut: 0 of 8 bytes are there",
    "- tensor 'a' is held twice, by 1.safetensors and 2.safetensors",
    "- tensor 'b' is held twice, by 1.safetensors and 2.safetensors",
    "- 3.safetensors of 7 bytes is truncated or no safetensors",
    "- tensor 'lost' is not in 1.safetensors, where the index puts it",
  ):
    assert line in text
  assert len(lines) == 17  # b, held by both, is also not where it should be
  text.encode()  # it can be printed


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "model.safetensors.index.json is not valid JSON"),
    ("[]", "index.json is no JSON object"),
    ("{}", "has no weight_map"),
    ('{"weight_map": {}}', "has no weight_map"),
    ('{"weight_map": {"a": 1}}', "has no weight_map of tensor to file name"),
    ('{"weight_map": {"a": "b", "a": "c"}}', "'a' is there twice"),
    ("[" * 200_000, "not valid JSON"),
  ],
)
def test_a_broken_index_is_told(tmp_path, content, message):
  (tmp_path / "model.safetensors.index.json").write_text(content)
  with pytest.raises(ValueError, match=message):
    open_tensors(tmp_path)


def test_a_folder_without_safetensors_is_told(tmp_path):
  with pytest.raises(ValueError, match=r"absent is no folder"):
    open_tensors(tmp_path / "absent")
  with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
    open_tensors(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(ValueError, match=r"pickled weights only \('pytorch_m"):
    open_tensors(tmp_path)
  for name in ("x.safetensors", "y.safetensors"):
    save(tmp_path, {"a": np.ones(1)}, name)
  with pytest.raises(ValueError, match=r"2 .safetensors and no model.safeten"):
    open_tensors(tmp_path)


def check_or_refuse(folder, data):
  """A damaged file is refused, False, or every tensor has its own bytes."""
  (folder / "model.safetensors").write_bytes(data)
  try:
    opened = open_tensors(folder)
    tensors = {name: opened.read(name) for name in opened.names()}
  except ValueError:
    return False
  length = struct.unpack("<Q", data[:8])[0]
  header = json.loads(data[8 : 8 + length])
  header.pop("__metadata__", None)
  assert tensors.keys() == header.keys()
  for name, tensor in tensors.items():
    begin, end = header[name]["data_offsets"]
    assert tensor.tobytes() == data[8 + length + begin : 8 + length + end]
    assert list(tensor.shape) == header[name]["shape"]
    assert tensor.dtype == DTYPES[header[name]["dtype"]]
  return True


@settings(max_examples=300)
@given(
  st.lists(
    st.tuples(st.integers(0), st.integers(0, 255), st.booleans()),
    min_size=1,
    max_size=3,
  ),
  st.integers(0, 800),
)
def test_damaged_bytes_never_surprise(fuzzed, changes, length):
  text = {"__metadata__": {"format": "pt" * 40}}  # where damage is harmless
  data = bytearray(file_of({**text, **HEADER}))
  for place, byte, insert in changes:
    place %= len(data)
    data[place : place + (not insert)] = bytes([byte])
  # Mostly with a length that fits, or the header would never be looked at.
  if length < len(data):
    del data[length:]
  else:
    data[:8] = struct.pack("<Q", len(data) - 8 - len(DATA))
  check_or_refuse(fuzzed, bytes(data))


json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner)
  ),
  max_leaves=5,
)
changed_fields = st.one_of(
  st.tuples(st.just("dtype"), st.sampled_from([*DTYPES])),
  st.tuples(st.just("shape"), st.lists(st.sampled_from([0, 1, 2, 4, 8, 16]))),
  st.tuples(
    st.just("data_offsets"), st.lists(st.sampled_from([0, 16, 24]), max_size=3)
  ),
  st.tuples(st.sampled_from([*HEADER["a"], "more"]), json_values),
)


@settings(max_examples=400)
@given(
  st.lists(st.tuples(st.sampled_from("ab"), changed_fields), max_size=2),
  st.dictionaries(
    st.sampled_from(["a", "c", "\ud800", "__metadata__"]),
    json_values,
    max_size=1,
  ),
  st.sampled_from([24, 24, 24, 16, 0]),
)
def test_hostile_headers_never_surprise(fuzzed, changes, others, size):
  header = {name: dict(fields) for name, fields in HEADER.items()}
  for name, (field, value) in changes:
    header[name][field] = value
  check_or_refuse(fuzzed, file_of({**header, **others}, DATA[:size]))


def test_the_fuzz_s_own_check_tells_sound_from_cut(fuzzed):
  assert check_or_refuse(fuzzed, file_of(HEADER))
  assert not check_or_refuse(fuzzed, file_of(HEADER)[:-1])


@pytest.mark.skipif(
  not pathlib.Path("/proc/self/status").exists(), reason="Linux counts it"
)
def test_memory_is_what_is_read(tmp_path):
  # 200 MB that take no disk: holes of a sparse file.
  shape = (1000, 50_000)
  header = {
    "big": {"dtype": "F32", "shape": shape, "data_offsets": [0, 200_000_000]},
    "small": {"dtype": "U8", "shape": [9], "data_offsets": [200_000_000] * 2},
  }
  header["small"]["data_offsets"][1] += 9
  path = tmp_path / "model.safetensors"
  path.write_bytes(file_of(header, b""))
  os.truncate(path, path.stat().st_size + 200_000_009)
  # Not getrusage: its high-water mark is inherited from this process.
  script = textwrap.dedent("""
    import re, sys
    from rlm.checkpoint.tensor_files import open_tensors
    def peak():
      status = open("/proc/self/status").read()
      return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1000
    start = peak()
    opened = open_tensors(sys.argv[1])
    assert opened.read("small").sum() == 0
    small = peak() - start
    assert opened.read("big", (slice(999, 1000),)).sum() == 0
    row = peak() - start
    assert opened.read("big", (slice(None), slice(7, 9))).shape == (1000, 2)
    column = peak() - start
    assert opened.read("big", (slice(500, 750),)).nbytes == 50_000_000
    quarter = peak() - start
    assert "jax" not in sys.modules and "torch" not in sys.modules
    print(small, row, column, quarter)
  """)
  done = subprocess.run(
    [sys.executable, "-c", script, tmp_path],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  small, row, column, quarter = map(float, done.stdout.split())
  assert small < 4 and row < 6 and column < 45 and quarter < 60, done.stdout
