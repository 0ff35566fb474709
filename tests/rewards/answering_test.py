"""What a completion is worth: its text, its end, its key."""

import jax
import numpy as np

from rlm.data.chat import Trace, load_messages, save_messages
from rlm.data.template_chat import TemplateChat
from rlm.rewards.answering import answer_problems
from rlm.rewards.registry import Scorer
from rlm.rl.rejection import is_readable
from rlm.sampling.sampler import request_keys
from tests.data import published_folder as published
from tests.rl.reciter import CHAT, TASK, TOKENIZER, Reciter, right, wrong


def recite(*makers, problems=1, max_new=40):
  """The answers whose completions `makers` make of the problems."""
  asked = [TASK.problem(0, i, 2, "train") for i in range(problems)]
  sampler = Reciter(
    [make(problem) for problem in asked for make in makers], max_new=max_new
  )
  keys = request_keys(jax.random.key(3), len(asked) * len(makers))
  answers = answer_problems(
    sampler,
    None,
    asked,
    CHAT,
    Scorer(TASK, {"accuracy": 1.0, "format": 0.1}),
    keys,
    samples_per_problem=len(makers),
  )
  return asked, sampler, answers


def rewards(answers):
  return [round(score.total, 6) for score in answers.scores]


def test_a_problem_is_asked_n_times_and_each_answer_judged():
  asked, sampler, answers = recite(right, wrong, problems=2)
  assert answers.problems == [asked[0], asked[0], asked[1], asked[1]]
  assert sampler.prompts == answers.prompts
  assert answers.prompts == [
    CHAT.encode_prompt(problem.prompt) for problem in answers.problems
  ]
  assert rewards(answers) == [1.1, 0.1] * 2
  solution = TASK.worked_solution(asked[0])
  text = f"<think>{solution.thinking}</think><answer>{solution.answer}</answer>"
  assert answers.texts[0] == text
  assert answers.tokens(0).tolist() == right(asked[0])[:-1]  # without EOS


def test_a_published_models_answer_is_read_from_its_box(tmp_path):
  chat = TemplateChat(published.write_deepseek(tmp_path, published.R1))
  problem = TASK.problem(0, 0, 2, "train")
  solution = TASK.worked_solution(problem)
  said = [
    chat.encode_response(solution.thinking, answer)
    for answer in (solution.answer, "a1")
  ]
  sampler = Reciter(said, max_new=200, prompt_length=120, chat=chat)
  answers = answer_problems(
    sampler,
    None,
    [problem],
    chat,
    Scorer(TASK, {"accuracy": 1.0, "format": 0.1}, answer_format="boxed"),
    request_keys(jax.random.key(3), 2),
    samples_per_problem=2,
  )
  assert rewards(answers) == [1.1, 0.1]
  # What the template opened belongs to the response, and is not sampled.
  assert answers.texts[0].startswith(f"<think>\n{solution.thinking}\n</think>")
  assert answers.tokens(0).tolist() == said[0][:-1]
  assert is_readable(chat.tokenizer, answers.tokens(0))
  # It comes back, as fine-tuning data, as the tokens sampled.
  path = tmp_path / "kept.jsonl"
  save_messages(path, [Trace(chat.question(problem.prompt), answers.texts[0])])
  [(tokens, mask)] = load_messages(path, chat, row_length=1000)
  assert tokens == [*answers.prompts[0], *said[0]]
  assert sum(mask) == len(said[0])


def test_a_completion_cut_before_its_eos_earns_nothing():
  # The whole format stands there, but the model had not said that it was
  # done: its EOS would be the next token.
  length = len(right(TASK.problem(0, 0, 2, "train")))
  (problem,), _, answers = recite(right, max_new=length - 1)
  assert answers.texts[0].endswith("</answer>")
  assert rewards(answers) == [0.0]
  # Every token of it is said, the last too: there is no EOS to leave out.
  assert answers.tokens(0).tolist() == right(problem)[:-1]
  # At exactly its length it ends by itself.
  assert rewards(recite(right, max_new=length)[2]) == [1.1]


def test_eos_in_the_middle_of_the_format_earns_nothing():
  def early(problem):
    return [*right(problem)[:5], TOKENIZER.eos_id]

  _, _, answers = recite(early, right)
  assert answers.completions.finished.tolist() == [True, True]
  assert rewards(answers) == [0.0, 1.1]


def test_a_pad_that_was_sampled_is_a_token_like_others():
  def padded(problem):
    return [TOKENIZER.pad_id, *right(problem)]

  (problem,), _, answers = recite(padded, right)
  assert rewards(answers) == [0.0, 1.1]
  assert answers.tokens(0).tolist() == padded(problem)[:-1]


def test_the_key_of_a_request_does_not_depend_on_how_many_there_are():
  _, sampler, _ = recite(right, wrong, right, problems=3)
  expected = [jax.random.fold_in(jax.random.key(3), i) for i in range(9)]
  np.testing.assert_array_equal(
    sampler.keys, [np.asarray(jax.random.key_data(k)) for k in expected]
  )
  few, many = (request_keys(jax.random.key(1), n) for n in (2, 5))
  np.testing.assert_array_equal(
    jax.random.key_data(few), jax.random.key_data(many)[:2]
  )
