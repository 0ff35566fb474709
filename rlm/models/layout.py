"""How one model lies on one mesh: what `rlm.parallel` needs to know of it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlm.models.config import ModelConfig
from rlm.models.transformer import Transformer
from rlm.parallel.config import MeshConfig
from rlm.parallel.expert import make_exchange
from rlm.parallel.mesh import make_mesh
from rlm.parallel.shard import WHOLE, MeshShard
from rlm.parallel.sharding import check_fits, shardings, state_specs


@dataclasses.dataclass(frozen=True)
class Layout:
  """A model on a mesh.

  Attributes:
    cfg: sizes of the mesh.
    mesh: the devices.
    model: the Transformer as one device runs it, inside `map`.
  """

  cfg: MeshConfig
  mesh: Mesh
  model: Transformer

  @property
  def whole(self) -> Transformer:
    """The model outside of `map`, to ask for its shapes."""
    return self.model.clone(shard=WHOLE)

  @property
  def shard(self) -> MeshShard:
    """What a device knows of the others."""
    shard = self.model.shard
    assert isinstance(shard, MeshShard)
    return shard

  def map(self, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`f` of the parts, on every device: a shard_map manual over all axes."""
    return jax.shard_map(
      f,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )

  def abstract(self, f: Callable, *args: Any) -> Any:
    """The state that f(*args) would be, as shapes with their shardings."""
    return self.place_shapes(jax.eval_shape(f, *args))

  def place_shapes(self, shapes: Any) -> Any:
    """The same `jax.ShapeDtypeStruct`s, each with its sharding."""
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      shapes,
      self.shardings(shapes),
    )

  def jit(self, f: Callable) -> Callable:
    """`jax.jit` of a function that makes a state, each leaf where it lies."""

    def placed(*args):
      made = f(*args)
      return jax.lax.with_sharding_constraint(made, self.shardings(made))

    return jax.jit(placed)

  def shardings(self, tree: Any) -> Any:
    """Where each leaf of variables or of a training state lies."""
    return shardings(self.mesh, self.specs(tree))

  def specs(self, tree: Any) -> Any:
    """PartitionSpecs of variables, gradients or a training state."""
    divided = self.cfg.dense_over_expert
    return state_specs(tree, dense_over_expert=divided)

  @property
  def everywhere(self) -> NamedSharding:
    """The sharding of what every device holds."""
    return NamedSharding(self.mesh, P())


def make_layout(
  model: Transformer,
  cfg: MeshConfig,
  key: str,
  devices: Sequence[Any] | None = None,
) -> Layout:
  """Lays a model on a mesh.

  Args:
    model: the whole model.
    cfg: the mesh's sizes.
    key: of the mesh in the config, for messages.
    devices: to use; None is jax's.

  Raises:
    ValueError: there are too few devices, or the model does not divide among
      them; the message names the sizes that would do.
  """
  c = model.cfg
  check_model_fits(c, cfg, key)
  mesh = make_mesh(cfg, key, devices)
  limited = not c.is_dense and c.topk_method != "greedy"
  exchange = make_exchange(
    cfg,
    n_group=c.n_group if limited else 1,
    topk_group=c.topk_group if limited else 1,
    n_experts=c.n_routed_experts,
    k=c.num_experts_per_tok,
  )
  shard = MeshShard(
    exchange=exchange,
    sizes=tuple((axis, size) for axis, size in cfg.sizes.items() if size > 1),
    dense_over_expert=cfg.dense_over_expert,
    gradient_dtype=cfg.gradient_dtype,
  )
  return Layout(cfg, mesh, model.clone(shard=shard))


def check_model_fits(model_cfg: ModelConfig, cfg: MeshConfig, key: str) -> None:
  """Raises ValueError where a model does not divide among a mesh's devices."""
  c = model_cfg
  if cfg.expert > 1 and c.is_dense:
    raise ValueError(
      f"{key}.expert={cfg.expert}, but the model has no experts. Set it to 1"
      f" and {key}.fsdp to {cfg.fsdp * cfg.expert}."
    )
  heads = [("num_attention_heads", c.num_attention_heads)]
  if not c.has_latent_attention:
    heads.append(("num_key_value_heads", c.num_key_value_heads))
  for name, size in heads:
    if size % cfg.tensor:
      fitting = [n for n in range(1, size + 1) if size % n == 0]
      raise ValueError(
        f"{key}.tensor={cfg.tensor} does not divide {name}={size}. Make it one"
        f" of {', '.join(map(str, fitting))}."
      )
  if cfg.pieces * cfg.expert * cfg.tensor > 1:
    check_fits(cfg, _shapes(c), key)


@functools.lru_cache(maxsize=8)
def _shapes(model_cfg: ModelConfig) -> Any:
  row = jnp.ones((1, 4), jnp.int32)
  init = Transformer(model_cfg).init
  return jax.eval_shape(init, jax.random.key(0), row, row, row)
