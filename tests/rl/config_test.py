import pytest

from rlm.rl.config import ObjectiveConfig, SelectionConfig


def test_numbers_that_no_objective_can_have():
  with pytest.raises(ValueError, match=r"clip_low=-1 is negative"):
    ObjectiveConfig("dapo", 1e-4, -1, None, None)
  with pytest.raises(ValueError, match="advantage_eps=0 divides by zero"):
    ObjectiveConfig("dapo", 0, None, None, None)


@pytest.mark.parametrize(
  ("cfg", "error"),
  [
    (
      ("all", 8, 1),
      r"rows_per_rollout=8 of a rollout of 16 .* or rows='untied'",
    ),
    (("untied", 32, 1), r"rows_per_rollout=32 of a rollout of 16 \(4 prompts"),
  ],
)
def test_sizes_that_do_not_fit_a_rollout(cfg, error):
  with pytest.raises(ValueError, match=error):
    SelectionConfig(*cfg, 1).check(4, 4)


def test_sizes_that_do_not_fit_each_other():
  with pytest.raises(ValueError, match=r"rows_per_rollout=12 does not split"):
    SelectionConfig("untied", 12, 2, 4)
  with pytest.raises(ValueError, match=r"num_minibatches=0 .* at least 1"):
    SelectionConfig("untied", 12, 0, 4)
  with pytest.raises(ValueError, match=r"group_size=1 leaves nothing"):
    SelectionConfig("untied", 4, 1, 1).check(4, 1)


def test_derived_sizes():
  cfg = SelectionConfig("untied", 24, 2, 4)
  assert cfg.rows_per_minibatch == 12 and cfg.num_microbatches == 3
