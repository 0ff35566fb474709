"""What a checkpoint of RL holds beside the curriculum."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rlm.train import TrainState


@flax.struct.dataclass
class RLState:
  """The policy's TrainState and its reference, flat.

  Flat, so that `variables` is found where other stages look for it.

  Attributes:
    step: int32 [], updates made (rollouts are counted by the loop).
    variables: of the policy.
    opt_state: of its trained parameters.
    reference: variables that the KL is taken to, or None.
  """

  step: jax.Array
  variables: Any
  opt_state: Any
  reference: Any

  @classmethod
  def of(cls, policy: TrainState, reference: Any) -> "RLState":
    """Joins the two."""
    return cls(policy.step, policy.variables, policy.opt_state, reference)

  @property
  def policy(self) -> TrainState:
    """What a training step takes; RL keeps no EMA."""
    return TrainState(self.step, self.variables, self.opt_state, None)


def copy_variables(variables: Any) -> Any:
  """Copies, which stay when a training step donates the policy."""
  return jax.tree.map(jnp.copy, variables)
