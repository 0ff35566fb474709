"""Ends, padding, truncation and the queue, on a model whose text is known.

`Reckoner` writes by a rule, so plain Python says what any request must give.
Its rule reads the whole cache and its routes spell token and position, so that
a row in the wrong slot, or a route out of line, changes the result.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.models.cache import TokenCache, write_entry
from rlm.parallel.config import replicas
from rlm.parallel.shard import WHOLE
from rlm.sampling import loop
from rlm.sampling.config import SamplingConfig
from rlm.sampling.sampler import Sampler

VOCAB, EOS, STOP, PAD = 11, 0, 7, 10
MAX_NEW, PROMPT = 6, 4


def next_token(total, count):
  """The rule: the sum of the tokens so far and their number give the next."""
  return (12 * total + 9 * count + 1) % 19 % 10


class Reckoner:
  """Stands for the Transformer; its hidden states choose `next_token`."""

  cfg = types.SimpleNamespace(
    num_hidden_layers=1,
    num_moe_layers=1,
    num_experts_per_tok=2,
    hidden_size=VOCAB,
    cache_width=2,
    dtype="float32",
    n_vocab_used=VOCAB,
    tie_word_embeddings=False,
    max_position_embeddings=64,
    attention_chunk=0,
    has_latent_attention=True,
    is_dense=False,
    topk_method="greedy",
    n_routed_experts=2,
    num_attention_heads=1,
  )
  shard = WHOLE

  def clone(self, shard):
    made = Reckoner()
    made.shard = shard
    return made

  def apply(self, variables, tokens, *args, method):
    if method == "prefill":
      return self.prefill(tokens, *args)
    (cache,) = args
    entry = jnp.broadcast_to(tokens, (tokens.shape[0], 2)).astype(jnp.float32)
    layer = write_entry(cache.layers[0], entry, cache.lengths)
    slots = jnp.arange(layer.shape[-1])[None]
    held = jnp.where(slots <= cache.lengths[:, None], layer[:, 0], 0.0)
    count = cache.lengths + 1
    hidden = self.hidden(held.sum(axis=1), count)[:, None]
    routes = jnp.stack([tokens, cache.lengths[:, None]], axis=-1)[None]
    return hidden, TokenCache((layer,), count), routes

  def prefill(self, tokens, positions, segment_ids):
    held = jnp.where(segment_ids > 0, tokens, 0)
    hidden = self.hidden(jnp.cumsum(held, axis=1), positions + 1)
    layer = jnp.broadcast_to(held[:, None], (len(tokens), 2, tokens.shape[1]))
    cache = TokenCache((layer.astype(jnp.float32),), segment_ids.sum(axis=1))
    return hidden, cache, jnp.stack([tokens, positions], axis=-1)[None]

  def hidden(self, total, count):
    best = next_token(total.astype(jnp.int32), count)
    return jax.nn.one_hot(best, VOCAB, dtype=jnp.float32)


VARIABLES = {"params": {"head": 100 * jnp.eye(VOCAB)}}


@functools.cache
def make_sampler(slots, steps_per_call=None, temperature=1.0, devices=1):
  return Sampler(
    Reckoner(),
    SamplingConfig(
      temperature=temperature,
      top_k=0,
      top_p=1.0,
      max_new_tokens=MAX_NEW,
      stop_tokens=(STOP,),
    ),
    slots=slots,
    prompt_length=PROMPT,
    mesh=replicas(devices),
    eos_token=EOS,
    pad_token=PAD,
    steps_per_call=steps_per_call,
  )


def reckon(prompt):
  """(completion, whether it ended) as the rule says."""
  sequence = list(prompt)
  while len(sequence) < len(prompt) + MAX_NEW:
    sequence.append(next_token(sum(sequence), len(sequence)))
    if sequence[-1] in (EOS, STOP):
      return sequence[len(prompt) :], True
  return sequence[len(prompt) :], False


def generate(sampler, prompts):
  keys = jax.random.split(jax.random.key(0), len(prompts))
  return sampler.generate(VARIABLES, prompts, keys)


def assert_reckoned(completions, prompts):
  for row, prompt in enumerate(prompts):
    expected, finished = reckon(prompt)
    n = len(expected)
    tokens = completions.tokens[row].tolist()
    assert tokens == expected + [PAD] * (MAX_NEW - n)
    assert completions.lengths[row] == n
    assert completions.finished[row] == finished
    assert completions.prompt_lengths[row] == len(prompt)
    np.testing.assert_allclose(completions.logprobs[row], 0, atol=1e-6)
    sequence = [*prompt, *expected]
    routes = [[token, i] for i, token in enumerate(sequence)]
    routes += [[0, 1]] * (PROMPT + MAX_NEW - len(sequence))
    assert completions.expert_ids[0, row].tolist() == routes


# How completions end: by the end token at once, later, or as the last token
# that fits (which is not cut), by a stop token, or not at all.
CASES = {
  "ends at once": lambda c, ended: c == [EOS],
  "ends later": lambda c, ended: c[-1] == EOS and len(c) == 3,
  "stops": lambda c, ended: c[-1] == STOP and len(c) == 2,
  "ends on its last token": lambda c, ended: ended and len(c) == MAX_NEW,
  "is cut": lambda c, ended: not ended,
}


def prompt_that(case):
  """The first prompt of two tokens whose completion is of this kind."""
  pairs = [[a, b] for a in range(10) for b in range(10)]
  return next(p for p in pairs if CASES[case](*reckon(p)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_how_completions_end(temperature):
  prompts = [prompt_that(case) for case in CASES]
  completions = generate(make_sampler(3, temperature=temperature), prompts)
  assert_reckoned(completions, prompts)
  assert completions.lengths.tolist() == [1, 3, 2, MAX_NEW, MAX_NEW]
  assert completions.finished.tolist() == [True, True, True, True, False]


def test_an_end_by_hand():
  # 12 * 1 + 9 * 1 + 1 = 22 -> 3. Then 12 * 4 + 9 * 2 + 1 = 67 -> 10 -> 0.
  completions = generate(make_sampler(3), [[1]])
  assert completions.tokens.tolist() == [[3, EOS, PAD, PAD, PAD, PAD]]
  assert completions.lengths.tolist() == [2]
  assert completions.finished.tolist() == [True]
  routes = [[1, 0], [3, 1], [EOS, 2]] + [[0, 1]] * (PROMPT + MAX_NEW - 3)
  assert completions.expert_ids[0, 0].tolist() == routes


def test_an_end_token_in_the_prompt_ends_nothing():
  prompts = [[EOS, STOP], [STOP], [EOS, EOS, 3]]
  assert_reckoned(generate(make_sampler(3), prompts), prompts)


@pytest.mark.parametrize(
  ("slots", "steps_per_call", "devices"),
  [(3, None, 1), (3, 1, 1), (20, 2, 1), (6, 2, 3)],
)
@settings(max_examples=40)
@given(
  st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=PROMPT),
    min_size=1,
    max_size=45,
  )
)
def test_any_queue_gives_what_each_request_gives(
  slots, steps_per_call, devices, prompts
):
  sampler = make_sampler(slots, steps_per_call, devices=devices)
  assert_reckoned(generate(sampler, prompts), prompts)


def test_a_stream_ends_where_the_completion_does():
  sampler = make_sampler(3, 1)
  for case in CASES:
    prompt = prompt_that(case)
    parts = sampler.stream(VARIABLES, prompt, jax.random.key(0))
    assert [token for part in parts for token in part] == reckon(prompt)[0]


def test_equal_prompts_are_prefilled_once(monkeypatch):
  sampler, calls = make_sampler(3), []
  programs = sampler.programs

  def prefill(variables, tokens, lengths):
    calls.append(tokens)
    return programs.prefill(variables, tokens, lengths)

  monkeypatch.setattr(sampler, "programs", programs._replace(prefill=prefill))
  prompts = [[3, 3]] * 4 + [[4, 1]] * 4
  assert_reckoned(generate(sampler, prompts), prompts)
  assert len(calls) == 1
  assert calls[0][:, :2].tolist() == [[3, 3], [4, 1], [PAD, PAD]]


def test_few_requests_are_spread_over_the_devices(monkeypatch):
  sampler, taken = make_sampler(6, 1, devices=3), []
  programs = sampler.programs

  def admit(slots, prefilled, rows, keys):
    taken.append(rows >= 0)
    return programs.admit(slots, prefilled, rows, keys)

  monkeypatch.setattr(sampler, "programs", programs._replace(admit=admit))
  generate(sampler, [prompt_that("is cut")] * 4)
  # Two slots on each device: all have work before one has more of it.
  assert np.concatenate(taken).tolist() == [True] * 2 + [True, False] * 2


# The device loop -------------------------------------------------------------


def start(*cases):
  """Three slots, one row per case, the rest empty."""
  sampler = make_sampler(3)
  tokens = np.zeros((sampler.prefill_rows, PROMPT), np.int32)
  lengths = np.zeros(sampler.prefill_rows, np.int32)
  for row, case in enumerate(cases):
    tokens[row, :2] = prompt_that(case)
    lengths[row] = 2
  prefilled = sampler.programs.prefill(VARIABLES, tokens, lengths)
  rows = np.array([0, 1, 2], np.int32)
  rows[len(cases) :] = -1
  keys = jax.random.key_data(jax.random.split(jax.random.key(0), 3))
  slots = loop.empty_slots(Reckoner(), 3, sampler.capacity)
  return sampler.programs.admit(slots, prefilled, rows, keys)


def decode(slots, max_steps, min_live):
  return make_sampler(3).programs.decode(VARIABLES, slots, max_steps, min_live)


def test_the_loop_leaves_when_all_rows_have_ended():
  slots, drawn = decode(start("ends at once", "ends later"), MAX_NEW, 1)
  assert drawn.steps == 3
  assert not slots.live.any()
  assert slots.index.tolist() == [1, 3, 0]


def test_the_loop_leaves_at_the_first_end_when_requests_wait():
  slots = start("is cut", "stops", "is cut")
  slots, drawn = decode(slots, MAX_NEW, 3)
  assert drawn.steps == 2
  assert slots.live.tolist() == [True, False, True]


def test_the_loop_leaves_after_its_steps():
  slots, drawn = decode(start("is cut"), 2, 1)
  assert drawn.steps == 2
  assert slots.live.tolist() == [True, False, False]
  slots, rest = decode(slots, MAX_NEW, 1)
  assert rest.steps == MAX_NEW - 2
  tokens = np.concatenate([drawn.tokens[:2, 0], rest.tokens[:4, 0]])
  assert tokens.tolist() == reckon(prompt_that("is cut"))[0]


def test_an_ended_row_keeps_its_length_and_reports_padding():
  slots, drawn = decode(start("ends at once", "is cut"), MAX_NEW, 1)
  assert drawn.tokens[:, 0].tolist() == [EOS] + [PAD] * (MAX_NEW - 1)
  assert drawn.tokens[:, 2].tolist() == [PAD] * MAX_NEW
  np.testing.assert_array_equal(drawn.logprobs[1:, 0], 0)
  assert slots.cache.lengths.tolist() == [3, 2 + MAX_NEW, 0]
  held = slots.cache.layers[0][0, 0, :3]
  np.testing.assert_array_equal(held, [*prompt_that("ends at once"), EOS])
