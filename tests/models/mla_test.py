"""Latent attention as a module, its two forms, and the cache between them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.models.cache import TokenCache, write_entry
from rlm.models.mla import MLA
from rlm.models.rope import rope_rotations
from tests.fast_jit import fast_jit
from tests.models import families, reference
from tests.models.families import float64
from tests.tiny_model import tiny_config

LENGTH = 5


def config(name):
  return tiny_config(**families.FAMILIES[name])


@functools.cache
def case(name):
  """cfg, variables of std 1, inputs [1, T, D]."""
  cfg, rng = config(name), np.random.default_rng(0)
  x = rng.standard_normal((1, LENGTH, cfg.hidden_size)).astype(np.float32)
  rotations, positions = places(cfg)
  shapes = jax.eval_shape(
    MLA(cfg).init, jax.random.key(0), x, rotations, positions, positions
  )
  variables = jax.tree.map(
    lambda s: rng.standard_normal(s.shape).astype(s.dtype), shapes
  )
  return cfg, variables, x


def places(cfg, positions=None):
  if positions is None:
    positions = np.arange(LENGTH, dtype=np.int32)[None]
  dim = cfg.qk_rope_head_dim
  rotations = rope_rotations(positions, dim, cfg.rope_theta, cfg.rope_scaling)
  return rotations, positions


@functools.cache
def expanded(name):
  cfg, variables, x = case(name)
  rotations, positions = places(cfg)
  return fast_jit(MLA(cfg).apply)(
    variables, x, rotations, positions, np.ones_like(positions)
  )


@pytest.mark.parametrize("name", ["v3", "v2"])  # q_lora_rank set, and None
def test_expanded_form_is_the_paper(name):
  cfg, variables, x = case(name)
  out, _ = expanded(name)
  params = float64(variables["params"])
  want = reference.attention(params, np.asarray(x[0], np.float64), cfg)
  np.testing.assert_allclose(out[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["v3", "v2"])
def test_chunks_of_one_row_after_the_other_are_the_whole(name):
  """In value, in the cache and in every gradient; rows of several segments."""
  cfg, variables, _ = case(name)
  rng = np.random.default_rng(1)
  x = rng.standard_normal((3, 6, cfg.hidden_size)).astype(np.float32)
  segments = np.array(
    [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0], [1, 2, 2, 2, 3, 3]], np.int32
  )
  positions = np.array(
    [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0], [0, 0, 1, 2, 0, 1]], np.int32
  )
  rotations, _ = places(cfg, positions)
  weights = rng.standard_normal(x.shape).astype(np.float32)

  def scalar(variables, x, chunk):
    changed = dataclasses.replace(cfg, attention_chunk=chunk)
    found = MLA(changed).apply(variables, x, rotations, positions, segments)
    return (found[0] * weights).sum(), found

  found, whole = (
    fast_jit(
      jax.grad(
        functools.partial(scalar, chunk=chunk), argnums=(0, 1), has_aux=True
      )
    )(variables, x)
    for chunk in (2, 0)
  )
  jaxpr = str(jax.make_jaxpr(functools.partial(scalar, chunk=2))(variables, x))
  assert "length=3" in jaxpr and "length=3" not in str(
    jax.make_jaxpr(functools.partial(scalar, chunk=0))(variables, x)
  )
  # Sums over rows and chunks in another order; values reach a few hundred.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()
    ),
    found,
    whole,
  )


def test_weights_are_packed_as_published():
  cfg, variables, _ = case("v3")
  n, h, r = 3, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
  params = variables["params"]
  assert {k: w.shape for k, w in params.items() if "norm" not in k} == {
    "q_a": (cfg.hidden_size, cfg.q_lora_rank),
    "q_b": (cfg.q_lora_rank, n * (h + r)),
    "kv_a": (cfg.hidden_size, cfg.kv_lora_rank + r),
    "kv_b": (cfg.kv_lora_rank, n * (h + cfg.v_head_dim)),
    "out_proj": (n * cfg.v_head_dim, cfg.hidden_size),
  }
  # The shared rope key has no norm of its own.
  assert params["kv_norm"]["scale"].shape == (cfg.kv_lora_rank,)
  assert set(case("v2")[1]["params"]) == {
    "q_proj",
    "kv_a",
    "kv_norm",
    "kv_b",
    "out_proj",
  }


def test_the_query_latent_is_exposed_after_its_norm():
  cfg, variables, x = case("v3")
  latent = fast_jit(functools.partial(MLA(cfg).apply, method="query_latent"))(
    variables, x
  )
  p = float64(variables["params"])
  want = reference.rms_norm(
    np.asarray(x) @ p["q_a"], p["q_norm"]["scale"], cfg.rms_norm_eps
  )
  np.testing.assert_allclose(latent, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["v3", "v2"])
def test_absorbed_form_is_the_expanded_one(name):
  # Token by token from an empty cache, weights of std 1.
  cfg, variables, x = case(name)
  want, entries = expanded(name)
  layer = TokenCache.empty(cfg, batch=1, capacity=LENGTH + 2).layers[0]
  decode = fast_jit(functools.partial(MLA(cfg).apply, method="decode"))
  for t in range(LENGTH):
    lengths = np.array([t], np.int32)
    rotations, _ = places(cfg, lengths[:, None])
    out, layer = decode(variables, x[:, t : t + 1], rotations, layer, lengths)
    np.testing.assert_allclose(out[0, 0], want[0, t], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(layer[..., :LENGTH], entries, rtol=1e-5, atol=1e-5)
  assert not layer[..., LENGTH:].any()


def test_what_lies_past_a_row_is_never_read():
  cfg, variables, x = case("v3")
  lengths = np.array([2], np.int32)
  rotations, _ = places(cfg, lengths[:, None])
  _, entries = expanded("v3")
  decode = fast_jit(functools.partial(MLA(cfg).apply, method="decode"))
  outs = []
  for rest in (0.0, 1e6):
    layer = np.array(entries)
    layer[..., 2:] = rest
    outs.append(decode(variables, x[:, :1], rotations, layer, lengths)[0])
  np.testing.assert_array_equal(*outs)


def cache_of(cfg, lengths, capacity, seed):
  rng = np.random.default_rng(seed)
  empty = TokenCache.empty(cfg, len(lengths), capacity)
  return TokenCache(
    layers=tuple(
      jnp.asarray(rng.standard_normal(layer.shape), layer.dtype)
      for layer in empty.layers
    ),
    lengths=jnp.array(lengths, jnp.int32),
  )


def test_empty_cache():
  cfg = tiny_config(dtype="bfloat16", **families.FAMILIES["v3"])
  cache = TokenCache.empty(cfg, batch=2, capacity=6)
  assert len(cache.layers) == cfg.num_hidden_layers and cache.capacity == 6
  for layer in cache.layers:
    assert layer.shape == (2, cfg.kv_lora_rank + cfg.qk_rope_head_dim, 6)
    assert layer.dtype == jnp.bfloat16
  assert cache.lengths.dtype == jnp.int32 and not cache.lengths.any()


def test_extend_keeps_tokens_and_never_shrinks():
  cache = cache_of(config("v3"), [2, 4], capacity=4, seed=0)
  longer = cache.extend(7)
  assert longer.capacity == 7
  np.testing.assert_array_equal(longer.lengths, cache.lengths)
  for new, old in zip(longer.layers, cache.layers, strict=True):
    np.testing.assert_array_equal(new[..., :4], old)
  with pytest.raises(ValueError, match="4 tokens cannot shrink to 3"):
    cache.extend(3)


def test_replace_rows():
  cfg = config("v3")
  mine = cache_of(cfg, [1, 2, 3], capacity=4, seed=0)
  other = cache_of(cfg, [4, 0], capacity=4, seed=1)
  new = mine.replace_rows(other, jnp.array([1, -1, 0], jnp.int32))
  np.testing.assert_array_equal(new.lengths, [0, 2, 4])
  for got, a, b in zip(new.layers, mine.layers, other.layers, strict=True):
    np.testing.assert_array_equal(got, jnp.stack([b[1], a[1], b[0]]))


def test_write_entry_skips_full_rows():
  layer, entry = jnp.zeros((3, 2, 4)), jnp.ones((3, 2))
  new = write_entry(layer, entry, jnp.array([0, 3, 4], jnp.int32))
  want = np.zeros((3, 2, 4))
  want[0, :, 0] = want[1, :, 3] = 1
  np.testing.assert_array_equal(new, want)
