"""configs/rl/zero.py with every number small, for the shrunk recipe's base."""

from configs.rl import zero
from tests.experiments import shrunk_laptop


def get_config():
  recipe = shrunk_laptop.get_config()
  c = zero.get_config()
  c.model, c.task = recipe.models.model, recipe.task
  shrunk_laptop.shrink_rl(c)
  c.steps, c.selection.num_minibatches = 2, 2
  return c
