"""Programs of a config, compiled for machines that are not at hand.

jax describes any TPU slice, and libtpu compiles for it, on a CPU-only machine.
"""

import dataclasses
import os
from typing import Any

# What libtpu would otherwise ask of a metadata server that is not there; tests
# in several processes may load it at once.
_SETTINGS = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


def describe_slice(topology: str) -> list[Any]:
  """The devices of a slice, such as "v5p:8x8x8"; call before jax starts.

  Raises:
    ValueError: libtpu is not installed, or knows no such slice.
  """
  for name, value in _SETTINGS.items():
    os.environ.setdefault(name, value)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  from jax.experimental import topologies

  options = {}
  if topology.endswith(":1x1"):  # else "not divisible by" a host's 2x2 chips
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    described = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, **options
    )
  except Exception as error:  # of the runtime, of several kinds
    raise ValueError(
      f"--topology={topology} cannot be described: {error}. It takes libtpu"
      " (pip install 'rlm[tpu]') and a name such as v5p:8x8x8, v5e:16x16."
    ) from error
  return list(described.devices)


@dataclasses.dataclass(frozen=True)
class Program:
  """A function, ready to be lowered.

  Attributes:
    name: for people.
    function: jitted.
    arguments: `jax.ShapeDtypeStruct`s with shardings.
    layout: the model on its mesh.
    tokens: that a device trains on, or decodes, in one run.
    trips: how often the program's own loop of unknown length turns, here: the
      microbatches of a full batch, or the decode steps of a call.
    state: variables or training state among the arguments.
  """

  name: str
  function: Any
  arguments: tuple
  layout: Any
  tokens: int
  trips: int
  state: Any


def train_program(cfg: Any, devices: list[Any]) -> Program:
  """The training step of `experiments.pretrain`, a full batch of it.

  Args:
    cfg: its Config.
    devices: of `describe_slice`.
  """
  import jax
  import jax.numpy as jnp

  from experiments import pretrain
  from rlm.checkpoint import initial
  from rlm.parallel.sharding import batch_specs, shardings

  layout, start, step = pretrain.make_training(cfg, devices)
  state = layout.abstract(start, initial.shapes(layout.whole))
  rows, length = cfg.batch.microbatch_rows, cfg.data.row_length
  trips = cfg.batch.rows // rows
  types = {
    "tokens": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "loss_mask": jnp.bool_,
  }
  batch: Any = {
    name: jax.ShapeDtypeStruct((trips, rows, length), dtype)
    for name, dtype in types.items()
  }
  batch["num_live"] = jax.ShapeDtypeStruct((), jnp.int32)
  for name in pretrain.make_rates(cfg)(0):
    batch[name] = jax.ShapeDtypeStruct((), jnp.float32)
  places = shardings(layout.mesh, batch_specs(batch, leading=1))
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name])
    for name, x in batch.items()
  }
  key = jax.ShapeDtypeStruct(
    (), jax.random.key(0).dtype, sharding=layout.everywhere
  )
  return Program(
    "train",
    jax.jit(step, donate_argnums=0),
    (state, batch, key),
    layout,
    tokens=trips * rows * length // len(layout.mesh.devices.flat),
    trips=trips,
    state=state,
  )


def serving_programs(
  cfg: Any, devices: list[Any], *, slots: int, context: int, steps: int
) -> tuple[Program, Program]:
  """Prefill of whole prompts and decode over a cache that is full.

  Args:
    cfg: the Config whose model and mesh serve, in the activations' dtype.
    devices: of `describe_slice`.
    slots: rows in all.
    context: tokens of a row, those to come included.
    steps: of one decode call.

  Returns:
    Prefill of one row per device that holds other rows, and decode.

  Raises:
    ValueError: the mesh divides rows along their tokens, or not into slots.
  """
  import jax
  import jax.numpy as jnp

  from rlm.checkpoint import initial
  from rlm.models.layout import make_layout
  from rlm.models.transformer import Transformer
  from rlm.parallel.config import ROWS
  from rlm.sampling.config import SamplingConfig
  from rlm.sampling.programs import make_programs

  model_cfg = dataclasses.replace(
    cfg.model,
    param_dtype=cfg.model.dtype,
    num_nextn_predict_layers=0,
    remat="none",
    max_position_embeddings=max(context, cfg.model.max_position_embeddings),
  )
  cfg.mesh.check_decodes("mesh")
  cfg.mesh.check_rows("mesh", "--slots", slots)
  layout = make_layout(Transformer(model_cfg), cfg.mesh, "mesh", devices)
  programs = make_programs(
    layout,
    SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=steps),
    capacity=context,
    steps_per_call=steps,
    stop_tokens=(),
    pad_token=0,
  )
  variables = layout.place_shapes(initial.shapes(layout.whole))
  by_row = jax.NamedSharding(layout.mesh, jax.P(ROWS))

  def rows_of(shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_row)

  prompts = cfg.mesh.row_shards
  prompt = context - steps
  chunk = model_cfg.attention_chunk
  if 0 < chunk < prompt:
    prompt -= prompt % chunk
  held = jax.eval_shape(lambda: programs.start(slots))
  places = programs.start.lower(slots).out_info
  held = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place.sharding
    ),
    held,
    places,
  )
  number = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.everywhere)
  return (
    Program(
      "prefill",
      programs.prefill,
      (variables, rows_of((prompts, prompt)), rows_of((prompts,))),
      layout,
      tokens=prompt,
      trips=1,
      state=variables,
    ),
    Program(
      "decode",
      programs.decode,
      (variables, held, number, number),
      layout,
      tokens=steps * slots // cfg.mesh.row_shards,
      trips=steps,
      state=variables,
    ),
  )
