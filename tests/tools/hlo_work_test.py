import jax
import jax.numpy as jnp
import pytest

from tests.tools import hlo_programs
from tools import hlo_work

LAYERS, ROWS, WIDTH = 6, 32, 64


def layer(x, w):
  return jnp.tanh(x @ w), None


def test_operations_of_a_scan_forward_and_backward():
  def loss(w, x):
    return jax.lax.scan(layer, x, w)[0].sum()

  w, x = jnp.zeros((LAYERS, WIDTH, WIDTH)), jnp.zeros((ROWS, WIDTH))
  product = 2 * ROWS * WIDTH * WIDTH
  forward = hlo_work.count_work(hlo_programs.follow(jax.jit(loss), w, x))
  assert forward.flops == forward.flops_nominal == LAYERS * product
  both = hlo_work.count_work(
    hlo_programs.follow(jax.jit(jax.grad(loss, (0, 1))), w, x)
  )
  assert both.flops == 3 * LAYERS * product
  assert both.flops_by_dtype == {"f32": both.flops}
  assert not both.unknown
  assert "hlo_work_test.py" in both.products[0].source
  assert "dot_general" in both.products[0].op_name


def test_recomputation_is_counted():
  def loss(w, x):
    return jax.lax.scan(jax.checkpoint(layer), x, w)[0].sum()

  w, x = jnp.zeros((LAYERS, WIDTH, WIDTH)), jnp.zeros((ROWS, WIDTH))
  run = hlo_programs.follow(jax.jit(jax.grad(loss, (0, 1))), w, x)
  assert hlo_work.count_work(run).flops == (
    4 * LAYERS * 2 * ROWS * WIDTH * WIDTH
  )


def test_a_number_of_turns_from_outside():
  def step(x, w, n):
    return jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x @ w), x)

  x, w = jnp.zeros((ROWS, WIDTH)), jnp.zeros((WIDTH, WIDTH))
  run = hlo_programs.follow(jax.jit(step), x, w, jnp.int32(2), default_trips=15)
  assert hlo_work.count_work(run).flops == 15 * 2 * ROWS * WIDTH * WIDTH


def test_a_scan_reads_each_layer_once():
  w, x = jnp.zeros((LAYERS, 256, 256)), jnp.zeros((8, 256))
  run = hlo_programs.follow(
    jax.jit(lambda w, x: jax.lax.scan(layer, x, w)[0]), w, x
  )
  work = hlo_work.count_work(run)
  weights = w.size * 4
  # Each slice is copied out before its product: read, written, read.
  assert weights <= work.hbm_bytes < 4 * weights
  assert sum(work.hbm_bytes_by_opcode.values()) == pytest.approx(work.hbm_bytes)


def test_work_grows_with_the_number_of_layers():
  def of(layers):
    w, x = jnp.zeros((layers, WIDTH, WIDTH)), jnp.zeros((ROWS, WIDTH))
    run = hlo_programs.follow(
      jax.jit(lambda w, x: jax.lax.scan(layer, x, w)[0]), w, x
    )
    return hlo_work.count_work(run)

  four, eight = of(4), of(8)
  assert eight.flops == 2 * four.flops
  assert eight.hbm_bytes == pytest.approx(2 * four.hbm_bytes, rel=0.1)
