"""The gate by hand and against loops; balance; experts in every form."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.models import experts, moe
from tests.fast_jit import fast_jit
from tests.models import families, reference
from tests.tiny_model import tiny_config

GATES = {
  "v3": dict(n_group=4, topk_group=2, routed_scaling_factor=2.5),
  "v3 one group": dict(n_group=1, topk_group=1),
  "v3 softmax": dict(n_group=2, topk_group=1, scoring_func="softmax"),
  "v2": dict(
    n_group=4,
    topk_group=2,
    topk_method="group_limited_greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
  ),
  "v2 sigmoid": dict(
    n_group=8, topk_group=3, topk_method="group_limited_greedy"
  ),
  "lite": dict(
    n_group=4,
    topk_group=1,
    topk_method="greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
  ),
}


def gate_config(**changes):
  return tiny_config(
    **{**dict(n_routed_experts=8, num_experts_per_tok=3), **changes}
  )


@pytest.mark.parametrize("name", GATES)
def test_gate_is_that_of_the_reference(name):
  cfg = gate_config(**GATES[name])
  rng = np.random.default_rng(0)
  logits = (2 * rng.standard_normal((2, 40, 8))).astype(np.float32)
  # Biases of both signs, larger than the scores: they change most choices.
  bias = rng.standard_normal(8).astype(np.float32)
  gate = fast_jit(functools.partial(moe.route, cfg=cfg))
  ids, gates, scores = jax.device_get(gate(logits, bias))
  assert ids.dtype == jnp.int32 and gates.dtype == jnp.float32
  for index in np.ndindex(2, 40):
    want = reference.affinities(
      logits[index].astype(np.float64), cfg.scoring_func
    )
    np.testing.assert_allclose(scores[index], want, rtol=1e-5)
    chosen = reference.choose(want, bias, cfg)
    np.testing.assert_array_equal(ids[index], chosen)
    np.testing.assert_allclose(
      gates[index], reference.gates(want, chosen, cfg), rtol=1e-5
    )


def choose(scores, bias, **changes):
  cfg = gate_config(**changes)
  select = fast_jit(functools.partial(moe.select_experts, cfg=cfg))
  return select(scores[None], bias).tolist()[0]


def test_a_group_scores_the_sum_of_its_two_best():
  scores = np.array([0.9, 0.1, 0.6, 0.5, 0.2, 0.1, 0.3, 0.1], np.float32)
  sizes = dict(n_group=4, topk_group=1, num_experts_per_tok=2)
  assert choose(scores, np.zeros(8, np.float32), **sizes) == [2, 3]
  v2 = dict(sizes, topk_method="group_limited_greedy")
  assert choose(scores, np.zeros(8, np.float32), **v2) == [0, 1]
  greedy = dict(sizes, topk_method="greedy")
  assert choose(scores, np.zeros(8, np.float32), **greedy) == [0, 2]


def test_masked_groups_lose_to_negative_scores():
  # Every biased score is negative: a mask of 0 would win over them all.
  scores = np.array([0.5, 0.4, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1], np.float32)
  bias = np.full(8, -2, np.float32)
  sizes = dict(n_group=4, topk_group=2, num_experts_per_tok=4)
  assert choose(scores, bias, **sizes) == [0, 1, 2, 3]


def test_equal_scores_go_to_the_earlier_expert():
  scores, bias = np.full(8, 0.5, np.float32), np.zeros(8, np.float32)
  for groups in (dict(n_group=1), dict(n_group=4, topk_group=2)):
    assert choose(scores, bias, **groups) == [0, 1, 2]


def test_bias_chooses_and_never_weighs():
  cfg = gate_config(n_group=1, num_experts_per_tok=2, routed_scaling_factor=2.5)
  logits = jnp.array([[[3.0, 2.0, 1.0, 0.0, -1.0, -1.0, -1.0, -1.0]]])
  # Large enough for (s + b) - b to lose s altogether.
  bias = jnp.array([0, 0, 0, 1e8, 0, 0, 0, 0], jnp.float32)
  ids, gates, _ = moe.route(logits, bias, cfg)
  assert ids.tolist() == [[[3, 0]]]
  s = 1 / (1 + np.exp(-np.array([0.0, 3.0])))
  np.testing.assert_allclose(gates[0, 0], 2.5 * s / s.sum(), rtol=1e-6)
  gradient = jax.grad(lambda b: moe.route(logits, b, cfg)[1][..., 0].sum())
  assert not gradient(bias).any()


def test_replayed_experts_keep_their_order():
  cfg = gate_config(norm_topk_prob=False)
  logits = jax.random.normal(jax.random.key(0), (1, 2, 8))
  given = jnp.array([[[5, 0, 2], [1, 1, 7]]], jnp.int32)
  ids, gates, scores = moe.route(logits, jnp.zeros(8), cfg, given)
  np.testing.assert_array_equal(ids, given)
  want = np.take_along_axis(np.asarray(scores), np.asarray(given), -1)
  np.testing.assert_array_equal(gates, want)


def test_scores_that_underflow_give_no_nan():
  cfg = gate_config()
  logits = np.full((1, 1, 8), -200.0, np.float32)

  @fast_jit
  def run(logits):
    _, gates, scores = moe.route(logits, jnp.zeros(8), cfg)
    return gates, moe.sequence_balance_loss(scores, np.ones((1, 1), bool), 3)

  gates, loss = run(logits)
  assert not gates.any() and not loss.any()


def test_balance_loss_counts_unbiased_choices_of_real_tokens():
  rng = np.random.default_rng(0)
  scores = rng.random((3, 6, 5)).astype(np.float32)
  mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0] * 6], bool)

  def total(scores):
    loss = moe.sequence_balance_loss(scores, mask, 2)
    return loss.sum(), loss

  gradient, loss = jax.device_get(
    fast_jit(jax.grad(total, has_aux=True))(scores)
  )
  exact = scores.astype(np.float64)
  want = [
    reference.balance_loss(s[m], 2) for s, m in zip(exact, mask, strict=True)
  ]
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert want[2] == 0

  # Through P alone: f is held where it is.
  assert np.isfinite(gradient).all() and not gradient[~mask].any()
  for s, m, grad in zip(exact[:2], mask, gradient, strict=False):
    direction = rng.standard_normal(s.shape)
    ends = [
      reference.balance_loss((s + sign * 1e-6 * direction)[m], 2)
      for sign in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / 2e-6
    assert slope == pytest.approx((grad * direction).sum(), rel=1e-4)


def test_balance_loss_of_perfect_balance_is_one():
  one_hot = np.eye(4, dtype=np.float32)[None] + 1e-3  # each expert once
  mask = jnp.ones((1, 4), bool)
  loss = moe.sequence_balance_loss(jnp.asarray(one_hot), mask, 1)
  assert loss[0] == pytest.approx(1, abs=1e-5)
  everyone = np.tile([[[1.0, 0, 0, 0]]], (1, 4, 1)).astype(np.float32)
  loss = moe.sequence_balance_loss(jnp.asarray(everyone), mask, 1)
  assert loss[0] == pytest.approx(4, abs=1e-5)


def test_bias_update_by_hand():
  bias = jnp.array([[0.5, 0.0, -0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
  load = jnp.array([[9.0, 1.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
  new = moe.update_expert_bias(bias, load, 0.001)
  want = [[0.499, 0.001, -0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]
  np.testing.assert_allclose(new, want, rtol=1e-6)


# Routed experts.
N, K, E, D, F = 20, 2, 5, 6, 3
FORMS = ("dense", "blocks", "ragged")


def expert_ids(kind):
  rng = np.random.default_rng(1)
  if kind == "any":
    return np.argsort(rng.random((N, E)), axis=1)[:, :K]
  if kind == "two experts":  # the other three are empty
    return np.tile([4, 1], (N, 1))
  return np.full((N, K), 2)  # one for all, as padding is replayed


@functools.cache
def compiled(form, dtype="float32", rows=None):
  """(ids) -> value, gradients of x, gates and the three weights."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  x, gates, d_out = normal(N, D), rng.random((N, K), np.float32), normal(N, D)
  weights = (normal(E, D, F), normal(E, D, F), normal(E, F, D))

  def value(x, gates, weights, ids):
    return experts.routed_experts(
      jnp.asarray(x, dtype),
      gates,
      ids,
      weights,
      implementation=form,
      rows=rows,
    )

  def run(x, gates, weights, ids):
    out, pull = jax.vjp(lambda *a: value(*a, ids), x, gates, weights)
    return out, pull(jnp.asarray(d_out, dtype))

  run = fast_jit(run)
  inputs = (x, gates, weights)
  return lambda ids: (inputs, *run(*inputs, ids.astype(np.int32)))


@pytest.mark.parametrize("kind", ["any", "two experts", "one expert"])
@pytest.mark.parametrize("form", FORMS)
def test_experts_of_every_form_are_those_of_the_loop(form, kind):
  ids = expert_ids(kind)
  (x, gates, weights), out, gradients = compiled(form)(ids)
  want = np.zeros((N, D))
  for n, k in np.ndindex(N, K):
    names = ("gate_proj", "up_proj", "down_proj")
    p = {
      name: w[ids[n, k]].astype(np.float64)
      for name, w in zip(names, weights, strict=True)
    }
    want[n] += gates[n, k] * reference.swiglu(p, x[n].astype(np.float64))
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  # The whole-model test holds the dense form's gradients to the reference.
  _, _, dense = compiled("dense")(ids)
  for a, b in zip(*map(jax.tree.leaves, (gradients, dense)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@hypothesis.given(
  st.lists(st.integers(0, E - 1), min_size=N * K, max_size=N * K)
)
def test_forms_agree_on_any_routes(flat):
  ids = np.array(flat).reshape(N, K)
  _, want, _ = compiled("dense")(ids)
  for form in ("blocks", "ragged"):
    _, out, _ = compiled(form)(ids)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [4, 17, 1000])
@pytest.mark.parametrize("form", ["blocks", "ragged"])
def test_choices_elsewhere_and_passes_change_nothing(form, rows):
  """An id of E is of another device; 4 rows of room are passed many times."""
  ids = expert_ids("any")
  partly = np.where(np.arange(N * K).reshape(N, K) % 3, E, ids)
  for some in (ids, partly, np.full_like(ids, E), expert_ids("one expert")):
    _, want, want_gradients = compiled("dense")(some)
    _, out, gradients = compiled(form, rows=rows)(some)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(
      *map(jax.tree.leaves, (gradients, want_gradients)), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_experts_have_float32_gradients(form):
  ids = expert_ids("any")
  _, want, want_gradients = compiled("dense")(ids)
  _, out, gradients = compiled(form, "bfloat16")(ids)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(np.float32), want, rtol=0.05, atol=0.3)
  for a, b in zip(
    *map(jax.tree.leaves, (gradients, want_gradients)), strict=True
  ):
    assert a.dtype == jnp.float32
    assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(b)


def test_the_form_follows_the_number_of_tokens(monkeypatch):
  taken = []
  for name in ("dense", "grouped"):
    monkeypatch.setattr(
      experts,
      f"routed_experts_{name}",
      lambda *a, name=name: taken.append(name),
    )
  weights = (np.zeros((E, D, F)),) * 3
  for tokens in (experts.DENSE_TOKENS, experts.DENSE_TOKENS + 1):
    experts.routed_experts(np.zeros((tokens, D)), None, None, weights)
  assert taken == ["dense", "grouped"]


def test_a_flip_is_another_set_of_experts():
  # Equal; in another order; one other expert; all others.
  chosen = np.array([[0, 1], [2, 3], [0, 2], [0, 3]])
  replayed = np.array([[0, 1], [3, 2], [0, 1], [1, 2]])
  flips = moe.route_flips(chosen, replayed)
  np.testing.assert_array_equal(flips, [False, False, True, True])


def moe_case(**changes):
  """Module, x [2, 4, D] and segments with padding."""
  module = moe.MoE(tiny_config(**{**families.FAMILIES["v3"], **changes}))
  x = np.random.default_rng(0).standard_normal((2, 4, 16)).astype(np.float32)
  segments = np.array([[1, 1, 2, 0], [1, 1, 1, 1]], np.int32)
  return module, x, segments


def test_module_parameters_and_their_std():
  module, x, segments = moe_case(n_routed_experts=32)
  variables = jax.device_get(
    fast_jit(module.init)(jax.random.key(0), x, segments)
  )
  e, d, f = 32, 16, module.cfg.moe_intermediate_size
  params = variables["params"]
  shapes = {k: w.shape for k, w in params.items() if k != "shared"}
  assert shapes == {
    "router": (d, e),
    "gate_proj": (e, d, f),
    "up_proj": (e, d, f),
    "down_proj": (e, f, d),
  }
  for leaf in jax.tree.leaves(params):
    assert abs(leaf.std() / 0.2 - 1) < 5 / np.sqrt(2 * leaf.size)
  bias = variables["router"]["expert_bias"]
  assert bias.dtype == jnp.float32 and bias.shape == (e,) and not bias.any()


def test_the_gate_is_float32_in_a_bfloat16_model():
  module, x, segments = moe_case(dtype="bfloat16", n_shared_experts=0)
  x = x.astype(jnp.bfloat16)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda s: rng.standard_normal(s.shape).astype(s.dtype),
    jax.eval_shape(module.init, jax.random.key(0), x, segments),
  )
  assert "shared" not in variables["params"]
  out, routing = fast_jit(module.apply)(variables, x, segments)
  assert out.dtype == jnp.bfloat16
  router = np.asarray(variables["params"]["router"], np.float64)
  scores = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ router))
  want = [
    reference.balance_loss(s[m], module.cfg.num_experts_per_tok)
    for s, m in zip(scores, np.asarray(segments) != 0, strict=True)
  ]
  # A gate in bfloat16 would be off in the third digit.
  np.testing.assert_allclose(routing.balance_loss, want, rtol=1e-6)
