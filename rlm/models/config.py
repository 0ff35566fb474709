"""The sizes of a model, under the names of the published config.json."""

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Any, Literal

# What the shapes of one layer depend on is checked here, once, so that no
# impossible size reaches a tracer.


def _check_choices(section) -> None:
  """Every Literal field holds one of its values; any other would pick none."""
  for name, hint in typing.get_type_hints(type(section)).items():
    if typing.get_origin(hint) is not Literal:
      continue
    choices, value = typing.get_args(hint), getattr(section, name)
    if value not in choices:
      names = ", ".join(map(repr, choices))
      raise ValueError(f"{name}={value!r} is unknown. Choose one of {names}.")


def _check_stretch(factor: float, original_length: int) -> None:
  if factor < 1:
    raise ValueError(f"rope_scaling.factor={factor} must be >= 1.")
  if original_length < 1:
    raise ValueError(
      f"rope_scaling.original_max_position_embeddings={original_length} must be"
      " at least 1."
    )


# Sizes of latent attention alone, 0 in grouped-query attention.
_LATENT_SIZES = (
  "kv_lora_rank",
  "qk_nope_head_dim",
  "qk_rope_head_dim",
  "v_head_dim",
)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN (`rope_scaling` of config.json): a longer context by slower pairs.

  Attributes:
    factor: s, by which the context grows.
    original_max_position_embeddings: the context before, in tokens.
    beta_fast: turns over the original context above which a pair is kept.
    beta_slow: turns below which it is slowed by the full factor.
    mscale: numerator of the magnitude on cos and sin.
    mscale_all_dim: its denominator, and in latent attention the magnitude on
      the softmax scale.
    type: "yarn".
  """

  factor: float
  original_max_position_embeddings: int
  beta_fast: float
  beta_slow: float
  mscale: float
  mscale_all_dim: float
  type: Literal["yarn"] = "yarn"

  def __post_init__(self):
    _check_choices(self)
    _check_stretch(self.factor, self.original_max_position_embeddings)
    if not self.beta_fast > self.beta_slow > 0:
      raise ValueError(
        f"rope_scaling.beta_fast={self.beta_fast} must exceed beta_slow="
        f"{self.beta_slow}, and both 0: pairs that turn faster are kept."
      )


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3.1's stretch of the slow pairs (`rope_scaling` of config.json).

  Attributes:
    factor: by which the slowest pairs are slowed.
    low_freq_factor: turns over the original context below which a pair is
      slowed by the full factor.
    high_freq_factor: turns above which it is kept.
    original_max_position_embeddings: the context before, in tokens.
    type: "llama3".
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int
  type: Literal["llama3"] = "llama3"

  def __post_init__(self):
    _check_choices(self)
    _check_stretch(self.factor, self.original_max_position_embeddings)
    if not self.high_freq_factor > self.low_freq_factor > 0:
      raise ValueError(
        f"rope_scaling.high_freq_factor={self.high_freq_factor} must exceed"
        f" low_freq_factor={self.low_freq_factor}, and both 0."
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One definition from 0.3M to 671B parameters.

  A dense model has first_k_dense_replace = num_hidden_layers; its fields of
  routed experts are then unused. A model with grouped-query attention, as the
  distilled students have, sets num_key_value_heads and head_dim; q_lora_rank is
  then None and the four sizes of latent attention are 0.

  Attributes:
    vocab_size: rows of embedding and head.
    n_vocab_used: ids in use; the head never gives the ids from here on.
    hidden_size: d.
    num_hidden_layers: layers, MTP modules apart.
    first_k_dense_replace: leading layers with a dense feed-forward.
    intermediate_size: width of the dense feed-forward.
    moe_intermediate_size: width of each routed expert.
    n_routed_experts: N_r.
    num_experts_per_tok: K_r.
    n_shared_experts: N_s, fused into one SwiGLU of N_s expert widths; may be 0.
    n_group: groups of adjacent experts.
    topk_group: groups that a token may use.
    topk_method: "noaux_tc" (V3: bias in the selection, a group scores the sum
      of its two best), "group_limited_greedy" (V2: its best), "greedy" (no
      groups).
    scoring_func: "sigmoid" (V3) or "softmax" (V2).
    norm_topk_prob: divide the chosen gates by their sum.
    routed_scaling_factor: factor on the gates.
    num_attention_heads: n_h.
    q_lora_rank: d_c', or None for a plain query projection.
    kv_lora_rank: d_c.
    qk_nope_head_dim: d_h, per head and without positions.
    qk_rope_head_dim: d_h^R, even.
    v_head_dim: per head.
    rope_theta: base of RoPE.
    rope_scaling: YaRN, Llama 3's (grouped-query attention only), or None.
    max_position_embeddings: longest sequence in tokens.
    rms_norm_eps: of every norm.
    initializer_range: std of every matrix (training value 0.006).
    tie_word_embeddings: the head is the embedding.
    num_nextn_predict_layers: D, MTP modules.
    dtype: of activations.
    param_dtype: of parameters.
    remat: "none"; "block" recomputes each block in the backward pass,
      "attention" likewise but keeps the output of its attention; "dots" keeps
      its matrix products and recomputes the rest.
    unroll_layers: straight-line code instead of a scan; the same tree.
    attention_chunk: queries of a row handled at once, 0 = all, where no kernel
      handles a tile at a time; with latent attention, whose queries, keys and
      values are wide, also one row after the other, with kernels too. What a
      chunk or a row makes is recomputed, whatever `remat` says.
    logits_chunk: vocabulary rows handled at once in losses, 0 = all.
    num_key_value_heads: of grouped-query attention; 0 is latent attention,
      whose published configs repeat num_attention_heads here.
    head_dim: of grouped-query attention, of queries, keys and values alike.
    qkv_bias: biases on q, k and v (Qwen2); grouped-query attention only.
    qk_norm: RMSNorm of each head's q and k (Qwen3); likewise.
    eos_token_id: ids that end a text, for `rlm.generate`; the experiments take
      their tokenizer's.
  """

  vocab_size: int
  n_vocab_used: int
  hidden_size: int
  num_hidden_layers: int
  first_k_dense_replace: int
  intermediate_size: int
  moe_intermediate_size: int
  n_routed_experts: int
  num_experts_per_tok: int
  n_shared_experts: int
  n_group: int
  topk_group: int
  topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"]
  scoring_func: Literal["sigmoid", "softmax"]
  norm_topk_prob: bool
  routed_scaling_factor: float
  num_attention_heads: int
  q_lora_rank: int | None
  kv_lora_rank: int
  qk_nope_head_dim: int
  qk_rope_head_dim: int
  v_head_dim: int
  rope_theta: float
  rope_scaling: YarnScaling | Llama3Scaling | None
  max_position_embeddings: int
  rms_norm_eps: float
  initializer_range: float
  tie_word_embeddings: bool
  num_nextn_predict_layers: int
  dtype: Literal["float32", "bfloat16"]
  param_dtype: Literal["float32", "bfloat16"]
  remat: Literal["none", "block", "attention", "dots"]
  unroll_layers: bool
  attention_chunk: int
  logits_chunk: int
  num_key_value_heads: int = 0
  head_dim: int = 0
  qkv_bias: bool = False
  qk_norm: bool = False
  eos_token_id: tuple[int, ...] = ()

  @classmethod
  def from_hf(
    cls,
    source: str | os.PathLike | Mapping[str, Any],
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
  ) -> "ModelConfig":
    """The config of a published config.json; see `read_published_config`."""
    # Below in the file tree, above in the imports: it makes ModelConfigs.
    from rlm.models.published_config import read_published_config

    return read_published_config(source, dtype=dtype, param_dtype=param_dtype)

  @property
  def has_latent_attention(self) -> bool:
    """Latent attention, or else grouped-query attention."""
    return self.num_key_value_heads == 0

  @property
  def rope_dim(self) -> int:
    """Dimensions of a head that RoPE turns."""
    return self.head_dim or self.qk_rope_head_dim

  @property
  def cache_width(self) -> int:
    """Numbers that the cache holds for one token of one layer."""
    if self.has_latent_attention:
      return self.kv_lora_rank + self.qk_rope_head_dim
    return 2 * self.num_key_value_heads * self.rope_dim

  @property
  def num_moe_layers(self) -> int:
    """Layers with routed experts, MTP modules apart."""
    return self.num_hidden_layers - self.first_k_dense_replace

  @property
  def is_dense(self) -> bool:
    """Whether no layer has routed experts."""
    return self.num_moe_layers == 0

  def __post_init__(self):
    _check_choices(self)
    self._check_positive()
    self._check_attention()
    self._check_layers()
    if not self.is_dense:
      self._check_experts()

  def _check_positive(self):
    sizes = (
      "vocab_size n_vocab_used hidden_size num_hidden_layers intermediate_size"
      " num_attention_heads max_position_embeddings"
    ).split()
    if self.has_latent_attention:
      sizes += _LATENT_SIZES
    else:
      sizes += ["num_key_value_heads", "head_dim"]
    if self.q_lora_rank is not None:
      sizes.append("q_lora_rank")
    for name in sizes:
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
    for name in ("rms_norm_eps", "initializer_range"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name}={getattr(self, name)} must be positive.")
    if not self.rope_theta > 1:
      raise ValueError(
        f"rope_theta={self.rope_theta} must exceed 1: pair i turns by"
        f" rope_theta^(-2i / {self.rope_dim}) a position. Published: 10000."
      )

  def _check_attention(self):
    if self.rope_dim % 2:
      name = "qk_rope_head_dim" if self.has_latent_attention else "head_dim"
      raise ValueError(
        f"{name}={self.rope_dim} must be even: RoPE turns pairs."
      )
    if self.has_latent_attention:
      given = [
        f"{name}={getattr(self, name)}"
        for name in ("head_dim", "qkv_bias", "qk_norm")
        if getattr(self, name)
      ]
      if isinstance(self.rope_scaling, Llama3Scaling):
        given.append("rope_scaling.type='llama3'")
      if given:
        raise ValueError(
          f"{', '.join(given)} cannot go with latent attention. Set"
          " num_key_value_heads for grouped-query attention, or leave it out."
        )
      return
    given = [
      f"{name}={getattr(self, name)}"
      for name in (*_LATENT_SIZES, "q_lora_rank")
      if getattr(self, name)
    ]
    if given:
      raise ValueError(
        f"num_key_value_heads={self.num_key_value_heads} asks for grouped-query"
        f" attention, but {', '.join(given)} are of latent attention. Leave"
        " num_key_value_heads at 0, or set these to 0 (q_lora_rank to None)."
      )
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"num_key_value_heads={self.num_key_value_heads} does not divide"
        f" num_attention_heads={self.num_attention_heads}."
      )

  def _check_layers(self):
    if self.n_vocab_used > self.vocab_size:
      raise ValueError(
        f"n_vocab_used={self.n_vocab_used} ids do not fit vocab_size="
        f"{self.vocab_size}. Raise vocab_size."
      )
    if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
      raise ValueError(
        f"first_k_dense_replace={self.first_k_dense_replace} must lie between"
        f" 0 and num_hidden_layers={self.num_hidden_layers}."
      )
    for name in ("attention_chunk", "logits_chunk", "num_nextn_predict_layers"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)} must not be negative.")

  def _check_experts(self):
    experts, groups = self.n_routed_experts, self.n_group
    if experts < 1 or self.moe_intermediate_size < 1:
      raise ValueError(
        f"n_routed_experts={experts} and moe_intermediate_size="
        f"{self.moe_intermediate_size} must be at least 1 where layers are"
        " mixtures. For a dense model set first_k_dense_replace ="
        " num_hidden_layers."
      )
    if groups < 1 or experts % groups:
      raise ValueError(
        f"n_group={groups} does not divide n_routed_experts={experts}."
      )
    if not 1 <= self.topk_group <= groups:
      raise ValueError(
        f"topk_group={self.topk_group} must lie between 1 and n_group={groups}."
      )
    eligible = experts
    if self.topk_method != "greedy":
      eligible = experts // groups * self.topk_group
    if not 1 <= self.num_experts_per_tok <= eligible:
      raise ValueError(
        f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1"
        f" and the {eligible} experts a token can reach"
        f" (n_routed_experts={experts}, n_group={groups}, topk_group="
        f"{self.topk_group}, topk_method={self.topk_method!r})."
      )
    if self.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
      raise ValueError(
        f"noaux_tc scores a group by its two best experts: n_group={groups}"
        f" leaves {experts // groups} in each. Lower n_group."
      )
    if self.n_shared_experts < 0:
      raise ValueError(
        f"n_shared_experts={self.n_shared_experts} must not be negative."
      )
