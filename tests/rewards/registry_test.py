import pytest

from rlm.rewards.registry import REWARDS, Scorer
from rlm.tasks.column_addition import addition_problem
from rlm.tasks.registry import make_task

TASK = make_task(
  dict(
    name="column_addition",
    heldout_fraction=0.1,
    letters="abcdef",
    forget_carry=0.0,
    slip=0.0,
  )
)
PROBLEM = addition_problem(8577, 9117, "bcdef")
STEPS = "b770=14c711=09d510=06e890=17"
RIGHT = f"<think>{STEPS}</think><answer>f1e7d6c9b4</answer>"
WEIGHTS = {"accuracy": 1.0, "format": 0.1}


def score(text, finished=True, weights=None):
  return Scorer(TASK, weights or WEIGHTS).score(PROBLEM, text, finished)


def test_a_right_response():
  scored = score(RIGHT)
  assert scored.total == pytest.approx(1.1)
  assert scored.rewards == {"accuracy": 1.0, "format": 1.0}
  assert scored.correct and scored.well_formed and scored.steps_correct
  assert scored.answer == "f1e7d6c9b4"


def test_a_wrong_answer_in_good_format():
  scored = score("<think></think><answer>f1e7d6c8b4</answer>")
  assert scored.total == pytest.approx(0.1)
  assert scored.rewards == {"accuracy": 0.0, "format": 1.0}
  assert not scored.correct and scored.well_formed
  assert not scored.steps_correct
  assert scored.answer == "f1e7d6c8b4"


def test_a_right_answer_after_wrong_steps_is_told_apart():
  wrong = STEPS.replace("c711=09", "c710=08")
  scored = score(f"<think>{wrong}</think><answer>f1e7d6c9b4</answer>")
  assert scored.correct and not scored.steps_correct


def test_right_steps_before_a_wrong_answer():
  scored = score(f"<think>{STEPS}</think><answer>b4</answer>")
  assert scored.steps_correct and not scored.correct


@pytest.mark.parametrize(
  "text", [RIGHT + " ", RIGHT[7:], RIGHT + "<answer>x</answer>", "f1e7d6c9b4"]
)
def test_no_reward_without_the_format(text):
  scored = score(text)
  assert scored.total == 0
  assert scored.rewards == {"accuracy": 0.0, "format": 0.0}
  assert not (scored.correct or scored.well_formed or scored.steps_correct)
  assert scored.answer == ""


def test_truncated_completions_earn_nothing_even_if_they_look_whole():
  for text in (RIGHT, RIGHT[:40]):
    scored = score(text, finished=False)
    assert scored.total == 0
    assert scored.rewards == {"accuracy": 0.0, "format": 0.0}
    assert not (scored.correct or scored.well_formed or scored.steps_correct)


def test_correct_is_reported_whatever_is_rewarded():
  scored = score(RIGHT, weights={"format": 0.5})
  assert scored.total == 0.5
  assert scored.rewards == {"format": 1.0}
  assert scored.correct


def test_weights_multiply_only_the_total():
  scored = score(RIGHT, weights={"accuracy": 2, "format": 0})
  assert scored.total == 2.0
  assert scored.rewards == {"accuracy": 1.0, "format": 1.0}


def test_unknown_reward_names_the_nearest():
  with pytest.raises(
    ValueError,
    match=r"unknown reward 'acuracy'; did you mean 'accuracy'\? The rewards"
    r" are accuracy, format\.",
  ):
    Scorer(TASK, {"acuracy": 1.0})


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_bad_weights(weight):
  with pytest.raises(ValueError, match=r"rewards.format is .* must be finite"):
    Scorer(TASK, {"accuracy": 1.0, "format": weight})


def test_nothing_to_learn_from():
  with pytest.raises(ValueError, match=r"rewards is empty"):
    Scorer(TASK, {})
  with pytest.raises(ValueError, match=r"rewards are all weighted 0"):
    Scorer(TASK, {"accuracy": 0.0, "format": 0.0})


def test_every_registered_reward_works():
  for name in REWARDS:
    assert score(RIGHT, weights={name: 1.0}).total == 1
    assert score("", weights={name: 1.0}).total == 0
