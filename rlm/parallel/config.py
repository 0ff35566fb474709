"""The mesh: five named axes of devices, any of size 1.

| axis | divides | and |
|---|---|---|
| data | rows of the batch | copies the parameters: the axis between slices |
| fsdp | rows of the batch | a piece of every matrix, gathered when it is used |
| expert | rows of the batch | the experts, to which tokens go; else as fsdp, |
| | | or nothing (`dense_over_expert`) |
| context | tokens of a row | a piece of every matrix, as fsdp |
| tensor | heads, feed-forward widths | nothing: its devices repeat the rest |

A laptop, a GPU and 512 chips differ in these sizes only.
"""

import dataclasses
import math
from typing import Literal

AXES = ("data", "fsdp", "expert", "context", "tensor")
ROWS = ("data", "fsdp", "expert")  # axes among which rows are divided
# Axes that gather a matrix to use it: one of an expert or of the vocabulary,
# and one that every device uses.
PIECES = ("fsdp", "context")
ALL_PIECES = ("fsdp", "expert", "context")
TOKENS = (*ROWS, "context")  # axes whose devices hold different tokens


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the axes, and how tokens travel to their experts.

  Attributes:
    data: replicas; between slices and nodes put this axis.
    fsdp: pieces of every matrix.
    expert: groups of experts.
    context: parts of a row.
    tensor: parts of the heads and of the feed-forward widths.
    transport: of `rlm.parallel.expert`: "ragged" sends what is needed (TPU,
      GPU), "padded" the worst case (everywhere), "gather" every token to every
      device (small meshes, decode); None is ragged where it runs, else padded.
    node_limited: an `expert` axis wider than the model's n_group sends a token
      to a group of devices once, and there onwards, as V3 between its nodes.
    expert_chunk: tokens of a device that travel at once, which bounds the
      buffers (`rlm.parallel.expert.worst_rows`); 0 is all of a microbatch.
    expert_capacity: rows that a device receives, in multiples of the mean;
      what is beyond is dropped and reported. None drops nothing.
    dense_over_expert: whether devices of `expert` also divide the matrices
      outside of the experts among them, and gather them in every layer; so
      training saves memory. False holds them whole on each, as decoding wants,
      whose steps are too short for gathers.
    gradient_dtype: in which pieces of gradients are summed over devices.
  """

  data: int
  fsdp: int
  expert: int
  context: int
  tensor: int
  transport: Literal["ragged", "padded", "gather"] | None = None
  node_limited: bool = True
  expert_chunk: int = 0
  expert_capacity: float | None = None
  dense_over_expert: bool = True
  gradient_dtype: Literal["float32", "bfloat16"] = "float32"

  def __post_init__(self):
    for axis, size in self.sizes.items():
      if size < 1:
        raise ValueError(f"mesh.{axis}={size} must be at least 1.")
    if self.expert_chunk < 0:
      raise ValueError(
        f"mesh.expert_chunk={self.expert_chunk} must not be negative; 0 is all"
        " tokens at once."
      )
    if self.expert_capacity is not None and self.expert_capacity <= 0:
      raise ValueError(
        f"mesh.expert_capacity={self.expert_capacity} must be above 0, or None"
        " to drop no token."
      )

  def check_rows(self, key: str, name: str, rows: int) -> None:
    """Raises ValueError where rows do not divide among the devices.

    Args:
      key: of this mesh in the config.
      name: of the rows there.
      rows: how many.
    """
    if rows < 1 or rows % self.row_shards:
      raise ValueError(
        f"{name}={rows} cannot be divided among the {self.row_shards} parts of"
        f" {key} (data={self.data} x fsdp={self.fsdp} x expert={self.expert})."
        " Make it a multiple of them."
      )

  def check_whole_rows(self, key: str, why: str) -> None:
    """Raises ValueError where rows are divided along their tokens.

    Args:
      key: of this mesh in the config.
      why: they must not be, a sentence.
    """
    if self.context > 1:
      raise ValueError(
        f"{key}.context={self.context}: {why}. Set it to 1 and {key}.fsdp to"
        f" {self.fsdp * self.context}."
      )

  def check_decodes(self, key: str) -> None:
    """Raises ValueError where tokens of a row would be sampled apart."""
    self.check_whole_rows(
      key, "decoding adds one token to a row, which cannot be divided"
    )

  @property
  def sizes(self) -> dict[str, int]:
    """Axis -> size, in the order of the mesh."""
    return {axis: getattr(self, axis) for axis in AXES}

  @property
  def devices(self) -> int:
    """Devices of the mesh."""
    return math.prod(self.sizes.values())

  @property
  def row_shards(self) -> int:
    """Parts into which rows are divided."""
    return math.prod(getattr(self, axis) for axis in ROWS)

  @property
  def pieces(self) -> int:
    """Pieces of every matrix."""
    return math.prod(getattr(self, axis) for axis in PIECES)


def replicas(devices: int) -> MeshConfig:
  """Rows divided among devices that all hold the whole model."""
  return MeshConfig(data=devices, fsdp=1, expert=1, context=1, tensor=1)
