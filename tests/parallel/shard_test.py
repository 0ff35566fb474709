"""What devices hand each other, and that derivatives pass the right way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlm.parallel.config import ROWS, TOKENS
from rlm.parallel.mesh import make_mesh
from rlm.parallel.shard import WHOLE, MeshShard
from rlm.parallel.sharding import state_specs
from tests.fast_jit import fast_jit
from tests.tiny_model import mesh_of


def on_mesh(f, in_specs, out_specs, gradient_dtype="float32", **sizes):
  """`f(shard, *parts)` on every device, compiled."""
  shard = MeshShard(sizes=tuple(sizes.items()), gradient_dtype=gradient_dtype)
  return fast_jit(
    jax.shard_map(
      functools.partial(f, shard),
      mesh=make_mesh(mesh_of(**sizes), "mesh"),
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )
  )


def normal(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


PARAMS = {
  "moe_layers": {"ffn": {"gate_proj": normal(1, 2, 16, 4)}},  # an expert's
  "attn": {"q_b": normal(16, 6), "out_proj": normal(6, 16)},
  "router": normal(16, 4),
  "embed": {"embedding": normal(8, 16)},
  "norm": {"scale": normal(16)},
}


def test_matrices_are_gathered_and_their_gradients_added_up():
  """Each device weighs every matrix by its own number, 1 to 8."""
  sizes = dict(data=2, fsdp=2, expert=2)
  specs = state_specs(PARAMS)

  def f(shard, params, number):
    def scalar(params):
      whole = shard.matrices(params, jnp.float32)
      return number[0] * sum(x.sum() for x in jax.tree.leaves(whole)), whole

    gradients, whole = jax.grad(scalar, has_aux=True)(params)
    shapes = jax.tree.map(lambda x: jnp.array(x.shape), whole)
    return shard.sum_gradients(gradients), shapes

  numbers = np.arange(1, 9, dtype=np.float32)
  gradients, shapes = on_mesh(f, (specs, P(ROWS)), (specs, P()), **sizes)(
    PARAMS, numbers
  )
  for path, x in jax.tree_util.tree_leaves_with_path(PARAMS):
    (gradient,) = (
      g for p, g in jax.tree_util.tree_leaves_with_path(gradients) if p == path
    )
    (shape,) = (
      s for p, s in jax.tree_util.tree_leaves_with_path(shapes) if p == path
    )
    if "gate_proj" in jax.tree_util.keystr(path):
      # One expert is here; odd devices of the axis `expert` hold the second.
      assert shape.tolist() == [1, 1, 16, 4]
      np.testing.assert_array_equal(gradient[:, 0], numbers[::2].sum())
      np.testing.assert_array_equal(gradient[:, 1], numbers[1::2].sum())
    else:
      assert shape.tolist() == list(x.shape)
      np.testing.assert_array_equal(gradient, numbers.sum())


TYPES = {"float32": "f32", "bfloat16": "bf16"}


@pytest.mark.parametrize("gradient_dtype", TYPES)
def test_the_type_in_which_gradients_are_added(gradient_dtype):
  """Looked up in the program: XLA's CPU backend adds bfloat16 as float32."""
  params = {"q_b": normal(8, 2)}
  specs = state_specs(params)

  def f(shard, params):
    def scalar(params):
      return shard.matrices(params, jnp.bfloat16)["q_b"].sum()

    return jax.grad(scalar)(params)

  divided = on_mesh(f, (specs,), specs, gradient_dtype, fsdp=2, context=2)
  program = str(divided.trace(params).jaxpr)
  sums = [line for line in program.splitlines() if "= reduce_scatter" in line]
  assert len(sums) == 2  # an axis after the other
  assert all(f":{TYPES[gradient_dtype]}[" in line for line in sums)


def test_only_matrices_are_cast_and_the_router_stays_float32():
  def f(shard, params):
    whole = shard.matrices(params, jnp.bfloat16)
    types = jax.tree.map(lambda x: x.dtype, whole)
    assert types["attn"]["q_b"] == types["embed"]["embedding"] == jnp.bfloat16
    assert types["router"] == types["norm"]["scale"] == jnp.float32
    return whole["router"]

  specs = state_specs(PARAMS)
  got = on_mesh(f, (specs,), P(), fsdp=2)(PARAMS)
  np.testing.assert_array_equal(got, PARAMS["router"])


def test_tokens_are_looked_up_where_the_columns_are():
  sizes = dict(data=2, fsdp=2, context=2)
  table, weights = normal(8, 16), normal(8, 6, 16)
  tokens = np.random.default_rng(1).integers(0, 8, (8, 6)).astype(np.int32)
  specs = {"embedding": P(None, ("fsdp", "context"))}
  by_token = P(ROWS, "context")

  def f(shard, params, tokens, weights):
    def scalar(params):
      x = shard.lookup(params["embedding"], tokens, jnp.float32)
      return (x * weights).sum(), x

    gradients, x = jax.grad(scalar, has_aux=True)(params)
    return x, shard.sum_gradients(gradients)

  x, gradients = on_mesh(
    f, (specs, by_token, by_token), (by_token, specs), **sizes
  )({"embedding": table}, tokens, weights)
  np.testing.assert_array_equal(x, table[tokens])
  expected = np.zeros_like(table)
  np.add.at(expected, tokens, weights)
  np.testing.assert_allclose(gradients["embedding"], expected, atol=1e-5)
  np.testing.assert_array_equal(
    WHOLE.lookup(jnp.asarray(table), tokens, jnp.float32), table[tokens]
  )


def test_parts_of_a_row_and_its_sums():
  sizes = dict(data=2, context=4)
  x = normal(4, 8, 3)

  def f(shard, x):
    assert shard.context == 4
    whole = shard.whole_rows(x)
    same = (shard.own_tokens(whole, 1) == x).all()
    total = shard.sum_row(x.sum(axis=1))
    return whole, total, same[None]

  whole, total, same = on_mesh(
    f,
    (P("data", "context"),),
    (P("data"), P("data"), P(("data", "context"))),
    **sizes,
  )(x)
  np.testing.assert_array_equal(whole, x)
  np.testing.assert_allclose(total, x.sum(axis=1), atol=1e-5)
  assert same.all()


def test_heads_begin_and_end_to_differ():
  """y = sum over h of w_h^2 x, h on two devices; x and y are held alike."""
  x, w = normal(3), normal(4)

  def f(shard, x, w):
    def y(x, w):
      x = shard.enter_tensor(x)
      return shard.leave_tensor((w[:, None] ** 2 * x[None]).sum(axis=0))

    out, pull = jax.vjp(y, x, w)
    return out, *pull(jnp.ones_like(out))

  out, dx, dw = on_mesh(
    f, (P(), P("tensor")), (P(), P(), P("tensor")), tensor=2
  )(x, w)
  np.testing.assert_allclose(out, (w**2).sum() * x, rtol=1e-5)
  np.testing.assert_allclose(dx, (w**2).sum() * np.ones(3), rtol=1e-5)
  np.testing.assert_allclose(dw, 2 * w * x.sum(), rtol=1e-5)


def test_devices_stop_with_those_they_need_and_no_others():
  sizes = dict(data=2, fsdp=2, tensor=2)
  axes = ("data", "fsdp", "tensor")
  flags = np.zeros(8, bool)
  flags[5] = True  # on the second replica

  def f(shard, flag):
    return shard.any_device(flag[0])[None]

  got = on_mesh(f, (P(axes),), P(axes), **sizes)(flags)
  assert got.tolist() == [False] * 4 + [True] * 4


def test_reductions_are_over_different_tokens():
  sizes = dict(data=2, context=2, tensor=2)
  x = np.arange(4, dtype=np.float32)

  def f(shard, x):
    rows = shard.gather_rows(x, 0)
    return (
      shard.sum_tokens(x.sum()),
      shard.over_tokens(x.max(), jax.lax.pmax),
      rows,
    )

  total, largest, rows = on_mesh(
    f, (P(TOKENS),), (P(), P(), P("context")), **sizes
  )(x)
  assert (total, largest) == (6, 3)
  # Of each part of the rows, those of both replicas.
  assert rows.tolist() == [0, 2, 1, 3]


def test_one_device_leaves_everything_as_it_is():
  x, flag = jnp.ones((2, 3)), jnp.bool_(True)
  for shard in (WHOLE, MeshShard()):
    assert not shard.gathers and shard.context == 1
    for same in (
      *(shard.whole_rows(x), shard.own_tokens(x, 1), shard.sum_row(x)),
      *(shard.enter_tensor(x), shard.leave_tensor(x), shard.sum_tokens(x)),
      *(shard.gather_rows(x, 0), shard.over_tokens(x, jax.lax.pmax)),
    ):
      assert same is x
    assert shard.any_device(flag) is flag
