"""What the forms of XLA hold, and which of them is taken."""

import jax
import numpy as np
import pytest

from rlm.kernels.mla_attention import mla_attention, xla
from tests.kernels.mla_attention.reference_test import (
  SCALE,
  B,
  S,
  T,
  arrays,
  where,
)


def attend(*operands, **settings):
  return mla_attention(*operands, *where(), scale=SCALE, **settings)


def test_many_heads_go_in_one_product(monkeypatch):
  taken = []
  for name in ("_attend_by_head", "mla_attention_reference"):
    monkeypatch.setattr(
      xla, name, lambda *a, name=name, **k: taken.append(name)
    )
  for heads in (16, 17):
    operands = [np.zeros((1, 1, heads, 1), np.float32)] * 2
    others = [np.zeros((1, 1, 1), np.float32)] * 3
    places = [np.zeros((1, 1), np.int32)] * 4
    xla.mla_attention_xla(*operands, *others, *places, scale=1.0, query_chunk=0)
  assert taken == ["_attend_by_head", "mla_attention_reference"]


def test_chunks_never_hold_the_scores_of_all_queries():
  def text(query_chunk):
    def scalar(*operands):
      return attend(*operands, query_chunk=query_chunk)[0].sum()

    grad = jax.grad(scalar, argnums=range(5))
    return jax.jit(grad).lower(*arrays()).as_text()

  assert f"{B}x{T}x{S}x" in text(0)
  assert f"{B}x{T}x{S}x" not in text(2)
  assert f"{B}x2x{S}x" in text(2)


def test_query_chunk_must_divide():
  with pytest.raises(ValueError, match="query_chunk=4 does not divide the 6"):
    jax.eval_shape(lambda *x: attend(*x, query_chunk=4), *arrays())
