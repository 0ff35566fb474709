"""The sampler on a real model: what it draws, reports, and refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlm import losses
from rlm.models.transformer import Transformer, head_kernel
from rlm.sampling.sampler import bucket_length
from rlm.train import init_state, make_train_step, split_microbatches
from tests.sampling.tiny_sampler import (
  EOS,
  PAD,
  assert_same,
  make_sampler,
  requests,
  sharp_variables,
  take,
)
from tests.tiny_model import mesh_of, tiny_config, tiny_model


def pack(prompts, completions):
  """Left-aligned prompt + completion, and its segment ids."""
  total = completions.prompt_lengths + completions.lengths
  shape = (len(prompts), completions.expert_ids.shape[2])
  tokens = np.full(shape, PAD, np.int32)
  for row, prompt in enumerate(prompts):
    new = completions.tokens[row, : completions.lengths[row]]
    tokens[row, : total[row]] = [*prompt, *new]
  segment_ids = (np.arange(shape[1])[None] < total[:, None]).astype(np.int32)
  return tokens, segment_ids


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def trainer_pass(
  model, variables, tokens, segment_ids, expert_ids, temperature
):
  """Log-probs [B, T] of each token given those before it, logits, routes."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  hidden, routing = model.apply(
    variables, tokens, positions, segment_ids, expert_ids
  )
  head = head_kernel(variables, model.cfg)
  logprobs, _ = losses.token_logprobs(
    hidden[:, :-1].reshape(-1, hidden.shape[-1]),
    head,
    tokens[:, 1:].reshape(-1),
    n_vocab_used=model.cfg.n_vocab_used,
    temperature=temperature,
    chunk=0,
  )
  logprobs = logprobs.reshape(tokens.shape[0], -1)
  logits = (hidden @ head)[..., : model.cfg.n_vocab_used]
  return jnp.pad(logprobs, [(0, 0), (1, 0)]), logits, routing.expert_ids


def completion_part(completions, values):
  """[B, T] of the packed rows -> [B, max_new_tokens], 0 after the end."""
  out = np.zeros(completions.tokens.shape, np.float32)
  for row, start in enumerate(completions.prompt_lengths):
    n = completions.lengths[row]
    out[row, :n] = values[row, start : start + n]
  return out


def trained(variables):
  """A few training steps on random rows, with the update of the bias."""
  model = tiny_model()[0]
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, EOS, (8, 16), dtype=np.int32)
  positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
  batch = losses.global_weights(
    {
      "tokens": tokens,
      "positions": positions,
      "segment_ids": np.ones_like(tokens),
      "loss_mask": np.ones(tokens.shape, bool),
    },
    mtp_depth=model.cfg.num_nextn_predict_layers,
  )
  batch = split_microbatches(batch, microbatch_rows=8, num_microbatches=1)
  batch["learning_rate"] = np.float32(0.3)
  batch["bias_update_rate"] = np.float32(0.05)
  tx = optax.sgd(1.0)
  step = jax.jit(
    make_train_step(
      losses.make_pretrain_loss(model, train_mtp=False, balance_weight=1e-4),
      tx,
      num_microbatches=1,
      ema_decay=None,
      skip_nonfinite=False,
    )
  )
  router = jax.tree.map(jnp.zeros_like, variables["router"])
  state = init_state({**variables, "router": router}, tx, ema_decay=None)
  for _ in range(5):  # an odd number of signs never sums to zero
    state, _ = step(state, batch, jax.random.key(0))
  bias = state.variables["router"]["moe_layers"]["ffn"]["expert_bias"]
  assert np.abs(bias).max() > 0.04
  return state.variables


@pytest.mark.parametrize("weights", ["random", "trained"])
def test_logprobs_are_the_trainers(weights):
  model, variables = tiny_model()[0], sharp_variables()
  if weights == "trained":
    variables = trained(variables)
  prompts, keys = requests(16, longest=32)
  completions = make_sampler().generate(variables, prompts, keys)
  tokens, segment_ids = pack(prompts, completions)
  logprobs, logits, routes = trainer_pass(
    model, variables, tokens, segment_ids, completions.expert_ids, 0.7
  )
  assert np.std(np.asarray(logits)[segment_ids > 0]) > 1
  expected = completion_part(completions, np.asarray(logprobs))
  np.testing.assert_allclose(completions.logprobs, expected, atol=1e-4)
  assert np.abs(expected).max() > 1
  np.testing.assert_array_equal(routes, completions.expert_ids)  # replayed


def test_routes_are_those_that_the_trainer_would_choose():
  # On these weights no two experts are nearly tied, so nothing flips.
  model, variables = tiny_model()[0], sharp_variables()
  prompts, keys = requests(16)
  completions = make_sampler().generate(variables, prompts, keys)
  tokens, segment_ids = pack(prompts, completions)
  _, _, chosen = trainer_pass(model, variables, tokens, segment_ids, None, 0.7)
  # Every token of prompt and completion, the last one too.
  real = segment_ids > 0
  np.testing.assert_array_equal(
    np.sort(completions.expert_ids[:, real]), np.sort(chosen[:, real])
  )
  padding = completions.expert_ids[:, ~real]
  assert padding.size
  np.testing.assert_array_equal(padding, np.broadcast_to([0, 1], padding.shape))


def test_routes_of_padding_change_nothing():
  model, variables = tiny_model()[0], sharp_variables()
  prompts, keys = requests(16)
  completions = make_sampler().generate(variables, prompts, keys)
  tokens, segment_ids = pack(prompts, completions)
  other = completions.expert_ids.copy()
  other[:, segment_ids == 0] = [3, 2]
  run = functools.partial(trainer_pass, model, variables, tokens, segment_ids)
  real = segment_ids > 0
  a, b = run(completions.expert_ids, 0.7)[1], run(other, 0.7)[1]
  np.testing.assert_array_equal(np.asarray(a)[real], np.asarray(b)[real])


def test_greedy_takes_the_argmax_of_the_full_forward_pass():
  model, variables = tiny_model()[0], sharp_variables()
  sampler = make_sampler(
    slots=4, prompt_length=9, temperature=0.0, max_new_tokens=32
  )
  prompts, keys = requests(4)
  # No end token, so that all 32 tokens are compared.
  variables = {**variables, "params": dict(variables["params"])}
  variables["params"]["head"] = variables["params"]["head"].at[:, EOS].set(0.0)
  completions = sampler.generate(variables, prompts, keys)
  tokens, segment_ids = pack(prompts, completions)
  _, logits, _ = trainer_pass(
    model, variables, tokens, segment_ids, completions.expert_ids, 1.0
  )
  best = np.asarray(logits).argmax(axis=-1)
  for row, start in enumerate(completions.prompt_lengths):
    n = completions.lengths[row]
    assert n == 32
    np.testing.assert_array_equal(
      completions.tokens[row, :n], best[row, start - 1 : start + n - 1]
    )
  np.testing.assert_array_equal(completions.logprobs, 0)


# Neighbours, slots and queue -------------------------------------------------


def test_neighbours_do_not_change_a_row():
  sampler, variables = make_sampler(), sharp_variables()
  prompts, keys = requests(16)
  whole = sampler.generate(variables, prompts, keys)
  others, other_keys = requests(16, seed=7, longest=32)
  for row in (0, 5, 15):
    mixed = list(others)
    mixed[row] = prompts[row]
    mixed_keys = other_keys.at[row].set(keys[row])
    got = sampler.generate(variables, mixed, mixed_keys)
    assert (whole.tokens != got.tokens).any()
    assert_same(take(got, [row]), take(whole, [row]))
    alone = sampler.generate(variables, [prompts[row]], keys[row : row + 1])
    assert_same(take(alone, [0]), take(whole, [row]))


def test_slots_can_be_permuted():
  sampler, variables = make_sampler(), sharp_variables()
  prompts, keys = requests(16, longest=32)
  whole = sampler.generate(variables, prompts, keys)
  for count in (16, 9):
    order = np.random.default_rng(count).permutation(16)[:count]
    got = sampler.generate(variables, [prompts[i] for i in order], keys[order])
    assert_same(take(got, np.arange(count)), take(whole, order))


@pytest.mark.parametrize("count", [5, 23])
def test_refilled_slots_give_what_fresh_ones_give(count):
  variables = sharp_variables()
  sampler = make_sampler(slots=5, prompt_length=9, steps_per_call=3)
  prompts, keys = requests(count)
  prompts[3] = prompts[1]  # shares its prefill
  queued = sampler.generate(variables, prompts, keys)
  assert len(set(queued.lengths.tolist())) > 2  # slots free at various times
  for row in range(count):
    fresh = sampler.generate(variables, [prompts[row]], keys[row : row + 1])
    assert_same(take(queued, [row]), take(fresh, [0]))
  assert (queued.tokens[3] != queued.tokens[1]).any()


def test_other_shapes_draw_the_same_tokens():
  variables = sharp_variables()
  prompts, keys = requests(20)
  a = make_sampler().generate(variables, prompts, keys)
  other = make_sampler(slots=5, prompt_length=9, steps_per_call=3)
  b = other.generate(variables, prompts, keys)
  for name in ("tokens", "lengths", "finished"):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
  np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_equal_requests_are_equal_and_equal_prompts_are_not():
  sampler, variables = make_sampler(), sharp_variables()
  keys = jax.random.split(jax.random.key(3), 2)
  got = sampler.generate(variables, [[1, 2]] * 3, keys[np.array([0, 1, 0])])
  np.testing.assert_array_equal(got.tokens[0], got.tokens[2])
  assert (got.tokens[0] != got.tokens[1]).any()


def test_keys_are_taken_typed_or_as_data():
  sampler, variables = make_sampler(), sharp_variables()
  prompts, keys = requests(3)
  typed = sampler.generate(variables, prompts, keys)
  data = sampler.generate(variables, prompts, jax.random.key_data(keys))
  assert_same(take(typed, np.arange(3)), take(data, np.arange(3)))


def test_a_stream_gives_the_tokens_of_generate():
  variables = sharp_variables()
  prompts, keys = requests(1, seed=1)
  sampler = make_sampler(slots=5, prompt_length=9, steps_per_call=3)
  parts = list(sampler.stream(variables, prompts[0], keys[0]))
  whole = sampler.generate(variables, prompts, keys)
  assert whole.lengths[0] > 3
  assert [len(part) for part in parts[:-1]] == [3] * (len(parts) - 1)
  assert np.concatenate(parts).tolist() == (
    whole.tokens[0, : whole.lengths[0]].tolist()
  )


# The distribution ------------------------------------------------------------


@pytest.mark.parametrize(
  "changes", [{}, dict(temperature=1.2, top_k=9, top_p=0.8)]
)
def test_tokens_follow_the_models_distribution(changes):
  n, prompt = 1024, [3, 1, 4]
  model, variables = tiny_model()
  sampler = make_sampler(**changes)
  sampling = sampler.sampling
  keys = jax.random.split(jax.random.key(5), n)
  got = sampler.generate(variables, [prompt] * n, keys)
  tokens = np.full((16, sampler.capacity), PAD, np.int32)
  tokens[0, :3] = prompt
  _, logits, _ = trainer_pass(
    model, variables, tokens, (tokens != PAD).astype(np.int32), None, 0.7
  )
  scaled = np.asarray(logits[0, 2], np.float64) / sampling.temperature
  probs = np.exp(scaled - scaled.max())
  probs /= probs.sum()
  order = np.argsort(-probs)
  if sampling.top_k:
    probs[order[sampling.top_k :]] = 0
    probs /= probs.sum()
  if sampling.top_p < 1:
    count = 1 + np.sum(np.cumsum(probs[order]) < sampling.top_p)
    assert count < sampling.top_k  # both filters matter
    probs[order[count:]] = 0
    probs /= probs.sum()
  kept = probs > 0
  drawn = got.tokens[:, 0]
  counts = np.bincount(drawn, minlength=len(probs))
  assert counts[~kept].sum() == 0
  expected = probs[kept] * n
  statistic = np.sum((counts[kept] - expected) ** 2 / expected)
  degrees = kept.sum() - 1
  # Mean and spread of chi-square; 4 sigma with a fixed key.
  assert statistic < degrees + 4 * np.sqrt(2 * degrees)
  uniform = np.sum((counts[kept] - n / kept.sum()) ** 2) / (n / kept.sum())
  assert uniform > degrees + 4 * np.sqrt(2 * degrees)  # and it can fail
  np.testing.assert_allclose(
    got.logprobs[:, 0], np.log(probs[drawn]), atol=1e-4
  )


def test_ids_not_in_use_are_never_drawn():
  variables = {**sharp_variables()}
  params = dict(variables["params"])
  # Ids 21 to 23 exist in the head alone, and would win every draw.
  params["head"] = params["head"].at[:, 21:].set(50.0)
  variables["params"] = params
  prompts, keys = requests(8)
  got = make_sampler().generate(variables, prompts, keys)
  assert got.tokens.max() < 21
  assert np.isfinite(got.logprobs).all()


@pytest.mark.parametrize(
  "changes",
  [
    dict(first_k_dense_replace=2, tie_word_embeddings=True),
    pytest.param(
      dict(first_k_dense_replace=0, q_lora_rank=None, unroll_layers=True),
      marks=pytest.mark.full,
    ),
  ],
)
def test_other_models(changes):
  model, variables = tiny_model(**changes)
  sampler = make_sampler(model=model, slots=4, prompt_length=9, temperature=1.0)
  prompts, keys = requests(4)
  completions = sampler.generate(variables, prompts, keys)
  tokens, segment_ids = pack(prompts, completions)
  logprobs, _, _ = trainer_pass(
    model, variables, tokens, segment_ids, completions.expert_ids, 1.0
  )
  expected = completion_part(completions, np.asarray(logprobs))
  np.testing.assert_allclose(completions.logprobs, expected, atol=1e-4)
  assert completions.expert_ids.shape[0] == model.cfg.num_moe_layers


# What is refused -------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      dict(prompt_length=60),
      "need 70 positions; the model has max_position_embeddings=64",
    ),
    (dict(slots=0), "slots=0 and prompt_length=32 must both be at least 1"),
    (
      dict(mesh=mesh_of(data=3)),
      "slots=16 cannot be divided among the 3 parts of sampling_mesh .data=3 x"
      " fsdp=1 x expert=1.. Make slots a multiple",
    ),
    (
      dict(mesh=mesh_of(data=16)),
      "sampling_mesh needs data=16 x .* = 16 devices, but jax has 8",
    ),
    (
      dict(mesh=mesh_of(context=2)),
      "sampling_mesh.context=2: decoding adds one token to a row",
    ),
    (
      dict(mesh=mesh_of(tensor=3)),
      "sampling_mesh.tensor=3 does not divide num_attention_heads=2. Make it"
      " one of 1, 2",
    ),
    (dict(steps_per_call=0), "steps_per_call=0 must be at least 1"),
    (dict(stop_tokens=(21,)), "stop token 21 is not an id in use"),
  ],
)
def test_a_sampler_that_cannot_work_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    make_sampler(**changes)


def test_a_prompt_length_that_the_attention_cannot_cut_is_refused():
  model = Transformer(tiny_config(attention_chunk=8))
  with pytest.raises(ValueError, match="attention_chunk=8 does not divide"):
    make_sampler(model=model, prompt_length=12)
  for prompt_length in (6, 16):
    make_sampler(model=model, prompt_length=prompt_length)


@pytest.mark.parametrize(
  ("prompts", "message"),
  [
    ([], "no prompts"),
    ([[1], []], "prompt 1 is empty"),
    ([[1], [2] * 33], "prompt 1 has 33 tokens, more than .*prompt_length=32"),
    ([[1, 21]], r"prompt 0 holds an id outside 0\.\.20"),
    ([[-1]], r"prompt 0 holds an id outside 0\.\.20"),
  ],
)
def test_bad_prompts_are_refused_before_compiling(prompts, message):
  sampler = make_sampler(slots=2)
  keys = jax.random.split(jax.random.key(0), len(prompts) or 1)
  compiled = sampler.programs.prefill._cache_size()
  with pytest.raises(ValueError, match=message):
    sampler.generate(sharp_variables(), prompts, keys)
  assert sampler.programs.prefill._cache_size() == compiled


@pytest.mark.parametrize(
  "sampler",
  [
    dict(slots=5, prompt_length=9, steps_per_call=3),
    dict(slots=4, prompt_length=9, temperature=0.0, max_new_tokens=32),
  ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(sampler, value):
  variables = {**sharp_variables()}
  params = dict(variables["params"])
  params["head"] = params["head"].at[3, 5].set(value)
  variables["params"] = params
  with pytest.raises(ValueError, match="logits are not finite"):
    make_sampler(**sampler).generate(variables, *requests(2))


def test_one_key_per_prompt():
  sampler, keys = make_sampler(slots=2), jax.random.split(jax.random.key(0), 3)
  with pytest.raises(ValueError, match="2 prompts need one key each"):
    sampler.generate(sharp_variables(), [[1], [2]], keys)


def test_bucket_length_rounds_up():
  assert [bucket_length(n) for n in (1, 32, 33)] == [32, 32, 64]
  assert bucket_length(33, multiple=8) == 40
