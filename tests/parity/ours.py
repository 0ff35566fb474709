"""What rlm computes for the cases, under the names of the golden files."""

import dataclasses
import functools
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from rlm.checkpoint.initial import shapes
from rlm.checkpoint.published import PublishedWeights
from rlm.checkpoint.published_names import published_tensors
from rlm.losses import global_weights, make_pretrain_loss
from rlm.models.block import Block
from rlm.models.layers import RMSNorm
from rlm.models.published_config import read_published_config
from rlm.models.rope import rope_rotations
from rlm.models.transformer import Transformer, head_kernel
from rlm.parallel.config import replicas
from rlm.sampling.config import SamplingConfig
from rlm.sampling.sampler import Sampler, request_keys
from tests.models import reference
from tests.parity import cases

_jit = jax.jit


@functools.cache
def _compiler_options() -> dict:
  """Compiling is most of what these tests do: half of fast_jit's time.

  Newer compilers know the second option no more.
  """
  options = {"xla_backend_optimization_level": 0}
  quick = {**options, "xla_cpu_use_fusion_emitters": False}
  try:
    _jit(lambda: 0, compiler_options=quick)()
  except jax.errors.JaxRuntimeError:
    return options
  return quick


def quick_jit(function, **settings):
  """`jax.jit` whose backend spends no time on optimising."""
  return _jit(function, compiler_options=_compiler_options(), **settings)


@dataclasses.dataclass(frozen=True, eq=False)
class Ours:
  """A model loaded as a published folder, and what it computes."""

  model: Transformer
  variables: dict

  @classmethod
  def load(cls, folder: pathlib.Path, dtype: str = "float32") -> "Ours":
    """Through the path that users take."""
    cfg = read_published_config(folder, dtype=dtype, param_dtype=dtype)
    model = Transformer(cfg)
    weights = PublishedWeights(folder, cfg, shapes(model))
    return cls(model, weights.load(shapes(model)))

  def run_batch(self, name: str):
    """As tools/make_golden.py: outputs, and gradients by published name."""
    batch = global_weights(make_batch(name), mtp_depth=0)
    loss, logits, gradients = self._differentiate(self.variables, batch)
    logits = np.where(batch["segment_ids"][..., None] != 0, logits, 0)
    outputs = {"logits": logits, "loss": np.asarray(loss)}
    return outputs, self.published(gradients)

  @functools.cached_property
  def _differentiate(self):
    loss_fn = make_pretrain_loss(
      self.model, train_mtp=False, balance_weight=0.0
    )

    def scalar(params, variables, batch):
      variables = {**variables, "params": params}
      loss, _ = loss_fn(variables, batch, jax.random.key(0))
      return loss, forward(self.model, variables, batch)

    def run(variables, batch):
      grad = jax.value_and_grad(scalar, has_aux=True)
      (loss, logits), gradients = grad(variables["params"], variables, batch)
      return loss, logits, gradients

    return quick_jit(run)

  def published(self, gradients):
    """A tree like `params` -> published name -> array as published."""
    tensors = published_tensors(self.model.cfg, {"params": gradients})
    found = {}
    for path, leaf in jax.tree.leaves_with_path({"params": gradients}):
      leaf = np.asarray(leaf)
      for tensor in tensors[".".join(entry.key for entry in path)]:
        value = leaf[tensor.place]
        found[tensor.name] = value.T if tensor.transposed else value
    return found

  def decode_greedily(self, eos_token: int) -> list[np.ndarray]:
    """The completion of each prompt, through the cache; int32 [n].

    The prompts are one batch, padded to the longer one.

    Args:
      eos_token: ends a completion before its NEW_TOKENS tokens.
    """
    sampling = SamplingConfig(
      temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=cases.NEW_TOKENS
    )
    prompts = cases.make_prompts()
    keys = request_keys(jax.random.key(0), len(prompts))
    with mock.patch.object(jax, "jit", quick_jit):
      sampler = Sampler(
        self.model,
        sampling,
        slots=2,
        prompt_length=max(cases.PROMPT_LENGTHS),
        mesh=replicas(1),
        eos_token=eos_token,
        pad_token=0,
      )
      done = sampler.generate(self.variables, prompts, keys)
    return [
      tokens[:length]
      for tokens, length in zip(done.tokens, done.lengths, strict=True)
    ]

  def run_sublayers(self, golden: dict) -> dict[str, np.ndarray]:
    """Every sublayer on the input that the reference's had.

    Args:
      golden: outputs of the reference's sublayers; see make_golden.py.

    Returns:
      The same names; `<layer>.block` on the layer's input; `<layer>.decode`,
      the attention of the last token from the cache of the others (absorbed, if
      it is latent); and the table `embed`.
    """
    params, c = self.variables["params"], self.model.cfg
    tokens = cases.make_batch(cases.BATCHES["padded"])["tokens"][0]
    embedding = np.asarray(params["embed"]["embedding"])
    x, found = embedding[tokens], {"embed": embedding}
    for i in range(c.num_hidden_layers):
      kind, at = "dense_layers", i
      if i >= c.first_k_dense_replace:
        kind, at = "moe_layers", i - c.first_k_dense_replace
      one = {
        name: reference.layer(jax.device_get(tree[kind]), at)
        for name, tree in self.variables.items()
        if kind in tree
      }
      inputs = {
        "block": x,
        "attn_norm": x,
        "attn": golden[f"{i}.attn_norm"],
        "ffn_norm": x + golden[f"{i}.attn"],
        "ffn": golden[f"{i}.ffn_norm"],
      }
      outputs = _run_block(c, kind == "moe_layers")(one, inputs)
      found |= {f"{i}.{name}": out[0] for name, out in outputs.items()}
      x = x + golden[f"{i}.attn"] + golden[f"{i}.ffn"]
    norm = RMSNorm(c).apply({"params": params["final_norm"]}, x)
    return {**found, "final_norm": np.asarray(norm)}


def make_batch(name: str) -> dict[str, np.ndarray]:
  """One of `cases.BATCHES`, whose every token is a target."""
  batch = cases.make_batch(cases.BATCHES[name])
  return {**batch, "loss_mask": np.ones(batch["tokens"].shape, bool)}


def forward(model: Transformer, variables, batch) -> jax.Array:
  """Logits [B, T, V]."""
  rows = (batch[key] for key in ("tokens", "positions", "segment_ids"))
  hidden, _ = model.apply(variables, *rows)
  head = head_kernel(variables, model.cfg).astype(hidden.dtype)
  return jnp.einsum("BTD,DV->BTV", hidden, head)


@functools.cache
def _run_block(cfg, routed):
  """Compiled once for all layers of a kind; the weights are an argument."""
  block = Block(cfg, routed)

  def run(variables, inputs):
    inputs = {name: x[None] for name, x in inputs.items()}
    length = inputs["block"].shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    ones = jnp.ones_like(positions)
    rotations = rope_rotations(
      positions, cfg.rope_dim, cfg.rope_theta, cfg.rope_scaling
    )

    def parts(block):
      out = {
        "attn_norm": block.attn_norm(inputs["attn_norm"]),
        "ffn_norm": block.ffn_norm(inputs["ffn_norm"]),
        "block": block(inputs["block"], rotations, positions, ones, None)[0],
      }
      out["attn"], entries = block.attn(
        inputs["attn"], rotations, positions, ones
      )
      # The last token's own entry is removed: decode has to add it.
      last = length - 1
      out["decode"], _ = block.attn.decode(
        inputs["attn"][:, last:],
        tuple(x[:, last:] for x in rotations),
        entries.at[:, :, last].set(0.0),
        positions[:, last],
      )
      if routed:
        out["ffn"], _ = block.ffn(inputs["ffn"], ones, None)
      else:
        out["ffn"] = block.ffn(inputs["ffn"])
      return out

    return block.apply(variables, method=parts)

  return quick_jit(run)
