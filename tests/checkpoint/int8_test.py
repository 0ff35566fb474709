"""Weight-only int8: its numbers, its error, its memory, and what it refuses.

`test_the_stated_error` measures what the docstring of `rlm.models.quantized`
states.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rlm
from rlm.checkpoint.export import export_published
from rlm.checkpoint.int8 import quantize
from rlm.checkpoint.published_names import leaf_name
from rlm.models.quantized import QUANTIZED, Int8Matrix, is_quantized, operand
from rlm.models.transformer import Transformer
from rlm.train import init_state
from tests.fast_jit import fast_jit
from tests.tiny_model import tiny_config, tiny_variables

COMMON = dict(
  vocab_size=256,
  n_vocab_used=256,
  hidden_size=64,
  num_hidden_layers=3,
  num_attention_heads=4,
  intermediate_size=192,
  rope_theta=10000.0,
)
MODELS = {
  "v3": dict(
    COMMON,
    moe_intermediate_size=32,
    n_routed_experts=8,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
  ),
  "qwen2": dict(
    COMMON,
    first_k_dense_replace=3,
    num_key_value_heads=2,
    head_dim=16,
    qkv_bias=True,
    q_lora_rank=None,
    kv_lora_rank=0,
    qk_nope_head_dim=0,
    qk_rope_head_dim=0,
    v_head_dim=0,
    num_nextn_predict_layers=0,
  ),
}


def make_variables(model):
  """Matrices that keep the size of what passes: logits of std 1."""

  def scale(path, x):
    if path[-1].key in QUANTIZED | {"head", "proj", "router"}:
      return x / 0.2 / np.sqrt(x.shape[-2])
    return x / 0.2 if path[-1].key == "embedding" else x

  return jax.tree.map_with_path(scale, tiny_variables(model))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  made = {}
  for name, fields in MODELS.items():
    cfg = tiny_config(**fields)
    variables = make_variables(Transformer(cfg))
    leaves = {
      leaf_name(path): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }

    def read(leaf, tensor, leaves=leaves):
      part = leaves[leaf][tensor.place]
      return part.T if tensor.transposed else part

    made[name] = tmp_path_factory.mktemp("models") / name
    export_published(made[name], cfg, variables, read, stored="float32")
  return made


def bytes_of(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_a_channel_by_hand():
  w = np.array([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]], np.float32)
  values, scale = quantize(w, axis=1)
  np.testing.assert_array_equal(values, [[64, -127, 32], [0, 0, 0]])
  np.testing.assert_allclose(scale, [[2 / 127], [1]])


def test_the_error_is_half_a_scale_at_most():
  w = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
  values, scale = quantize(w, axis=0)
  assert scale.shape == (1, 30) and np.abs(values).max() == 127
  assert (np.abs(values * scale - w) <= scale * 0.5001).all()


def test_numbers_that_are_not_finite_are_refused():
  with pytest.raises(ValueError, match="1 of 2 channels.*without quantize"):
    quantize(np.array([[1.0, np.nan], [0.0, 1.0]]), axis=1)


def test_an_operand_is_nan_where_the_activation_is():
  w = Int8Matrix(jnp.ones((2, 3), jnp.int8), jnp.ones((1, 3)))
  assert np.isnan(operand(w, jnp.full((4, 2), jnp.nan))).all()
  assert operand(w, jnp.ones((4, 2), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("name", "least"), [("v3", 0.85), ("qwen2", 0.92)])
def test_the_stated_error(folders, name, least):
  model, exact = rlm.load_checkpoint(folders[name], dtype="float32")
  same, rounded = rlm.load_checkpoint(
    folders[name], dtype="float32", quantize="int8"
  )
  assert same == model
  tokens = np.random.default_rng(1).integers(256, size=(8, 48), dtype=np.int32)
  row = np.broadcast_to(np.arange(48, dtype=np.int32), tokens.shape)

  @fast_jit
  def logits(variables, expert_ids):
    hidden, routing = model.apply(
      variables, tokens, row, np.ones_like(tokens), expert_ids
    )
    return hidden @ variables["params"]["head"], routing.expert_ids

  a, routes = logits(exact, None)
  assert np.std(a) > 0.9
  b, _ = logits(rounded, routes if name == "v3" else None)
  p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
  kl = (np.exp(p) * (p - q)).sum(-1).mean()
  off = np.abs(a - b)
  agreement = (a.argmax(-1) == b.argmax(-1)).mean()
  print(name, np.std(a), off.max(), off.mean(), kl, agreement)
  assert off.max() < 0.15 and off.mean() < 0.02 and kl < 4e-4
  assert agreement > least


def test_memory_is_near_a_quarter_and_stacks_keep_their_layout(folders):
  _, exact = rlm.load_checkpoint(folders["v3"], dtype="float32")
  _, rounded = rlm.load_checkpoint(folders["v3"], quantize="int8")
  pairs = jax.tree.leaves(
    jax.tree.map(
      lambda small, x: (small, x) if is_quantized(small) else (x, x),
      rounded,
      exact,
      is_leaf=is_quantized,
    ),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  pairs = [(s, x) for s, x in pairs if is_quantized(s)]
  assert len(pairs) == 30  # 8 dense, 11 with experts, 11 of MTP
  for small, x in pairs:
    assert small.values.shape == x.shape and small.values.dtype == jnp.int8
    assert small.scale.shape == (*x.shape[:-2], 1, x.shape[-1])
  small, large = (bytes_of(side) for side in zip(*pairs, strict=True))
  assert 0.25 < small / large < 0.28


def test_a_sharded_load_is_equal(folders):
  mesh = jax.make_mesh(
    (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )

  def shardings(shapes, axis):
    def sharding(leaf):
      divides = leaf.ndim > 1 and leaf.shape[axis] % 4 == 0
      spec = [None] * leaf.ndim
      if divides:
        spec[axis] = "data"
      return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return jax.tree.map(sharding, shapes)

  load = functools.partial(
    rlm.load_checkpoint, folders["qwen2"], quantize="int8"
  )
  _, whole = load()
  for axis in (-1, -2):
    _, parts = load(shardings=functools.partial(shardings, axis=axis))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_absorbed_decode_agrees_with_the_expanded_form(folders):
  model, variables = rlm.load_checkpoint(folders["v3"], quantize="int8")
  tokens = jnp.array([[3, 1, 4, 1, 5]], jnp.int32)
  row, ones = jnp.arange(5, dtype=jnp.int32)[None], jnp.ones_like(tokens)

  @fast_jit
  def both(variables):
    hidden, cache, _ = model.apply(
      variables, tokens, row, ones, method="prefill"
    )
    cache = cache.replace(lengths=cache.lengths - 1)  # the last token again
    last, _, _ = model.apply(variables, tokens[:, 4:], cache, method="decode")
    return hidden[:, 4:], last

  expanded, absorbed = both(variables)
  np.testing.assert_allclose(expanded, absorbed, atol=1e-4)


def test_decoding_never_holds_the_floats_of_all_layers():
  # XLA hoists what a loop does not change: see `operand`.
  d, layers = 64, 8
  w = Int8Matrix(
    jax.ShapeDtypeStruct((layers, d, d), jnp.int8),
    jax.ShapeDtypeStruct((layers, 1, d), jnp.float32),
  )

  def steps(w, x):
    def step(_, x):
      for i in range(layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], w)
        x = jnp.tanh(x @ operand(layer, x))
      return x

    return jax.lax.fori_loop(0, 10, step, x)

  x = jax.ShapeDtypeStruct((2, d), jnp.float32)
  memory = jax.jit(steps).lower(w, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 3 * d * d * 4


def test_training_is_refused(folders):
  _, variables = rlm.load_checkpoint(folders["qwen2"], quantize="int8")
  with pytest.raises(ValueError, match="7 matrices are int8.*without quantize"):
    init_state(variables, optax.sgd(1.0), ema_decay=None)


def test_another_precision_is_refused(folders):
  with pytest.raises(ValueError, match="quantize='int4' is unknown"):
    rlm.load_checkpoint(folders["qwen2"], quantize="int4")
