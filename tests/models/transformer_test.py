"""The whole model against the papers' equations, and what must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm.models.transformer import head_kernel, update_router
from tests.models import families
from tests.models.families import (
  DOCUMENTS,
  SHAPE,
  differentiate,
  fast_jit,
  float64,
  model_of,
  no_cotangents,
  packed_rows,
  predicts,
  reference_rows,
  variables_of,
)

NAMES = tuple(families.FAMILIES)
leaves = jax.tree.leaves


def assert_trees_close(got, want):
  """To a few roundings of float32 of the largest entry in each array."""
  for a, b in zip(leaves(got), leaves(want), strict=True):
    size = np.abs(b).max(initial=1.0)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * size)


@functools.cache
def random_cotangents(name):
  """Normal weights on every output that means something."""
  cfg = model_of(name).cfg
  rng = np.random.default_rng(1)
  _, _, segments = packed_rows()
  cotangents = {
    key: rng.standard_normal(x.shape).astype(np.float32)
    for key, x in no_cotangents(cfg).items()
  }
  cotangents["hidden"] *= (segments != 0)[..., None]
  cotangents["mtp"] *= predicts(cfg.num_nextn_predict_layers)[..., None]
  return cotangents


@functools.cache
def outputs_and_gradients(name):
  return differentiate(name)(
    variables_of(name), packed_rows(), random_cotangents(name)
  )


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_reference(name):
  cfg = model_of(name).cfg
  outputs, _ = outputs_and_gradients(name)
  tokens, _, segments = packed_rows()
  hidden, ids, mtp_hidden, balance, mtp_balance = reference_rows(
    float64(variables_of(name)), cfg, tokens
  )
  real = segments != 0
  # float32 holds 1e-7 of values about 1 and a dozen layers of sums add up.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(outputs["hidden"][real], hidden[real])
  routing = outputs["routing"]
  np.testing.assert_array_equal(routing.expert_ids[:, real], ids[:, real])
  close(routing.balance_loss, balance)
  for k, mask in enumerate(predicts(cfg.num_nextn_predict_layers)):
    close(outputs["mtp_hidden"][k][mask], mtp_hidden[k][mask])
    if not cfg.is_dense:
      close(outputs["mtp_routing"].balance_loss[k], mtp_balance[k])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_reference(name):
  # Each leaf along a random direction: float32 gradients of the model against
  # central differences of the float64 reference, good to about 1e-9.
  cfg = model_of(name).cfg
  _, gradients = outputs_and_gradients(name)
  cotangents = random_cotangents(name)
  variables = float64(variables_of(name))
  tokens, _, _ = packed_rows()

  def scalar(params):
    hidden, _, mtp_hidden, balance, mtp_balance = reference_rows(
      {**variables, "params": params}, cfg, tokens
    )
    return (
      (hidden * cotangents["hidden"]).sum()
      + (mtp_hidden * cotangents["mtp"]).sum()
      + (balance * cotangents["balance"]).sum()
      + (mtp_balance * cotangents["mtp_balance"]).sum()
    )

  leaves, tree = jax.tree.flatten_with_path(variables["params"])
  grads = jax.tree.leaves(gradients["params"])
  rng = np.random.default_rng(2)
  eps = 1e-5
  for i, ((path, leaf), grad) in enumerate(zip(leaves, grads, strict=True)):
    name_of_leaf = jax.tree_util.keystr(path)
    if name_of_leaf == "['head']":  # hidden states do not pass it
      assert not grad.any()
      continue
    direction = rng.standard_normal(leaf.shape)
    ends = []
    for sign in (1, -1):
      moved = [x for _, x in leaves]
      moved[i] = leaf + sign * eps * direction
      ends.append(scalar(jax.tree.unflatten(tree, moved)))
    slope = (ends[0] - ends[1]) / (2 * eps)
    size = np.linalg.norm(grad)
    assert size > 1e-3, f"{name_of_leaf} has no gradient"
    error = abs(slope - (grad * direction).sum()) / size
    assert error < 1e-4, f"{name_of_leaf}: {error:.1e} of its gradient"


@pytest.mark.parametrize("name", NAMES)
def test_a_state_depends_on_its_document_up_to_itself(name):
  # No token id occurs twice, so the embedding's gradient has a row per cell.
  cfg = model_of(name).cfg
  rows = tokens, _, _ = packed_rows()
  for row, start, length in DOCUMENTS:
    for t in range(start, start + length):
      cotangents = no_cotangents(cfg)
      cotangents["hidden"][row, t] = np.arange(1, cfg.hidden_size + 1)
      _, gradients = differentiate(name)(variables_of(name), rows, cotangents)
      used = gradients["params"]["embed"]["embedding"].any(axis=-1)
      assert set(np.flatnonzero(used)) == set(tokens[row, start : t + 1])


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
  tokens, positions, segments = (x.copy() for x in packed_rows())
  pad = segments == 0
  tokens[pad] = 3
  positions[pad] = np.arange(pad.sum()) % 5
  cotangents = random_cotangents(name)
  outputs, gradients = differentiate(name)(
    variables_of(name), (tokens, positions, segments), cotangents
  )
  want, want_gradients = outputs_and_gradients(name)
  np.testing.assert_array_equal(outputs["hidden"][~pad], want["hidden"][~pad])
  np.testing.assert_array_equal(
    outputs["routing"].expert_load, want["routing"].expert_load
  )
  np.testing.assert_array_equal(
    outputs["routing"].balance_loss, want["routing"].balance_loss
  )
  if "mtp_routing" in want:  # though a document's last position reads padding
    got, expected = outputs["mtp_routing"], want["mtp_routing"]
    np.testing.assert_array_equal(got.expert_load, expected.expert_load)
    np.testing.assert_array_equal(got.balance_loss, expected.balance_loss)
  assert_trees_close(gradients, want_gradients)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_meet(name):
  order = np.array([2, 0, 1])
  cotangents = no_cotangents(model_of(name).cfg)
  rows = tuple(x[order] for x in packed_rows())
  outputs, _ = differentiate(name)(variables_of(name), rows, cotangents)
  want, _ = outputs_and_gradients(name)
  np.testing.assert_allclose(
    outputs["hidden"], want["hidden"][order], rtol=1e-6, atol=1e-6
  )
  np.testing.assert_array_equal(
    outputs["routing"].expert_ids, want["routing"].expert_ids[:, order]
  )
  np.testing.assert_array_equal(
    outputs["routing"].expert_load, want["routing"].expert_load
  )


def test_load_counts_the_experts_of_real_tokens():
  cfg = model_of("v3").cfg
  outputs, _ = outputs_and_gradients("v3")
  real = packed_rows()[2] != 0
  for part, masks in (
    ("routing", [real] * cfg.num_moe_layers),
    ("mtp_routing", predicts(cfg.num_nextn_predict_layers)),
  ):
    routing = outputs[part]
    for ids, load, mask in zip(
      routing.expert_ids, routing.expert_load, masks, strict=True
    ):
      counts = np.bincount(ids[mask].ravel(), minlength=cfg.n_routed_experts)
      np.testing.assert_array_equal(load, counts)
      assert load.sum() == cfg.num_experts_per_tok * mask.sum()


def test_a_row_of_padding_has_no_balance_loss_and_finite_gradients():
  outputs, gradients = outputs_and_gradients("v3")
  empty = (packed_rows()[2] == 0).all(axis=1)
  for part in ("routing", "mtp_routing"):
    loss = outputs[part].balance_loss
    assert (loss[:, empty] == 0).all() and (loss[:, ~empty] > 0.5).all()
  assert all(np.isfinite(x).all() for x in leaves((outputs, gradients)))


def test_expert_biases_have_no_gradient():
  for name in ("v3", "v2"):
    _, gradients = outputs_and_gradients(name)
    assert leaves(gradients["router"])
    assert not any(x.any() for x in leaves(gradients["router"]))


@functools.cache
def replay():
  """Compiled once: (variables, rows, expert_ids) -> hidden, routing of v3."""
  return fast_jit(model_of("v3").apply)


def test_replayed_routes():
  model, rows = model_of("v3"), packed_rows()
  variables, real = variables_of("v3"), rows[2] != 0
  want, _ = outputs_and_gradients("v3")
  chosen = want["routing"].expert_ids
  hidden, routing = replay()(variables, *rows, chosen)
  np.testing.assert_allclose(hidden, want["hidden"], rtol=1e-6, atol=1e-6)
  assert not routing.flips.any() and not want["routing"].flips.any()

  # Routes that no gate would choose, out of order, and padding as a sampler
  # leaves it, with one expert for all of K.
  other = np.where(real[..., None], (chosen[..., ::-1] + 5) % 8, 0)
  hidden, routing = replay()(variables, *rows, other)
  expected, *_ = reference_rows(float64(variables), model.cfg, rows[0], other)
  np.testing.assert_allclose(hidden[real], expected[real], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(routing.expert_ids, other)
  assert routing.expert_load.sum() == other[:, real].size
  # The first layer sees the state that it saw when it was free.
  moved = (np.sort(chosen[0]) != np.sort(other[0])).any(axis=-1) & real
  np.testing.assert_array_equal(routing.flips[0], moved)
  assert moved.any()


def test_a_flip_is_of_the_router_and_not_of_the_routes_above():
  rows = packed_rows()
  variables, real = variables_of("v3"), rows[2] != 0
  chosen = outputs_and_gradients("v3")[0]["routing"].expert_ids
  row, t = np.argwhere(real)[0]
  other = np.array(chosen)
  # In the last layer, one token to an expert that it did not choose.
  unused = set(range(8)) - set(other[-1, row, t].tolist())
  other[-1, row, t, 0] = min(unused)
  flips = np.asarray(replay()(variables, *rows, other)[1].flips)
  assert np.argwhere(flips).tolist() == [[len(other) - 1, row, t]]


def test_bfloat16_over_float32_parameters():
  model = model_of("v2", dtype="bfloat16")
  hidden, routing = fast_jit(model.apply)(variables_of("v2"), *packed_rows())
  want, _ = outputs_and_gradients("v2")
  assert hidden.dtype == jnp.bfloat16
  assert routing.balance_loss.dtype == jnp.float32
  # 8 bits of mantissa through two layers.
  error = np.abs(hidden.astype(np.float32) - want["hidden"]).max()
  assert 1e-4 < error < 0.2


@pytest.mark.parametrize("name", NAMES)
def test_decode_continues_prefill(name):
  # Weights of std 1 and more: the gates and the attention are far from even.
  model, variables = model_of(name), variables_of(name, std=1.0)
  tokens, positions, segments = families.whole_rows()
  full, _ = differentiate(name)(
    variables, (tokens, positions, segments), no_cotangents(model.cfg)
  )
  want_ids = full["routing"].expert_ids
  lengths = np.array([3, 1, 0], np.int32)  # row 2 starts from an empty cache
  prompt = (positions < lengths[:, None]).astype(np.int32)
  prefill = fast_jit(functools.partial(model.apply, method="prefill"))
  decode = fast_jit(functools.partial(model.apply, method="decode"))
  hidden, cache, ids = prefill(variables, tokens * prompt, positions, prompt)
  held = prompt.astype(bool)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  close(hidden[held], full["hidden"][held])
  np.testing.assert_array_equal(ids[:, held], want_ids[:, held])
  np.testing.assert_array_equal(cache.lengths, lengths)

  rows = np.arange(SHAPE[0])
  for step in range(4):
    at = lengths + step
    hidden, cache, ids = decode(variables, tokens[rows, at][:, None], cache)
    close(hidden[:, 0], full["hidden"][rows, at])
    np.testing.assert_array_equal(ids[:, :, 0], want_ids[:, rows, at])
    np.testing.assert_array_equal(cache.lengths, at + 1)

  # Row 0 is full: its next token is written nowhere, and the rest go on.
  before = cache
  at = np.minimum(lengths + 4, SHAPE[1] - 1)
  hidden, cache, _ = decode(variables, tokens[rows, at][:, None], cache)
  close(hidden[1:, 0], full["hidden"][rows, at][1:])
  assert np.isfinite(hidden).all()
  for new, old in zip(cache.layers, before.layers, strict=True):
    np.testing.assert_array_equal(new[0], old[0])
    assert (new[1:] != old[1:]).any()


def test_head_kernel():
  for name in ("v3", "v2"):
    variables, cfg = variables_of(name), model_of(name).cfg
    head = head_kernel(variables, cfg)
    assert head.shape == (cfg.hidden_size, cfg.vocab_size)
    params = variables["params"]
    tied = cfg.tie_word_embeddings
    assert ("head" in params) == (not tied)
    want = params["embed"]["embedding"].T if tied else params["head"]
    np.testing.assert_array_equal(head, want)


def test_initial_values_have_the_configured_std():
  # Two MTP modules hold every kind of matrix but the experts', see moe_test.
  model = model_of(
    "dense",
    hidden_size=64,
    initializer_range=0.006,
    num_nextn_predict_layers=2,
  )
  row, hidden = np.ones((1, 2), np.int32), np.ones((1, 2, 64), np.float32)
  init = fast_jit(functools.partial(model.init, method="mtp"))
  variables = init(jax.random.key(0), hidden, row, row, row)
  params = jax.device_get(variables["params"])
  assert set(params) == {"embed", "head", "mtp_modules"}
  for path, leaf in jax.tree.leaves_with_path(params):
    name = jax.tree_util.keystr(path)
    if path[-1].key == "scale":
      assert (leaf == 1).all(), name
      continue
    # 5 standard errors of a std over n draws, 1 / sqrt(2 n).
    assert abs(leaf.std() / 0.006 - 1) < 5 / np.sqrt(2 * leaf.size), name
    assert abs(leaf.mean()) < 5 * 0.006 / np.sqrt(leaf.size), name
    assert len({layer.tobytes() for layer in leaf}) == len(leaf), name


def test_unrolled_layers_are_recomputed_too():
  # Only a barrier keeps XLA from merging the second computation with the first;
  # a loop needs none.
  def has_barrier(**changes):
    changes |= dict(num_nextn_predict_layers=0, attention_chunk=0)
    model = model_of("dense", remat="dots", **changes)
    variables, rows = variables_of("dense"), packed_rows()
    grad = jax.grad(lambda v: model.apply(v, *rows)[0].sum())
    return "optimization_barrier" in jax.jit(grad).lower(variables).as_text()

  assert has_barrier(unroll_layers=True)
  assert not has_barrier(unroll_layers=False)


def test_remat_policies_compute_more_and_more_again():
  def products(remat):
    changes = dict(num_nextn_predict_layers=0, attention_chunk=0)
    model = model_of("dense", remat=remat, unroll_layers=False, **changes)
    variables, rows = variables_of("dense"), packed_rows()
    grad = jax.grad(lambda v: model.apply(v, *rows)[0].sum())
    text = jax.jit(grad).lower(variables).as_text()
    return text.count("stablehlo.dot_general")

  # "dots" keeps the products with weights, so only attention's come again.
  assert products("none") < products("dots") < products("block")


def test_update_router_moves_each_bias_by_its_own_load():
  router = variables_of("v3")["router"]
  rng = np.random.default_rng(0)
  load = rng.integers(0, 9, (2, 8)).astype(np.float32)
  mtp_load = rng.integers(0, 9, (2, 8)).astype(np.float32)

  def moved(part, load):
    (bias,) = leaves(router[part])
    mean = load.mean(axis=1, keepdims=True)
    return bias + 0.25 * ((mean > load) * 1.0 - (mean < load) * 1.0)

  for given in (mtp_load, None):
    new = update_router(router, load, given, 0.25)
    assert jax.tree.structure(new) == jax.tree.structure(router)
    np.testing.assert_allclose(
      leaves(new["moe_layers"])[0], moved("moe_layers", load), rtol=1e-6
    )
    want = leaves(router["mtp_modules"])[0]
    if given is not None:
      want = moved("mtp_modules", mtp_load)
    np.testing.assert_allclose(leaves(new["mtp_modules"])[0], want, rtol=1e-6)
  assert update_router({}, jnp.zeros((0, 1)), None, 0.25) == {}


def test_a_dense_model_has_no_routes():
  outputs, gradients = outputs_and_gradients("dense")
  assert "router" not in variables_of("dense") and "router" not in gradients
  for part in ("routing", "mtp_routing"):
    assert outputs[part].expert_ids.shape == (0, *SHAPE, 0)
    assert outputs[part].expert_load.shape[0] == 0
    assert outputs[part].balance_loss.shape == (0, SHAPE[0])
