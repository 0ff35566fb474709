"""The ledger of a model: parameters, operations, memory, hours and money.

Formulas, and no measurement: what a step really takes comes in as tokens per
second and chip, from a run's timing.jsonl or from a paper.  Not counted are
activations and temporaries in memory, and hosts, network, cooling and failures
in hours, dollars and energy.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax

from rlm import flops
from rlm.hardware import Chip, chip_of_device_kind
from rlm.models.config import ModelConfig
from rlm.optim.config import OptimizerConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
# Kinds of `flops.model_parts` whose updates Muon orthogonalises; see
# `rlm.optim.optimizer.MATRICES`.
_MUON = (
  "attention",
  "dense feed-forward",
  "routed experts",
  "shared experts",
  "projection",
)


# --- The model: parameters, operations, cache. --------------------------------


@dataclasses.dataclass(frozen=True)
class ModelCost:
  """What a model is and what one token costs.

  Attributes:
    row_length: T, tokens that attention sees in a full row; also those in the
      cache of decode.
    parts: parameters by kind, MTP modules apart; see `flops.model_parts`.
    mtp: parameters that the MTP modules add.
    total: all parameters without MTP, as model sizes are quoted.
    activated: of `total`, those that one token uses, embedding and head
      included.
    activated_without_embedding: those that multiply, as the V3 repository
      counts its 36.7B.
    forward_flops: per token, by part; see `flops.forward_flops_by_part`.
    decode_flops: per token over a cache of `row_length` tokens, the absorbed
      form.
    attention: what the model has, a key of `cache_bytes`.
    cache_bytes: per token, of this attention and of others in its place.
  """

  row_length: int
  parts: dict[str, flops.Part]
  mtp: flops.Part
  total: int
  activated: int
  activated_without_embedding: int
  forward_flops: dict[str, int]
  decode_flops: float
  attention: str
  cache_bytes: dict[str, int]

  @property
  def backward_flops(self) -> dict[str, int]:
    """Per token, by part: each product has two gradients."""
    return {part: 2 * count for part, count in self.forward_flops.items()}

  @property
  def train_flops(self) -> float:
    """Forward and backward, per token; `flops.train_flops_per_token`."""
    return float(3 * sum(self.forward_flops.values()))


def model_cost(cfg: ModelConfig, row_length: int, *, mtp: bool) -> ModelCost:
  """Counts a model.

  Args:
    cfg: its sizes.
    row_length: T.
    mtp: whether the MTP modules run in training.

  Raises:
    ValueError: T is not within the model's context.
  """
  if not 1 <= row_length <= cfg.max_position_embeddings:
    raise ValueError(
      f"a row length of {row_length} is not between 1 and the model's"
      f" max_position_embeddings={cfg.max_position_embeddings}. Choose another,"
      " or a config with a wider context."
    )
  counts = flops.count_parameters(cfg)
  # A tied table multiplies too, as the head.
  looked_up = 0 if cfg.tie_word_embeddings else counts.embedding
  return ModelCost(
    row_length=row_length,
    parts=flops.model_parts(cfg),
    mtp=flops.Part(counts.mtp, counts.activated_mtp),
    total=counts.total,
    activated=counts.activated,
    activated_without_embedding=counts.activated - looked_up,
    forward_flops=flops.forward_flops_by_part(cfg, row_length, mtp=mtp),
    decode_flops=flops.decode_flops_per_token(cfg, row_length),
    attention=attention_name(cfg),
    cache_bytes=cache_bytes_per_token(cfg),
  )


def attention_name(cfg: ModelConfig) -> str:
  """MLA, MHA, MQA, or GQA with its key and value heads, such as GQA-8."""
  if cfg.has_latent_attention:
    return "MLA"
  if cfg.num_key_value_heads == cfg.num_attention_heads:
    return "MHA"
  heads = cfg.num_key_value_heads
  return "MQA" if heads == 1 else f"GQA-{heads}"


def cache_bytes_per_token(cfg: ModelConfig) -> dict[str, int]:
  """Bytes that decode keeps of a token, by kind of attention.

  The model's own, and what the same heads would keep otherwise (V2 table 1):
  with keys and values of their own (MHA), shared by 8 groups (GQA-8) or by all
  (MQA).  A model without latents is given those of V2 and V3, whose latent is
  four heads wide and whose RoPE key half a head.

  Args:
    cfg: the model's sizes; the cache is of its dtype.
  """
  heads = cfg.num_attention_heads
  if cfg.has_latent_attention:
    key_and_value = cfg.qk_nope_head_dim + cfg.v_head_dim
    latent = cfg.kv_lora_rank + cfg.qk_rope_head_dim
  else:
    key_and_value = 2 * cfg.head_dim
    latent = 4 * cfg.head_dim + cfg.head_dim // 2
  widths = {"MLA": latent, "MHA": heads * key_and_value}
  if heads > 8 and heads % 8 == 0:
    widths["GQA-8"] = 8 * key_and_value
  widths["MQA"] = key_and_value
  widths[attention_name(cfg)] = cfg.cache_width
  layer = cfg.num_hidden_layers * ITEM_BYTES[cfg.dtype]
  return {name: layer * width for name, width in widths.items()}


# --- Memory: what a run keeps from step to step. ------------------------------


def memory_by_kind(
  cfg: ModelConfig,
  *,
  optimizer: OptimizerConfig | None,
  ema: bool,
  reference: bool,
  mtp_trained: bool,
) -> dict[str, int]:
  """Bytes in all that a run keeps, by kind, were nothing held twice.

  Args:
    cfg: the model's sizes.
    optimizer: of its training; None for a model that is only run.
    ema: whether an average of the weights is kept, which is float32.
    reference: whether RL keeps the weights that its KL is taken to.
    mtp_trained: whether the optimizer keeps moments of the MTP modules, as it
      does everywhere but in RL.

  Returns:
    Those of "parameters", "expert bias", "gradients" (float32, as `rlm.train`
    sums them over microbatches), "first moments", "second moments", "EMA" and
    "reference" that there are.
  """
  main, mtp = flops.model_parts(cfg), flops.mtp_parts(cfg)
  parts = [*main.items(), *mtp.items()]
  count = sum(part.total for _, part in parts)
  layers = cfg.num_moe_layers
  if not cfg.is_dense:
    layers += cfg.num_nextn_predict_layers
  bias = 4 * layers * cfg.n_routed_experts
  weights = count * ITEM_BYTES[cfg.param_dtype]
  memory = {"parameters": weights, "expert bias": bias}
  if optimizer is not None:
    moments = [*main.items(), *(mtp.items() if mtp_trained else ())]
    item = ITEM_BYTES[optimizer.moment_dtype]
    memory["gradients"] = 4 * count
    memory["first moments"] = item * sum(part.total for _, part in moments)
    memory["second moments"] = item * sum(
      part.total
      for kind, part in moments
      if optimizer.muon is None or kind not in _MUON
    )
  if ema:
    memory["EMA"] = 4 * count
  if reference:
    memory["reference"] = weights + bias
  return {kind: size for kind, size in memory.items() if size}


def chips_to_hold(memory: Mapping[str, int], chip: Chip) -> int:
  """The fewest chips whose memory holds it all, divided evenly."""
  return math.ceil(sum(memory.values()) / chip.hbm_bytes)


# --- Training: hours, dollars, energy. ----------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainingCost:
  """What training on some tokens costs.

  Attributes:
    tokens: trained on at the rate below.
    flops: of them.
    tokens_per_second_per_chip: the rate.
    mfu: the same as a share of the chip's dense bfloat16 peak.
    chip_hours: by phase; "training" is that of `tokens`.
    dollars: of all phases; None without a price.
    energy_kwh: of all phases, the chips alone; None without their power.
  """

  tokens: float
  flops: float
  tokens_per_second_per_chip: float
  mfu: float
  chip_hours: dict[str, float]
  dollars: float | None
  energy_kwh: float | None

  @property
  def total_chip_hours(self) -> float:
    """Of all phases."""
    return sum(self.chip_hours.values())


def utilisation(
  tokens_per_second_per_chip: float, flops_per_token: float, chip: Chip
) -> float:
  """MFU of a rate: the share of the chip's peak that its tokens need."""
  return tokens_per_second_per_chip * flops_per_token / chip.peak_flops


def training_cost(
  chip: Chip,
  *,
  tokens: float,
  flops_per_token: float,
  tokens_per_second_per_chip: float | None = None,
  mfu: float | None = None,
  extra_chip_hours: Mapping[str, float] | None = None,
  dollars_per_chip_hour: float | None = None,
  watts_per_chip: float | None = None,
) -> TrainingCost:
  """Hours, dollars and energy of training, from either form of its rate.

  Args:
    chip: what it is trained on.
    tokens: how many.
    flops_per_token: forward and backward.
    tokens_per_second_per_chip: the rate; or
    mfu: the same as a share of the chip's peak, in (0, 1].
    extra_chip_hours: by name, of phases that are known by their hours, such as
      the extension of the context.
    dollars_per_chip_hour: None takes the chip's published price.
    watts_per_chip: None takes the chip's published power.

  Raises:
    ValueError: the rate is given twice or not at all, or asks for more than the
      chip's peak; or a figure is negative.
  """
  if (tokens_per_second_per_chip is None) == (mfu is None):
    raise ValueError(
      f"{tokens_per_second_per_chip=} and {mfu=}: exactly one of the two is"
      " needed, and the other follows from it."
    )
  if mfu is not None:
    rate = mfu * chip.peak_flops / flops_per_token
  else:
    assert tokens_per_second_per_chip is not None
    rate = tokens_per_second_per_chip
    mfu = utilisation(rate, flops_per_token, chip)
  if not 0 < mfu <= 1:
    most = chip.peak_flops / flops_per_token
    raise ValueError(
      f"{rate:.6g} tokens per second and chip are an MFU of {mfu:.4g}, which"
      f" must lie in (0, 1]: at its peak a {chip.name} trains {most:.6g} tokens"
      f" of {flops_per_token:.4g} operations a second. The rate is that of one"
      " chip, not of all."
    )
  extra = dict(extra_chip_hours or {})
  prices = {
    "tokens": tokens,
    "dollars_per_chip_hour": dollars_per_chip_hour,
    "watts_per_chip": watts_per_chip,
    **{f"extra_chip_hours of {name!r}": hours for name, hours in extra.items()},
  }
  for name, value in prices.items():
    if value is not None and value < 0:
      raise ValueError(f"{name} is {value}, which must not be negative.")
  if "training" in extra:
    raise ValueError(
      "extra_chip_hours names a phase 'training', which is that of the tokens."
      " Call it otherwise."
    )
  hours = {"training": tokens / rate / 3600, **extra}
  total = sum(hours.values())
  return TrainingCost(
    tokens=tokens,
    flops=tokens * flops_per_token,
    tokens_per_second_per_chip=rate,
    mfu=mfu,
    chip_hours=hours,
    dollars=_times(total, _first(dollars_per_chip_hour, chip.dollars_per_hour)),
    energy_kwh=_times(total / 1e3, _first(watts_per_chip, chip.watts)),
  )


def _first(given: float | None, published: float | None) -> float | None:
  return published if given is None else given


def _times(hours: float, price: float | None) -> float | None:
  return None if price is None else hours * price


# --- A run's own ledger, live. ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunLedger:
  """What a run costs while it runs, for timing.jsonl and summary.json.

  Attributes:
    devices: jax devices that it runs on.
    peak_flops: of all of them together.
    chip: what they are, by `hardware.chip_of_device_kind`; None where unknown.
  """

  devices: int
  peak_flops: float
  chip: Chip | None

  def record(self, work: float, seconds: float) -> dict[str, float]:
    """The ledger of a step, or of a whole run.

    Args:
      work: operations by formula, such as tokens times
        `flops.train_flops_per_token`.
      seconds: taken.

    Returns:
      flops, mfu and device_hours; chip_hours, dollars and energy_kwh (the chips
      alone) as far as the chip and its figures are known.
    """
    device_hours = self.devices * seconds / 3600
    found = {
      "flops": work,
      "mfu": work / self.peak_flops / max(seconds, 1e-9),
      "device_hours": device_hours,
    }
    if self.chip is not None:
      hours = device_hours / self.chip.devices_per_chip
      found["chip_hours"] = hours
      if self.chip.dollars_per_hour is not None:
        found["dollars"] = hours * self.chip.dollars_per_hour
      if self.chip.watts is not None:
        found["energy_kwh"] = hours * self.chip.watts / 1e3
    return found


def open_ledger(
  devices: int, dtype: str, peak_flops: float | None = None
) -> RunLedger:
  """The ledger of a run on this machine.

  Args:
    devices: jax devices that it runs on.
    dtype: that the model computes in.
    peak_flops: of all devices; None takes the published one, and where there is
      none measures a product.
  """
  chip = chip_of_device_kind(jax.devices()[0].device_kind)
  peak = peak_flops or published_peak(chip, devices, dtype)
  if peak is None:
    peak = flops.measure_peak_flops(dtype, size=1024, seconds=0.2)
  return RunLedger(devices, peak, chip)


def published_peak(chip: Chip | None, devices: int, dtype: str) -> float | None:
  """The peak of some devices by the data sheet, operations per second.

  Args:
    chip: what they are; None where unknown.
    devices: jax devices.
    dtype: that the model computes in.

  Returns:
    None for an unknown chip, and for another dtype than bfloat16, whose peaks
    are not in the table: measure it (`flops.measure_peak_flops`).
  """
  if chip is None or dtype != "bfloat16":
    return None
  return chip.peak_flops * devices / chip.devices_per_chip
