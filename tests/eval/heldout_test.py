import functools
import math

import jax
import numpy as np
import pytest

from rlm.data.pipeline import Heldout
from rlm.data.r1_chat import R1Chat
from rlm.data.tokenizer import ByteTokenizer
from rlm.eval import heldout
from rlm.models.transformer import head_kernel
from rlm.tasks.registry import make_task
from tests.tiny_model import lay, tiny_model

ROW_LENGTH = 48


@pytest.fixture(scope="module")
def model_and_scorer():
  model, variables = tiny_model(
    vocab_size=272,
    n_vocab_used=268,
    num_hidden_layers=1,
    num_nextn_predict_layers=0,
  )
  return model, variables, heldout.make_score_rows(lay(model))


def task():
  return make_task(
    dict(
      name="column_addition",
      heldout_fraction=0.2,
      letters="abcdef",
      forget_carry=1.0,
      slip=0.5,
    )
  )


def problems(**changes):
  settings = dict(
    levels=(2, 3),
    problems_per_level=3,
    seed=0,
    batch_size=4,
    row_length=ROW_LENGTH,
  )
  return heldout.worked_problems(
    task(), R1Chat(ByteTokenizer()), **{**settings, **changes}
  )


@functools.cache  # jitting the bound method anew would compile anew
def forward(model):
  return jax.jit(model.apply)


def logits_of(model, variables, batch):
  hidden, _ = forward(model)(
    variables, batch["tokens"], batch["positions"], batch["segment_ids"]
  )
  head = np.asarray(head_kernel(variables, model.cfg), np.float64)
  return np.asarray(hidden, np.float64) @ head[:, : model.cfg.n_vocab_used]


def test_rows_are_the_held_out_problems_with_right_solutions():
  rows = problems()
  assert rows.levels == [2, 2, 2, 3, 3, 3]
  assert [batch["tokens"].shape for batch in rows.batches] == [
    (4, ROW_LENGTH),
    (4, ROW_LENGTH),
  ]
  tokenizer = ByteTokenizer()
  for i in range(3):
    problem = task().problem(0, i, 2, "heldout")
    assert task().is_heldout(problem)
    solution = task().worked_solution(problem)
    row = {key: x[i] for key, x in rows.batches[0].items()}
    text = tokenizer.decode(row["tokens"][row["loss_mask"]])
    assert f"<think>{solution.thinking}</think>" in text
    assert f"<answer>{solution.answer}</answer>" in text
    assert problem.prompt not in text  # the loss is on the response
  padding = rows.batches[1]["segment_ids"][2:]
  assert not padding.any()


def test_scores_are_those_of_the_logits(model_and_scorer):
  model, variables, score_rows = model_and_scorer
  rows = problems()
  batch = rows.batches[1]
  # Row 0 answers greedily: write the model's own choices into it.
  batch["tokens"] = batch["tokens"].copy()
  for t in np.flatnonzero(batch["loss_mask"][0]):
    batch["tokens"][0, t] = logits_of(model, variables, batch)[
      0, t - 1
    ].argmax()
  scores = score_rows(variables, batch)
  logits = logits_of(model, variables, batch)
  logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  nats = np.zeros(4)
  for row, t in np.argwhere(batch["loss_mask"]):
    nats[row] -= logprobs[row, t - 1, batch["tokens"][row, t]]
  np.testing.assert_allclose(scores.nats, nats, rtol=1e-4)
  np.testing.assert_array_equal(scores.nats[2:], 0.0)
  # Rows of padding have no target that could be missed.
  np.testing.assert_array_equal(scores.exact, [True, False, True, True])

  accuracy = heldout.worked_accuracy(score_rows, variables, rows)
  assert accuracy["level/2/worked_accuracy"] == 0.0
  # Problem 1 of level 3 is row 0 of the second batch; padding does not count.
  assert accuracy["level/3/worked_accuracy"] == pytest.approx(1 / 3)


def test_scores_on_a_mesh_are_those_of_one_device(model_and_scorer):
  """Rows and their tokens are divided, and a row's sums joined again."""
  model, variables, score_rows = model_and_scorer
  divided = heldout.make_score_rows(lay(model, fsdp=2, context=2))
  for batch in problems().batches:
    expected, got = (f(variables, batch) for f in (score_rows, divided))
    np.testing.assert_allclose(got.nats, expected.nats, rtol=1e-5)
    np.testing.assert_array_equal(got.exact, expected.exact)
  assert expected.exact.any() and not expected.exact.all()


def test_bits_per_byte_divide_by_the_bytes_of_text(model_and_scorer):
  _, variables, score_rows = model_and_scorer
  batches = problems().batches
  rows = Heldout(
    batches=batches,
    num_bytes=50,
    unigram_bits_per_byte=None,
    bigram_bits_per_byte=None,
  )
  metrics = heldout.bits_per_byte(score_rows, variables, {"sums": rows})
  nats = sum(float(score_rows(variables, b).nats.sum()) for b in batches)
  assert metrics == {
    "heldout/sums/bits_per_byte": pytest.approx(nats / math.log(2) / 50)
  }


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="a problem of level=3 is"):
    problems(row_length=40)
  with pytest.raises(ValueError, match="level 9"):
    problems(levels=(9,))
