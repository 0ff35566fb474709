"""FP8 blocks by hand, by loops, and back to the very same codes."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.checkpoint.fp8 import dequantize, quantize, stored_blocks

E4M3 = ml_dtypes.float8_e4m3fn
UE8M0 = ml_dtypes.float8_e8m0fnu
DTYPES = [np.float32, ml_dtypes.bfloat16]
# Every code but the two NaN, in one block of 128x128.
CODES = np.setdiff1d(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
ALL_CODES = np.resize(CODES, (128, 128)).view(E4M3)


def value_of(code: int) -> float:
  """e4m3fn from its definition: bias 7, subnormals, no infinity."""
  sign = -1.0 if code & 0x80 else 1.0
  exponent, mantissa = (code >> 3) & 15, code & 7
  if exponent == 15 and mantissa == 7:
    return math.nan
  if exponent == 0:
    return sign * mantissa * 2.0**-9
  return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def random_weights(shape, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.standard_normal(shape) * 0.02).astype(dtype)


def bits(array):
  return array.tobytes()


def test_every_code_by_hand():
  blocks = np.arange(256, dtype=np.uint8).view(E4M3)[None]
  scale = np.full((1, 2), 0.5, np.float32)
  scale[0, 1] = 3
  w = dequantize(blocks, scale, np.float32)
  expected = [value_of(c) * (0.5 if c < 128 else 3) for c in range(256)]
  np.testing.assert_array_equal(w, [expected])
  assert np.signbit(w[0, 128]) and w[0, 128] == 0
  assert w[0, 126] == 224  # the largest, 448


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_edges_follow_the_scale_of_their_block(dtype):
  shape = (300, 130)  # 3 x 2 blocks
  rng = np.random.default_rng(1)
  blocks = rng.choice(CODES, shape).view(E4M3)
  scale = rng.uniform(1e-4, 1e-3, (3, 2)).astype(np.float32)
  expected = np.empty(shape, dtype)
  for i in range(300):
    for j in range(130):
      value = np.float32(value_of(int(blocks.view(np.uint8)[i, j])))
      expected[i, j] = value * scale[i // 128, j // 128]
  w = dequantize(blocks, scale, dtype)
  assert w.dtype == dtype and bits(w) == bits(expected)


def test_the_product_is_rounded_once():
  # 1.125 * (1 + 1/256) = 1.12939 is nearer to 1.1328125 than to 1.125, its
  # neighbours in bfloat16. A scale in bfloat16 would be 1, the product 1.125.
  blocks = np.array([[1.125]], E4M3)
  scale = np.array([[1 + 1 / 256]], np.float32)
  w = dequantize(blocks, scale, ml_dtypes.bfloat16)
  assert w[0, 0] == 1.1328125


@given(st.integers(0, 299), st.integers(0, 299), st.integers(0, 139), st.data())
def test_a_part_equals_the_part_of_the_whole(row, end_row, column, data):
  shape = (300, 140)
  blocks = np.resize(CODES, shape).view(E4M3)
  scale = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
  end_row = max(row, end_row)
  end_column = data.draw(st.integers(column, 140))
  part = np.s_[row:end_row, column:end_column]
  w = dequantize(
    blocks[part],
    scale,
    np.float32,
    first_row=row,
    first_column=column,
    shape=shape,
  )
  assert bits(w) == bits(dequantize(blocks, scale, np.float32)[part])


def test_a_part_that_ends_with_the_tensor_needs_no_shape():
  blocks = np.resize(CODES, (200, 4)).view(E4M3)
  scale = np.array([[1], [2]], np.float32)
  whole = dequantize(blocks, scale, np.float32)
  tail = dequantize(blocks[70:], scale, np.float32, first_row=70)
  np.testing.assert_array_equal(tail, whole[70:])


def test_ue8m0_scales_are_powers_of_two():
  stored = np.array([[127], [120]], np.uint8).view(UE8M0)
  blocks = np.ones((129, 1), E4M3)
  w = dequantize(blocks, stored, np.float32)
  assert w[0] == 1 and w[127] == 1 and w[128] == 2.0**-7


def test_quantize_by_hand():
  w = np.zeros((129, 257), np.float32)
  w[5, 7] = -896  # scale 2
  w[0, 0] = 2 * 17  # halfway between 16 and 18: to even
  w[128, 256] = 1  # a block of one entry: scale 1 / 448
  blocks, scale = quantize(w)
  assert blocks.dtype == E4M3 and scale.dtype == np.float32
  assert scale.shape == (2, 3) and blocks.shape == w.shape
  floor = np.float32(1e-4) / np.float32(448)
  expected = np.full((2, 3), floor)
  expected[0, 0], expected[1, 2] = 2, np.float32(1) / np.float32(448)
  np.testing.assert_array_equal(scale, expected)
  assert blocks[5, 7] == -448 and blocks[0, 0] == 16 and blocks[128, 256] == 448
  assert (dequantize(blocks, scale, np.float32)[:128, 128:256] == 0).all()


def test_quantize_ue8m0_rounds_scales_up():
  amax = np.array([448.0, 449.0, 448 * 0.75, 100.0, 0.0], np.float32)
  w = np.zeros((128, 640), np.float32)
  w[3, ::128] = amax
  blocks, scale = quantize(w, scale_fmt="ue8m0")
  expected = [
    2.0 ** math.ceil(math.log2(max(float(a), 1e-4) / 448)) for a in amax
  ]
  np.testing.assert_array_equal(scale, [expected])
  assert scale.dtype == np.float32 and expected[:3] == [1, 2, 1]
  np.testing.assert_array_equal(scale.astype(UE8M0).astype(np.float32), scale)
  assert blocks[3, 0] == 448 and blocks[3, 384] == 384  # 400, to even


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 400)])
def test_quantising_errs_by_half_a_step(shape, dtype, scale_fmt):
  w = random_weights(shape, dtype)
  blocks, scale = quantize(w, scale_fmt=scale_fmt)
  error = np.abs(dequantize(blocks, scale, np.float32) - w.astype(np.float32))
  wide = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: shape[0], : shape[1]]
  # Half of a step: 2^-4 of the value, or half of the least subnormal.
  half = np.maximum(np.abs(w.astype(np.float32)) * 2.0**-4, wide * 2.0**-10)
  assert (error <= half * 1.0001).all()
  assert not np.isnan(blocks.astype(np.float32)).any()


def test_a_value_that_rounds_beyond_448_saturates():
  # amax / (amax / 448) may come out above 448, where the cast makes NaN from
  # 464 on; and below 464 rounding must not leave the range either.
  amax = np.random.default_rng(0).uniform(1e-3, 10, 500).astype(np.float32)
  w = np.repeat(amax, 128)[None]
  blocks, _ = quantize(w)
  assert (blocks.astype(np.float32) == 448).all()


def scales_of(exponents, seed=0):
  rng = np.random.default_rng(seed)
  mantissa = rng.uniform(1, 2, len(exponents)).astype(np.float32)
  return np.ldexp(mantissa, exponents).astype(np.float32)[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_recovered_under_every_normal_scale(dtype):
  exponents = np.arange(-117, 119)
  powers = np.ldexp(np.float32(1), exponents).astype(np.float32)[:, None]
  for scale in (scales_of(exponents), powers, -powers[::20]):
    blocks = np.tile(ALL_CODES, (len(scale), 1))
    found = stored_blocks(dequantize(blocks, scale, dtype), scale)
    assert found.dtype == E4M3 and bits(found) == bits(blocks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_recovered_under_scales_of_every_mantissa(dtype):
  scale = np.linspace(1e-4, 2e-4, 200, dtype=np.float32)[:, None]
  blocks = np.tile(ALL_CODES, (len(scale), 1))
  found = stored_blocks(dequantize(blocks, scale, dtype), scale)
  assert bits(found) == bits(blocks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_scales_never_give_another_weight(dtype):
  # Products are denormal, and several codes share one: any of them will do.
  for exponents in (np.arange(-149, -117), np.full(30, -140)):
    scale = scales_of(exponents, seed=int(exponents[0]) + 200)
    blocks = np.tile(ALL_CODES, (len(scale), 1))
    w = dequantize(blocks, scale, dtype)
    found = stored_blocks(w, scale)
    assert bits(dequantize(found, scale, dtype)) == bits(w)
  for scale in (np.zeros((1, 1), np.float32), -np.zeros((1, 1), np.float32)):
    w = dequantize(ALL_CODES, scale, dtype)
    found = stored_blocks(w, scale)
    assert found is None or bits(dequantize(found, scale, dtype)) == bits(w)
  assert stored_blocks(np.ones((1, 1), dtype), scale) is None


def test_ue8m0_scales_are_recovered_too():
  stored = np.arange(10, 240, dtype=np.uint8).view(UE8M0)[:, None]
  blocks = np.tile(ALL_CODES, (len(stored), 1))
  w = dequantize(blocks, stored, ml_dtypes.bfloat16)
  assert bits(stored_blocks(w, stored)) == bits(blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (576, 300), (5, 0), (0, 5)])
def test_what_was_quantised_comes_back(shape, dtype):
  blocks, scale = quantize(random_weights(shape))
  w = dequantize(blocks, scale, dtype)
  assert w.shape == shape and bits(stored_blocks(w, scale)) == bits(blocks)
  transposed = np.asfortranarray(w)
  assert bits(stored_blocks(transposed, scale)) == bits(blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["next", math.inf, -math.inf, math.nan, 1e30])
def test_one_changed_entry_is_noticed(dtype, value):
  blocks, scale = quantize(random_weights((200, 300)))
  w = dequantize(blocks, scale, dtype)
  if value == "next":
    one = w[199, 299:].view(f"u{w.dtype.itemsize}")
    one += 1  # the neighbouring number
  else:
    w[199, 299] = value
  found = stored_blocks(w, scale)
  # A NaN may be e4m3's own; anything else no block gives.
  assert found is None or bits(dequantize(found, scale, dtype)) == bits(w)
  assert found is None or value is math.nan


def test_zeros_keep_their_sign_and_codes_may_change():
  scale = np.full((1, 1), 2, np.float32)
  w = np.array([[0.0, -0.0, 3.0]], np.float32)
  found = stored_blocks(w, scale)
  assert found.view(np.uint8).tolist() == [[0, 0x80, 0x3C]]
  w[0, 2] = 2  # what another code gives is not a loss
  assert stored_blocks(w, scale)[0, 2] == 1


def test_wrong_arguments_are_told():
  blocks, scale = quantize(random_weights((130, 130)))
  w = dequantize(blocks, scale, np.float32)
  with pytest.raises(ValueError, match=r"scale_inv has shape \(2, 1\).*\(2, 2"):
    dequantize(blocks, scale[:, :1], np.float32)
  with pytest.raises(ValueError, match=r"needs \(1, 2\).*Give shape="):
    dequantize(blocks[:10], scale, np.float32)
  with pytest.raises(ValueError, match=r"row 5 and column 0 do not lie in"):
    dequantize(blocks, scale, np.float32, first_row=5, shape=(130, 130))
  with pytest.raises(ValueError, match=r"row -1 and"):
    dequantize(blocks, scale, np.float32, first_row=-1)
  with pytest.raises(ValueError, match=r"blocks is float32 \[130, 130\]"):
    dequantize(w, scale, np.float32)
  with pytest.raises(ValueError, match=r"scale_inv is float64; float32 or"):
    dequantize(blocks, scale.astype(np.float64), np.float32)
  for bad in (np.nan, np.inf, 1e36):
    broken = scale.copy()
    broken[1, 1] = bad
    with pytest.raises(ValueError, match=r"1 of 4 values of scale_inv are not"):
      stored_blocks(w, broken)
  with pytest.raises(ValueError, match=r"w is float16 \[130, 130\]"):
    stored_blocks(w.astype(np.float16), scale)
  with pytest.raises(ValueError, match=r"w is float32 \[130\]"):
    quantize(w[0])
  with pytest.raises(ValueError, match=r"scale_fmt='e8' is unknown"):
    quantize(w, scale_fmt="e8")
  for bad in (np.nan, -np.inf):
    w[129, 0] = bad
    with pytest.raises(ValueError, match=r"1 of 4 blocks of w hold values"):
      quantize(w)
