import pytest

from tools.hlo_shape import HloError, parse_shape


@pytest.mark.parametrize(
  ("text", "size", "padded"),
  [
    ("f32[]", 4, 4),
    ("pred[3]", 3, 3),
    ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048, 2048),
    ("bf16[14,2048]{1,0:T(8,128)(2,1)}", 14 * 4096, 16 * 4096),
    ("bf16[2048,14]{0,1:T(8,128)(2,1)}", 14 * 4096, 16 * 4096),
    ("f32[3,5,100]{2,1,0:T(8,128)}", 6000, 3 * 8 * 128 * 4),
    ("s32[9]{0:T(128)}", 36, 512),
    ("f8e4m3fn[16,16]{1,0}", 256, 256),
    ("s4[10]{0:E(4)}", 5, 5),
    ("token[]", 0, 0),
  ],
)
def test_bytes(text, size, padded):
  shape = parse_shape(text)
  assert (shape.bytes, shape.padded_bytes) == (size, padded)


def test_a_nested_tuple():
  shape = parse_shape(
    "(s32[], (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}),"
    " /*index=2*/f32[7])"
  )
  assert str(shape) == "(s32[], (bf16[2,3], u32[]), f32[7])"
  assert [a.memory_space for a in shape.arrays] == [0, 1, 2, 0]
  assert shape.bytes == 4 + 12 + 4 + 28
  assert shape.size == 1 + 6 + 1 + 7


def test_rows_and_lanes_follow_the_layout():
  assert parse_shape("f32[4,16,256]{2,1,0}").rows_and_lanes == (16, 256)
  assert parse_shape("f32[4,16,256]{0,2,1}").rows_and_lanes == (256, 4)
  assert parse_shape("f32[5]").rows_and_lanes == (1, 5)


@pytest.mark.parametrize("text", ["", "f32", "q7[3]", "f32[2] and more"])
def test_no_shape(text):
  with pytest.raises(HloError, match="not a shape|unknown element type"):
    parse_shape(text)
