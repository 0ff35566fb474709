"""The references, and the forms of XLA, against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.kernels.mla_attention import mla_attention, mla_decode
from rlm.kernels.mla_attention.reference import mla_attention_reference
from tests.fast_jit import fast_jit

B, T, S, N, H, R, WIDTH, C = 2, 6, 9, 3, 4, 2, 5, 7
SCALE = 0.37
NAMES = ("q_nope", "q_rope", "k_nope", "k_rope", "v")


def arrays(dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = (
    (B, T, N, H),
    (B, T, N, R),
    (B, S, N, H),
    (B, S, R),
    (B, S, N, WIDTH),
  )
  return tuple((2 * rng.standard_normal(s)).astype(dtype) for s in shapes)


def where():
  """Positions and segments of T queries and S keys; not the same tokens.

  Row 0: two documents, and a padding query. Row 1: one document whose keys lie
  out of order; its query at position 0 sees the key at position 0 alone, and
  that of segment 3 no key.
  """
  q_positions = np.array([[0, 2, 3, 0, 1, 0], [0, 1, 8, 4, 5, 6]], np.int32)
  q_segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 3, 1, 1]], np.int32)
  kv_positions = np.array(
    [[0, 1, 2, 3, 0, 1, 2, 0, 0], [8, 7, 6, 5, 4, 3, 2, 1, 0]], np.int32
  )
  kv_segments = np.array(
    [[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32
  )
  return q_positions, kv_positions, q_segments, kv_segments


def selected_keys():
  return np.random.default_rng(3).random((B, T, S)) < 0.6


def loop(q, k, v, places, selected, scale):
  """q [B, T, N, K], k [B, S, N, K], v [B, S, N, h] -> out, lse in float64."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  q_positions, kv_positions, q_segments, kv_segments = places
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  lse = np.full((q.shape[0], q.shape[2], q.shape[1]), -np.inf)
  for b, t, n in np.ndindex(*q.shape[:3]):
    keys = [
      s
      for s in range(k.shape[1])
      if q_segments[b, t] != 0
      and q_segments[b, t] == kv_segments[b, s]
      and kv_positions[b, s] <= q_positions[b, t]
      and (selected is None or selected[b, t, s])
    ]
    if keys:
      weights = np.exp([scale * q[b, t, n] @ k[b, s, n] for s in keys])
      lse[b, n, t] = np.log(weights.sum())
      out[b, t, n] = weights / weights.sum() @ v[b, keys, n]
  return out, lse


def joined(q_nope, q_rope, k_nope, k_rope, v):
  k_rope = np.broadcast_to(k_rope[:, :, None], (B, S, N, R))
  return (
    np.concatenate([q_nope, q_rope], -1),
    np.concatenate([k_nope, k_rope], -1),
    v,
  )


def by_form(form, selected=None):
  """(five arrays) -> out, lse."""
  attend = {
    "reference": mla_attention_reference,
    "by head": mla_attention,  # of a CPU, for few heads
    "chunks": functools.partial(mla_attention, query_chunk=2),
  }[form]
  return lambda *a: attend(*a, *where(), selected, scale=SCALE)


FORMS = ("reference", "by head", "chunks")


@pytest.mark.parametrize("selection", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_values(form, selection):
  selected = selected_keys() if selection else None
  out, lse = fast_jit(by_form(form, selected))(*arrays())
  want, want_lse = loop(*joined(*arrays()), where(), selected, SCALE)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
  assert np.isneginf(want_lse[0, :, 5]).all()  # padding
  assert np.isneginf(want_lse[1, :, 3]).all()  # a segment without keys


@functools.cache
def gradients(form):
  rng = np.random.default_rng(1)
  d_out = rng.standard_normal((B, T, N, WIDTH)).astype(np.float32)
  d_lse = rng.standard_normal((B, N, T)).astype(np.float32)

  def scalar(*a):
    out, lse = by_form(form)(*a)
    seen = jnp.isfinite(lse)
    return (out * d_out).sum() + jnp.where(seen, lse * d_lse, 0.0).sum()

  grad = fast_jit(jax.grad(scalar, argnums=range(5)))
  return jax.device_get(grad(*arrays())), d_out, d_lse


@pytest.mark.parametrize("form", FORMS)
def test_gradients_by_differences_of_the_loop(form):
  grads, d_out, d_lse = gradients(form)

  def scalar(a):
    out, lse = loop(*joined(*a), where(), None, SCALE)
    return (out * d_out).sum() + (np.where(np.isinf(lse), 0, lse) * d_lse).sum()

  rng, eps = np.random.default_rng(2), 1e-5
  exact = [np.asarray(a, np.float64) for a in arrays()]
  for i, (name, grad) in enumerate(zip(NAMES, grads, strict=True)):
    assert np.isfinite(grad).all(), name
    direction = rng.standard_normal(grad.shape)
    ends = []
    for sign in (1, -1):
      moved = [
        a + sign * eps * direction if j == i else a for j, a in enumerate(exact)
      ]
      ends.append(scalar(moved))
    slope = (ends[0] - ends[1]) / (2 * eps)
    error = abs(slope - (np.asarray(grad) * direction).sum())
    assert error < 1e-5 * np.linalg.norm(grad), name


def test_scores_and_softmax_of_bfloat16_are_float32():
  bfloat16 = arrays(jnp.bfloat16)
  for form in ("reference", "by head"):
    out, lse = fast_jit(by_form(form))(*bfloat16)
    want, want_lse = loop(*joined(*bfloat16), where(), None, SCALE)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=0.05)


def test_large_scores_do_not_overflow():
  q_nope, q_rope, k_nope, k_rope, v = arrays()
  for form in ("reference", "by head"):
    large = (q_nope * 1e3, q_rope, k_nope * 1e3, k_rope, v)
    out, lse = jax.device_get(fast_jit(by_form(form))(*large))
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any() and not np.isposinf(lse).any()


def latent_case():
  rng = np.random.default_rng(4)
  q_nope, q_rope, _, k_rope, _ = arrays()
  latent = rng.standard_normal((B, S, C)).astype(np.float32)
  k_up = rng.standard_normal((C, N, H)).astype(np.float32)
  return q_nope, q_rope, latent, k_rope, k_up


@pytest.mark.parametrize("selection", [False, True])
@pytest.mark.parametrize("form", ["reference", "xla"])
def test_decode_is_expanded_attention_over_latents(form, selection):
  # Keys W^UK c and values c: what the absorbed form must give.
  q_nope, q_rope, latent, k_rope, k_up = latent_case()
  selected = selected_keys() if selection else None
  decode = functools.partial(
    mla_decode, kv_lora_rank=C, scale=SCALE, implementation=form
  )
  out, lse = fast_jit(decode)(
    np.concatenate([np.einsum("BTNH,CNH->BTNC", q_nope, k_up), q_rope], -1),
    np.concatenate([latent, k_rope], -1).swapaxes(1, 2),
    *where(),
    selected,
  )
  k_nope = np.einsum("BSC,CNH->BSNH", latent, k_up)
  values = np.broadcast_to(latent[:, :, None], (B, S, N, C))
  full = joined(q_nope, q_rope, k_nope, k_rope, values)
  want, want_lse = loop(*full, where(), selected, SCALE)
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-4, atol=1e-4)
