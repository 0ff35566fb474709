import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm import losses
from rlm.models.transformer import Transformer, head_kernel
from tests.fast_jit import fast_jit
from tests.tiny_model import tiny_config, tiny_model


def logprob_case(seed, n_tokens=7, width=5, n_vocab=11, n_vocab_used=10):
  keys = jax.random.split(jax.random.key(seed), 3)
  hidden = jax.random.normal(keys[0], (n_tokens, width))
  head = 2.0 * jax.random.normal(keys[1], (width, n_vocab))
  targets = jax.random.randint(keys[2], (n_tokens,), 0, n_vocab_used)
  return hidden, head, targets


def numpy_logprobs(hidden, head, targets, n_vocab_used, temperature):
  """Definition in float64, every logit written out."""
  hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
  logits = hidden @ head[:, :n_vocab_used] / temperature
  p = np.exp(logits - logits.max(axis=1, keepdims=True))
  p /= p.sum(axis=1, keepdims=True)
  logprobs = np.log(p[np.arange(len(p)), np.asarray(targets)])
  return logprobs, -(p * np.log(p)).sum(axis=1), p


@pytest.mark.parametrize("chunk", [0, 1, 3, 5, 10, 11, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropy_match_float64(chunk, temperature):
  hidden, head, targets = logprob_case(0)
  logprobs, entropy = losses.token_logprobs(
    hidden, head, targets, n_vocab_used=10, temperature=temperature, chunk=chunk
  )
  expected, expected_entropy, _ = numpy_logprobs(
    hidden, head, targets, 10, temperature
  )
  np.testing.assert_allclose(logprobs, expected, atol=2e-5)
  np.testing.assert_allclose(entropy, expected_entropy, atol=2e-5)


@pytest.mark.parametrize("chunk", [0, 3, 5])
def test_gradients_match_float64(chunk):
  """d logprob / d logits = onehot - p; d entropy / d logits = -p(log p + H)."""
  hidden, head, targets = logprob_case(1)
  weights = jnp.linspace(-1.0, 2.0, 7)

  def total(hidden, head):
    logprobs, entropy = losses.token_logprobs(
      hidden, head, targets, n_vocab_used=10, temperature=0.7, chunk=chunk
    )
    return (weights * logprobs).sum() + 0.3 * (weights * entropy).sum()

  d_hidden, d_head = jax.grad(total, argnums=(0, 1))(hidden, head)
  _, entropy, p = numpy_logprobs(hidden, head, targets, 10, 0.7)
  one_hot = np.eye(10)[np.asarray(targets)]
  d_entropy = -p * (np.log(p) + entropy[:, None])
  d_logits = np.asarray(weights)[:, None] * (one_hot - p + 0.3 * d_entropy)
  d_logits /= 0.7
  used = np.asarray(head, np.float64)[:, :10]
  np.testing.assert_allclose(d_hidden, d_logits @ used.T, atol=3e-5)
  expected = np.asarray(hidden, np.float64).T @ d_logits
  np.testing.assert_allclose(d_head[:, :10], expected, atol=3e-5)
  np.testing.assert_array_equal(d_head[:, 10:], 0.0)


@settings(max_examples=15)
@given(st.integers(1, 12), st.floats(-300.0, 300.0), st.integers(0, 99))
def test_chunks_change_nothing_at_any_size_of_logits(chunk, scale, seed):
  hidden, head, targets = logprob_case(seed)
  hidden = hidden * scale
  whole, pieces = (
    losses.token_logprobs(
      hidden, head, targets, n_vocab_used=10, temperature=1.0, chunk=c
    )
    for c in (0, chunk)
  )
  for a, b in zip(whole, pieces, strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_no_array_of_tokens_by_vocabulary_is_made():
  hidden, head, targets = logprob_case(2, n_tokens=6, n_vocab=32)

  def total(hidden, head):
    return losses.token_logprobs(
      hidden, head, targets, n_vocab_used=32, temperature=1.0, chunk=8
    )[0].sum()

  grad = fast_jit(jax.grad(total, argnums=(0, 1)))
  text = grad.lower(hidden, head).compile().as_text()
  assert "f32[6,8]" in text
  assert "f32[6,32]" not in text


def test_ids_out_of_use_have_no_probability():
  hidden, head, _ = logprob_case(3)
  head = head.at[:, 10].set(1e4)  # would win by far
  targets = jnp.arange(7, dtype=jnp.int32) % 3 + 8  # 8, 9, 10
  for chunk in (0, 4):
    logprobs, _ = losses.token_logprobs(
      hidden, head, targets, n_vocab_used=10, temperature=1.0, chunk=chunk
    )
    np.testing.assert_array_equal(np.isneginf(logprobs), targets == 10)
  greedy = losses.is_greedy(
    hidden,
    head,
    jnp.argmax(hidden @ head[:, :10], axis=1),
    n_vocab_used=10,
    chunk=3,
  )
  assert greedy.all()
  assert not losses.is_greedy(
    hidden,
    head,
    jnp.argmin(hidden @ head[:, :10], axis=1),
    n_vocab_used=10,
    chunk=3,
  ).any()


def test_bfloat16_keeps_its_softmax_in_float32():
  hidden, head, targets = logprob_case(4)
  logprobs, entropy = losses.token_logprobs(
    hidden.astype(jnp.bfloat16),
    head,
    targets,
    n_vocab_used=10,
    temperature=1.0,
    chunk=3,
  )
  assert logprobs.dtype == entropy.dtype == jnp.float32
  rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head)]
  expected, _, _ = numpy_logprobs(*rounded, targets, 10, 1.0)
  np.testing.assert_allclose(logprobs, expected, atol=1e-4)
  grads = jax.grad(
    lambda h, w: losses.token_logprobs(
      h, w, targets, n_vocab_used=10, temperature=1.0, chunk=3
    )[0].sum(),
    argnums=(0, 1),
  )(hidden.astype(jnp.bfloat16), head)
  assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


def test_float32_products_stay_float32_on_accelerators():
  hidden, head, targets = logprob_case(5)

  def total(hidden):
    return losses.token_logprobs(
      hidden, head, targets, n_vocab_used=10, temperature=1.0, chunk=0
    )[0].sum()

  text = str(jax.make_jaxpr(jax.grad(total))(hidden))
  assert text.count("dot_general") == text.count("Precision.HIGHEST") / 2 == 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(temperature=0.0), "temperature=0.0 must be above 0"),
    (dict(n_vocab_used=12), "n_vocab_used=12 does not fit a head of 11"),
    (dict(chunk=-1), "chunk=-1 is negative"),
  ],
)
def test_impossible_settings_are_refused(changes, message):
  settings = dict(n_vocab_used=10, temperature=1.0, chunk=0)
  with pytest.raises(ValueError, match=message):
    losses.token_logprobs(*logprob_case(0), **{**settings, **changes})


def packed_batch():
  """Two rows: two documents and padding; one document."""
  segment_ids = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8], np.int32)
  positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0], list(range(8))], np.int32)
  loss_mask = segment_ids > 0
  loss_mask[1, :5] = False  # a prompt of five tokens
  tokens = np.arange(16, dtype=np.int32).reshape(2, 8) % 21
  return dict(
    tokens=tokens,
    positions=positions,
    segment_ids=segment_ids,
    loss_mask=loss_mask,
  )


def test_targets_stay_in_their_segment():
  targets, mask = losses.shift_targets(packed_batch(), 1)
  np.testing.assert_array_equal(targets[0], [1, 2, 3, 4, 5, 6, 7, 0])
  np.testing.assert_array_equal(mask[0], [1, 1, 0, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(mask[1], [0, 0, 0, 0, 1, 1, 1, 0])
  targets, mask = losses.shift_targets(packed_batch(), 2)
  np.testing.assert_array_equal(mask[0], [1, 0, 0, 1, 1, 0, 0, 0])
  np.testing.assert_array_equal(mask[1], [0, 0, 0, 1, 1, 1, 0, 0])
  assert not losses.shift_targets(packed_batch(), 9)[1].any()


def test_weights_sum_to_one_over_the_whole_batch():
  batch = losses.global_weights(packed_batch(), mtp_depth=3)
  counts = (batch["next_token_weights"] > 0).sum()
  assert counts == 8
  np.testing.assert_allclose(batch["next_token_weights"].sum(), 1.0, rtol=1e-6)
  assert batch["mtp_weights"].shape == (2, 3, 8)
  np.testing.assert_allclose(
    batch["mtp_weights"].sum(axis=(0, 2)), 1.0, rtol=1e-6
  )
  np.testing.assert_array_equal(batch["row_weights"], [0.5, 0.5])
  empty = {k: np.zeros_like(v) for k, v in packed_batch().items()}
  weights = losses.global_weights(empty, mtp_depth=1)
  assert not weights["next_token_weights"].any()
  assert not weights["mtp_weights"].any()
  assert not weights["row_weights"].any()


def weighted(batch, depth=1, mtp_weight=0.3):
  batch = losses.global_weights(batch, mtp_depth=depth)
  return {**batch, "mtp_weight": np.float32(mtp_weight)}


def test_the_loss_is_its_definition():
  """Means taken one token at a time, from the model's own states."""
  depth = 2
  model, variables = tiny_model(num_nextn_predict_layers=depth)
  batch = packed_batch()
  rows = (batch["tokens"], batch["positions"], batch["segment_ids"])
  loss_fn = losses.make_pretrain_loss(model, train_mtp=True, balance_weight=0.1)
  loss, aux = fast_jit(loss_fn)(
    variables, weighted(batch, depth=depth), jax.random.key(0)
  )

  apply = fast_jit(model.apply, static_argnames="method")
  hidden, routing = apply(variables, *rows)
  states, mtp_routing = apply(variables, hidden, *rows, method="mtp")
  head = np.asarray(head_kernel(variables, model.cfg), np.float64)[:, :21]

  def cross_entropy(states, offset):
    """Mean over positions whose target exists, is counted, and is near."""
    terms = []
    for b in range(2):
      for t in range(8 - offset):
        same = batch["segment_ids"][b, t] == batch["segment_ids"][b, t + offset]
        if same and batch["loss_mask"][b, t + offset]:
          logits = np.asarray(states[b, t], np.float64) @ head
          logits -= logits.max()
          target = batch["tokens"][b, t + offset]
          terms.append(np.log(np.exp(logits).sum()) - logits[target])
    return np.mean(terms)

  next_token = cross_entropy(hidden, 1)
  mtp = np.mean([cross_entropy(states[k], 2 + k) for k in range(depth)])
  balance = np.asarray(routing.balance_loss, np.float64).mean(axis=1).sum()
  balance += np.asarray(mtp_routing.balance_loss).mean(axis=1).sum()
  np.testing.assert_allclose(aux.metrics["loss/next_token"], next_token, 1e-5)
  np.testing.assert_allclose(aux.metrics["loss/mtp"], mtp, 1e-5)
  np.testing.assert_allclose(aux.metrics["loss/balance"], balance, 1e-5)
  np.testing.assert_allclose(
    loss, next_token + 0.3 * mtp + 0.1 * balance, rtol=1e-5
  )
  assert aux.metrics["tokens"] == 15
  np.testing.assert_array_equal(aux.expert_load.sum(axis=1), 15 * 2)
  # Positions whose input, 1 or 2 tokens on, is of their document.
  segments = batch["segment_ids"]
  inside = [
    ((segments[:, n:] == segments[:, :-n]) & (segments[:, n:] > 0)).sum()
    for n in (1, 2)
  ]
  np.testing.assert_array_equal(
    aux.mtp_expert_load.sum(axis=1), np.multiply(inside, 2)
  )


def test_nothing_is_learned_from_masked_or_foreign_tokens():
  """Changing a token outside the loss and its context leaves the loss."""
  model, variables = tiny_model()
  loss_fn = fast_jit(
    losses.make_pretrain_loss(model, train_mtp=True, balance_weight=0.0)
  )
  batch = weighted(packed_batch())
  loss, _ = loss_fn(variables, batch, jax.random.key(0))

  def changed(row, column):
    tokens = packed_batch()["tokens"]
    tokens[row, column] = 20
    return loss_fn(variables, {**batch, "tokens": tokens}, jax.random.key(0))[0]

  assert changed(0, 7) == loss  # padding
  assert changed(0, 1) != loss
  # The first token of a document is nobody's target, but is context.
  assert changed(0, 3) != loss


def test_one_program_serves_every_mtp_weight():
  model, variables = tiny_model()
  loss_fn = fast_jit(
    losses.make_pretrain_loss(model, train_mtp=True, balance_weight=0.0)
  )
  totals = []
  for weight in (0.0, 0.1, 0.3):
    batch = weighted(packed_batch(), mtp_weight=weight)
    loss, aux = loss_fn(variables, batch, jax.random.key(0))
    totals.append(loss - weight * aux.metrics["loss/mtp"])
  np.testing.assert_allclose(totals, totals[0], rtol=1e-6)
  assert aux.metrics["loss/mtp"] > 1
  assert loss_fn._cache_size() == 1


def test_without_mtp_its_modules_get_no_gradient():
  model, variables = tiny_model()
  loss_fn = losses.make_pretrain_loss(
    model, train_mtp=False, balance_weight=0.1
  )
  batch = losses.global_weights(packed_batch(), mtp_depth=1)
  grads, aux = fast_jit(jax.grad(loss_fn, has_aux=True))(
    variables, batch, jax.random.key(0)
  )
  assert aux.mtp_expert_load is None
  assert aux.metrics["loss/mtp"] == 0
  mtp, rest = grads["params"].pop("mtp_modules"), grads["params"]
  assert not any(g.any() for g in jax.tree.leaves(mtp))
  assert all(g.any() for g in jax.tree.leaves(rest))


def test_a_dense_model_has_no_balance():
  model, variables = tiny_model(first_k_dense_replace=2)
  loss_fn = losses.make_pretrain_loss(model, train_mtp=True, balance_weight=0.1)
  batch = weighted(packed_batch())
  _, aux = fast_jit(loss_fn)(variables, batch, jax.random.key(0))
  assert aux.metrics["loss/balance"] == 0
  assert aux.metrics["loss/mtp"] > 0
  assert aux.expert_load.shape[0] == 0


def test_mtp_weight_needs_mtp_modules():
  model = Transformer(tiny_config(num_nextn_predict_layers=0))
  with pytest.raises(ValueError, match="num_nextn_predict_layers is 0"):
    losses.make_pretrain_loss(model, train_mtp=True, balance_weight=0.1)
