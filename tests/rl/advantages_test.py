import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.rl.advantages import (
  ADVANTAGES,
  advantages_of,
  centered_advantages,
  group_advantages,
  tied_groups,
)


def test_by_hand():
  # Group 1: mean 0.25, std sqrt(3)/4. Group 2: mean 0.5, std 0.5.
  rewards = jnp.array([1.0, 0, 0, 0, 1, 1, 0, 0])
  s = 3**0.5
  expected = [s, -1 / s, -1 / s, -1 / s, 1, 1, -1, -1]
  chex.assert_trees_all_close(
    group_advantages(rewards, 4, eps=1e-12), jnp.array(expected), rtol=1e-6
  )
  chex.assert_trees_all_close(
    centered_advantages(rewards, 4, eps=1e-12),
    jnp.array([0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5]),
  )


def test_eps_is_added_to_the_std():
  # std 0.5, so that eps 0.5 halves what the std alone would give.
  got = group_advantages(jnp.array([1.0, 0.0]), 2, eps=0.5)
  chex.assert_trees_all_close(got, jnp.array([0.5, -0.5]))


@given(st.sampled_from([1, 3]), st.sampled_from([2, 5]), st.floats(-5, 5))
def test_advantages_ignore_a_constant_reward(prompts, group, shift):
  r = jax.random.uniform(jax.random.key(group), (prompts * group,))
  for estimator in ADVANTAGES.values():
    a, b = (estimator(x, group, eps=1e-4) for x in (r, r + shift))
    chex.assert_trees_all_close(a, b, atol=1e-3)


@given(st.sampled_from([1, 3]), st.sampled_from([2, 5]), st.floats(0.1, 10))
def test_only_the_std_form_ignores_the_scale(prompts, group, scale):
  r = jax.random.uniform(jax.random.key(group), (prompts * group,))
  a, b = (group_advantages(x, group, eps=1e-9) for x in (r, r * scale))
  chex.assert_trees_all_close(a, b, rtol=1e-3, atol=1e-4)
  a, b = (centered_advantages(x, group, eps=1e-9) for x in (r, r * scale))
  chex.assert_trees_all_close(a * scale, b, rtol=1e-3, atol=1e-4)


@given(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), st.data())
def test_groups_do_not_see_each_other(rewards, data):
  group = len(rewards)
  other = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=group,
                             max_size=group))  # fmt: skip
  order = data.draw(st.permutations(range(group)))
  alone = np.asarray(rewards, np.float32)
  for name in ADVANTAGES:
    one = advantages_of(name, jnp.asarray(alone), group, eps=1e-4)
    both = advantages_of(
      name,
      jnp.concatenate([jnp.asarray(other, jnp.float32), alone[list(order)]]),
      group,
      eps=1e-4,
    )
    chex.assert_trees_all_close(both[group:], one[jnp.array(order)], atol=2e-2)
    assert abs(float(one.sum())) < 1e-2


@given(st.floats(-3, 3, width=32), st.sampled_from([2, 9]))
def test_a_tie_is_exactly_zero_and_said_to_be_tied(reward, group):
  # 0.1 summed nine times over nine is not 0.1: the plain estimator may leave
  # a rounding, times 1 / eps.
  rewards = jnp.full((2 * group,), reward, jnp.float32).at[0].add(1.0)
  np.testing.assert_array_equal(tied_groups(rewards, group), [False, True])
  for name in ADVANTAGES:
    advantages = advantages_of(name, rewards, group, eps=1e-6)
    np.testing.assert_array_equal(advantages[group:], 0.0)
    assert float(advantages[0]) > 0


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_batch_that_does_not_split_says_what_to_change(name):
  with pytest.raises(
    ValueError, match=r"7 completions .* group_size=4.*Make batch_size"
  ):
    advantages_of(name, jnp.zeros(7), 4, eps=1e-4)
