"""Batched generation: fixed slots, filled from a queue of requests.

  sampler = Sampler(
    model, sampling, slots=64, prompt_length=32, mesh=replicas(1),
    eos_token=eos, pad_token=pad
  )
  completions = sampler.generate(variables, prompts, keys)

A request is a prompt and a key. Its tokens depend on these and the weights,
not on who shares the batch, nor on the slot or the moment it was given: at one
slot shape they are bit-equal, and across shapes the random numbers are the same
and the log-probs differ by rounding alone.

With no more requests than slots there is one prefill and one device loop to the
end of the longest row. With more, the loop returns as soon as enough rows have
ended, and the queue takes their slots. Equal prompts are prefilled once.

The slots may be divided among devices; see programs.py.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm.models.cache import room_for
from rlm.models.layout import make_layout
from rlm.models.transformer import Transformer
from rlm.parallel.config import MeshConfig
from rlm.sampling.config import SamplingConfig
from rlm.sampling.programs import make_programs


@dataclasses.dataclass(frozen=True)
class Completions:
  """What N requests gave, in their order; numpy.

  Attributes:
    tokens: int32 [N, max_new_tokens]; pad_token after the end.
    lengths: int32 [N], end token included.
    finished: bool [N], ended by a stop token; False = cut at max_new_tokens.
    logprobs: float32 [N, max_new_tokens], of each token under the distribution
      that it was drawn from (temperature, top-k and top-p applied; 0 when
      greedy, which leaves no choice); 0 after the end.
    expert_ids: int32 [L_moe, N, prompt_length + max_new_tokens, K], the routes
      of the left-aligned sequence prompt + completion. Each of its tokens, the
      last one too, went through the model. Padding after it has the experts
      0..K-1: in range, so that a replay can gather them, and of no effect,
      since padding belongs to no segment.
    prompt_lengths: int32 [N].
  """

  tokens: np.ndarray
  lengths: np.ndarray
  finished: np.ndarray
  logprobs: np.ndarray
  expert_ids: np.ndarray
  prompt_lengths: np.ndarray


def request_keys(key: jax.Array, num_requests: int) -> jax.Array:
  """The key of request i is fold_in(key, i), whatever slot it runs in.

  Args:
    key: of the step, or of the evaluation.
    num_requests: N.

  Returns:
    Typed keys [N].
  """
  ids = np.arange(num_requests, dtype=np.int32)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


class Sampler:
  """Compiles its programs on first use and reuses them for all weights.

  Args:
    model: the Transformer.
    sampling: how to draw.
    slots: B, rows decoded together.
    prompt_length: P, room for prompts; each value is a compilation of its own,
      so round it up (`bucket_length`).
    mesh: the devices that share the slots, `row_shards` of which divide them.
    eos_token: id that ends a completion.
    pad_token: id that fills rows after their end.
    steps_per_call: decode steps after which the device returns at the latest;
      None for max_new_tokens. It bounds the buffers of a call and never
      changes what is drawn.

  Raises:
    ValueError: sizes that do not fit the model's context or vocabulary, or a
      mesh that fits neither the model nor the devices.
  """

  def __init__(
    self,
    model: Transformer,
    sampling: SamplingConfig,
    *,
    slots: int,
    prompt_length: int,
    mesh: MeshConfig,
    eos_token: int | None,
    pad_token: int,
    steps_per_call: int | None = None,
  ):
    c = model.cfg
    if slots < 1 or prompt_length < 1:
      raise ValueError(
        f"{slots=} and {prompt_length=} must both be at least 1."
      )
    if slots % mesh.row_shards:
      raise ValueError(
        f"{slots=} cannot be divided among the {mesh.row_shards} parts of"
        f" sampling_mesh (data={mesh.data} x fsdp={mesh.fsdp} x expert="
        f"{mesh.expert}). Make slots a multiple of them."
      )
    mesh.check_decodes("sampling_mesh")
    if steps_per_call is not None and steps_per_call < 1:
      raise ValueError(f"{steps_per_call=} must be at least 1.")
    longest = prompt_length + sampling.max_new_tokens
    self.capacity = room_for(longest)
    if longest > c.max_position_embeddings:
      raise ValueError(
        f"{prompt_length=} and max_new_tokens={sampling.max_new_tokens} need"
        f" {longest} positions; the model has max_position_embeddings="
        f"{c.max_position_embeddings}. Lower one of the first two."
      )
    chunk = c.attention_chunk
    if 0 < chunk < prompt_length and prompt_length % chunk:
      raise ValueError(
        f"attention_chunk={chunk} does not divide {prompt_length=}. Round"
        " prompt_length up to a multiple of it, or set attention_chunk=0."
      )
    eos = () if eos_token is None else (eos_token,)
    self.stop_tokens = (*eos, *sampling.stop_tokens)
    for name, token in [("pad_token", pad_token)] + [
      ("stop token", token) for token in self.stop_tokens
    ]:
      if not 0 <= token < c.n_vocab_used:
        raise ValueError(
          f"{name} {token} is not an id in use: n_vocab_used={c.n_vocab_used}."
        )
    self.model = model
    self.sampling = sampling
    self.slots = slots
    self.prompt_length = prompt_length
    self.pad_token = pad_token
    self.steps_per_call = min(
      steps_per_call or sampling.max_new_tokens, sampling.max_new_tokens
    )
    # One shape whatever the number of prompts, so that a prompt's bits do not
    # depend on how many came with it.
    shards = mesh.row_shards
    self.share = slots // shards  # of one device
    self.prefill_rows = shards * max(min(self.share, 16), self.share // 16)
    self.layout = make_layout(model, mesh, "sampling_mesh")
    self.programs = make_programs(
      self.layout,
      sampling,
      capacity=self.capacity,
      steps_per_call=self.steps_per_call,
      stop_tokens=self.stop_tokens,
      pad_token=pad_token,
    )

  def generate(
    self, variables: Any, prompts: Sequence[Sequence[int]], keys: Any
  ) -> Completions:
    """One completion per request.

    Args:
      variables: the model's variables.
      prompts: N token id sequences; repeat one to draw several completions.
      keys: N keys, typed [N] or uint32 [N, 2]; equal prompt and key give equal
        completions.

    Raises:
      ValueError: a prompt is empty, does not fit or holds an unknown id, or
        there is not one key per prompt; nothing was compiled by then. Or the
        weights give logits that are not finite, which have no distribution.
    """
    prompts = [tuple(int(token) for token in prompt) for prompt in prompts]
    key_data = _key_data(keys)
    self._check(prompts, key_data)
    return _Queue(self, variables, prompts, key_data).run()

  def stream(
    self, variables: Any, prompt: Sequence[int], key: Any
  ) -> Iterator[list[int]]:
    """Yields the tokens of one completion, `steps_per_call` at a time.

    The same tokens as `generate` gives; arguments and errors likewise.
    """
    prompts = [tuple(int(token) for token in prompt)]
    key_data = _key_data(key[None])
    self._check(prompts, key_data)
    queue = _Queue(self, variables, prompts, key_data)
    sent = 0
    while queue.step():
      tokens = queue.tokens[0, sent : queue.lengths[0]].tolist()
      sent += len(tokens)
      yield tokens

  def _check(self, prompts, key_data):
    used = self.model.cfg.n_vocab_used
    if not prompts:
      raise ValueError("no prompts: give at least one.")
    if key_data.shape != (len(prompts), 2):
      raise ValueError(
        f"{len(prompts)} prompts need one key each (typed [N] or uint32"
        f" [N, 2]); the key data has shape {key_data.shape}."
      )
    for i, prompt in enumerate(prompts):
      if not prompt:
        raise ValueError(f"prompt {i} is empty. Begin it with a token.")
      if len(prompt) > self.prompt_length:
        raise ValueError(
          f"prompt {i} has {len(prompt)} tokens, more than the room of"
          f" prompt_length={self.prompt_length}. Shorten it or raise"
          " prompt_length."
        )
      if not 0 <= min(prompt) <= max(prompt) < used:
        raise ValueError(
          f"prompt {i} holds an id outside 0..{used - 1} (n_vocab_used={used})."
          " Was it made by another tokenizer?"
        )


def bucket_length(longest: int, multiple: int = 32) -> int:
  """`longest` rounded up, so that few prompt lengths are ever compiled."""
  return -(-longest // multiple) * multiple


def _key_data(keys) -> np.ndarray:
  if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
    keys = jax.random.key_data(keys)
  return np.asarray(keys, np.uint32)


class _Queue:
  """One `generate`: which request sits in which slot, and what it gave."""

  def __init__(self, sampler: Sampler, variables, prompts, key_data):
    s, c = sampler, sampler.model.cfg
    n, longest = len(prompts), s.sampling.max_new_tokens
    self._sampler = sampler
    self._variables = jax.device_put(variables, s.layout.shardings(variables))
    self._key_data = key_data
    # Request -> row among the distinct prompts, in order of first use.
    self._distinct = list(dict.fromkeys(prompts))
    row_of = {prompt: row for row, prompt in enumerate(self._distinct)}
    self._rows = np.array([row_of[prompt] for prompt in prompts])
    self._waiting = 0  # first request that has no slot yet
    self._slot_request = np.full(s.slots, -1)
    self._block = -1  # of prefill_rows distinct prompts, on the device now
    self._slots = s.programs.start(s.slots)
    self.tokens = np.full((n, longest), s.pad_token, np.int32)
    self.logprobs = np.zeros((n, longest), np.float32)
    self.lengths = np.zeros(n, np.int32)
    self.prompt_lengths = np.array([len(p) for p in prompts], np.int32)
    k = c.num_experts_per_tok
    self.expert_ids = np.empty((c.num_moe_layers, n, s.capacity, k), np.int32)
    self.expert_ids[:] = np.arange(k, dtype=np.int32)

  def run(self) -> Completions:
    while self.step():
      pass
    last = self.tokens[np.arange(len(self.lengths)), self.lengths - 1]
    return Completions(
      tokens=self.tokens,
      lengths=self.lengths,
      finished=np.isin(last, self._sampler.stop_tokens),
      logprobs=self.logprobs,
      expert_ids=self.expert_ids,
      prompt_lengths=self.prompt_lengths,
    )

  def step(self) -> bool:
    """Fills free slots and decodes once; False when all requests are done."""
    self._fill()
    taken = np.flatnonzero(self._slot_request >= 0)
    if not taken.size:
      return False
    s = self._sampler
    # While requests wait, come back when an eighth of the slots are free: a
    # smaller share would prefill too often, a larger one leave slots idle.
    refill = self._waiting < len(self._rows)
    min_live = s.share - max(s.share // 8, 1) + 1 if refill else 1
    self._slots, drawn = s.programs.decode(
      self._variables, self._slots, s.steps_per_call, min_live
    )
    self._collect(taken, drawn)
    return True

  def _fill(self):
    """Gives free slots to waiting requests, block of prompts by block."""
    s = self._sampler
    share = s.share
    free = np.flatnonzero(self._slot_request < 0)
    # One of each device in turn, so that few requests keep all of them busy.
    free = free[np.lexsort((free // share, free % share))]
    while free.size and self._waiting < len(self._rows):
      requests = np.arange(self._waiting, len(self._rows))[: free.size]
      blocks = self._rows[requests] // s.prefill_rows
      block = int(blocks[0])
      # Up to the first request that needs another block.
      count = int(np.argmax(np.append(blocks != block, True)))
      requests, chosen, free = requests[:count], free[:count], free[count:]
      if block != self._block:
        self._prefill_block(block)
      rows = np.full(s.slots, -1, np.int32)
      rows[chosen] = self._rows[requests] % s.prefill_rows
      key_data = np.zeros((s.slots, 2), np.uint32)
      key_data[chosen] = self._key_data[requests]
      self._slots = s.programs.admit(
        self._slots, self._prefilled, rows, key_data
      )
      self._slot_request[chosen] = requests
      self._waiting += count
      for request in requests:
        used = self.prompt_lengths[request]
        row = self._rows[request] % s.prefill_rows
        self.expert_ids[:, request, :used] = self._routes[:, row, :used]

  def _prefill_block(self, block: int):
    s = self._sampler
    first = block * s.prefill_rows
    prompts = self._distinct[first : first + s.prefill_rows]
    tokens = np.full((s.prefill_rows, s.prompt_length), s.pad_token, np.int32)
    lengths = np.zeros(s.prefill_rows, np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, : len(prompt)] = prompt
      lengths[row] = len(prompt)
    self._prefilled = s.programs.prefill(self._variables, tokens, lengths)
    self._routes = np.asarray(self._prefilled.expert_ids)
    self._block = block

  def _collect(self, taken, drawn):
    """Copies a call's results to their requests and frees ended slots."""
    drawn = jax.device_get(drawn)
    if not drawn.finite.all():
      raise ValueError(
        "the model's logits are not finite, so its weights are broken. Sample"
        " from an earlier checkpoint, and look for where training diverged."
      )
    index, live = jax.device_get((self._slots.index, self._slots.live))
    for slot in taken:
      request = self._slot_request[slot]
      old, new = self.lengths[request], index[slot]
      count = new - old
      self.tokens[request, old:new] = drawn.tokens[:count, slot]
      self.logprobs[request, old:new] = drawn.logprobs[:count, slot]
      at = self.prompt_lengths[request] + old
      routes = drawn.expert_ids[:count, :, slot].swapaxes(0, 1)
      self.expert_ids[:, request, at : at + count] = routes
      self.lengths[request] = new
    self._slot_request[taken[~live[taken]]] = -1
