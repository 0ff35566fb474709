"""Every product of the model, forward and backward, is exact in float32."""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm import losses
from rlm.kernels import grouped_matmul, product
from tests.tiny_model import tiny_model

RLM = pathlib.Path(product.__file__).parents[1]
HIGHEST = jax.lax.Precision.HIGHEST
PRODUCTS = ("dot", "dot_general", "einsum", "matmul", "ragged_dot", "tensordot")


def test_float32_is_exact_and_bfloat16_sums_in_float32():
  assert product.exact_sums(jnp.float32)["precision"] == HIGHEST
  assert product.exact_sums(jnp.bfloat16)["precision"] is None
  # 256 + 1 is no bfloat16.
  ones = jnp.ones((1, 257), jnp.bfloat16)
  got = product.einsum("ik,jk->ij", ones, ones)
  assert got.dtype == jnp.float32 and got[0, 0] == 257


def test_operands_of_two_dtypes_are_refused():
  x = jnp.ones((2, 2))
  with pytest.raises(TypeError, match="of float32 and bfloat16"):
    product.einsum("ij,jk->ik", x, x.astype(jnp.bfloat16))


def products(jaxpr):
  """All product equations of a jaxpr and of those inside it."""
  for equation in jaxpr.eqns:
    if equation.primitive.name.startswith(("dot_general", "ragged_dot")):
      yield equation
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from products(inner)


def assert_exact(function, *args):
  found = list(products(jax.make_jaxpr(function)(*args).jaxpr))
  for equation in found:
    assert equation.invars[0].aval.dtype == jnp.float32
    precision = equation.params["precision"]
    assert precision in (HIGHEST, (HIGHEST, HIGHEST)), equation
  return len(found)


@pytest.mark.parametrize("implementation", ["ragged", "blocks"])
def test_every_product_of_training_is_exact(implementation, monkeypatch):
  # More tokens than the dense form takes, which decoding covers.
  monkeypatch.setattr(
    "rlm.models.experts.default_implementation", lambda: implementation
  )
  monkeypatch.setattr(
    grouped_matmul, "default_implementation", lambda: implementation
  )
  model, variables = tiny_model()
  tokens = np.ones((2, 40), np.int32)
  batch = losses.global_weights(
    {
      "tokens": tokens,
      "positions": np.cumsum(tokens, axis=1, dtype=np.int32) - 1,
      "segment_ids": tokens,
      "loss_mask": tokens > 0,
    },
    mtp_depth=1,
  )
  batch["mtp_weight"] = np.float32(0.3)
  loss = losses.make_pretrain_loss(model, train_mtp=True, balance_weight=0.1)
  step = jax.grad(lambda v: loss(v, batch, jax.random.key(0))[0])
  assert assert_exact(step, variables) > 60


def test_every_product_of_decoding_is_exact():
  model, variables = tiny_model()
  rows = np.ones((1, 4), np.int32)
  prefill = functools.partial(model.apply, method="prefill")
  _, cache, _ = jax.eval_shape(prefill, variables, rows, rows, rows)
  decode = functools.partial(model.apply, method="decode")
  assert assert_exact(decode, variables, rows[:, :1], cache) > 20


def inexact_calls(source):
  """Lines of products that do not leave their precision to this module."""
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Call):
      continue
    name = ast.unparse(node.func)
    of_jax = name.startswith(("jnp.", "jax.")) and name.endswith(
      tuple(f".{product}" for product in PRODUCTS)
    )
    decided = any(
      ast.unparse(keyword).startswith(("**exact_sums(", "**exact_rounded("))
      for keyword in node.keywords
    )
    if of_jax and not decided:
      yield node.lineno


def test_no_module_decides_for_itself():
  assert list(inexact_calls("jnp.einsum('ij,jk', x, y)")) == [1]
  assert not list(inexact_calls("jnp.matmul(x, y, **exact_sums(x.dtype))"))
  found = [
    f"{path.relative_to(RLM)}:{line}"
    for path in sorted(RLM.rglob("*.py"))
    for line in inexact_calls(path.read_text())
  ]
  assert not found, found
