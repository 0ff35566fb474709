"""The chat: which model answers, what is shown, what is said of it."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import launch, sample, sample_run
from rlm.checkpoint.manager import CheckpointManager
from rlm.data.r1_chat import R1Chat
from rlm.data.tokenizer import ByteTokenizer
from rlm.parallel.config import replicas
from rlm.sampling.config import SamplingConfig
from rlm.sampling.sampler import Sampler
from rlm.tasks.registry import make_task
from tests.tiny_model import tiny_model

TOKENIZER = ByteTokenizer()
CHAT = R1Chat(TOKENIZER)
TASK = dict(
  name="column_addition",
  heldout_fraction=0.1,
  letters="abcdefgh",
  forget_carry=0.0,
  slip=0.0,
)
PROMPT, ANSWER = "e89d51c71b77?", "f1e7d6c9b4"
STEPS = "b770=14c711=09d510=06e890=17"


def model_and_variables():
  return tiny_model(
    vocab_size=272,
    n_vocab_used=268,
    num_hidden_layers=1,
    num_nextn_predict_layers=0,
    max_position_embeddings=48,
  )


def write_run(folder, **config):
  """A run's folder with random weights, as a training stage leaves it."""
  model, variables = model_and_variables()
  folder.mkdir(parents=True)
  config = dict(
    tokenizer="bytes", model=dataclasses.asdict(model.cfg), **config
  )
  (folder / "config.json").write_text(json.dumps(config))
  with CheckpointManager(folder / "checkpoints", keep=1) as manager:
    manager.save(1, {"step": jnp.int32(1), "variables": variables})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
  """A recipe's folder: two trained stages, one without weights, one to come."""
  root = tmp_path_factory.mktemp("recipe")
  write_run(root / "pretrain", tasks={"column_addition": TASK})
  write_run(root / "rl", task=TASK, curriculum=dict(levels=[2, 3, 4]))
  (root / "rejection").mkdir()
  order = ["pretrain", "rl", "rejection", "distill"]
  (root / "config.json").write_text(json.dumps(dict(order=order)))
  return root


def run(monkeypatch, *args):
  monkeypatch.setattr(launch, "keep_compiled", lambda workdir: None)
  values = sample.define_flags()
  launch.command(sample.body, sample.__doc__, values, ["sample", *args])


def typed(monkeypatch, *lines):
  """Replaces the keyboard; an exception in place of a line is raised."""
  queue = [*lines, EOFError()]

  def read(prompt):
    line = queue.pop(0)
    if isinstance(line, BaseException):
      raise line
    return line

  monkeypatch.setattr("builtins.input", read)


# Which model answers ---------------------------------------------------------


def test_the_last_stage_with_weights_or_the_one_asked_for(recipe):
  assert sample_run.find_run(recipe, None) == recipe / "rl"
  assert sample_run.find_run(recipe, "pretrain") == recipe / "pretrain"
  assert sample_run.find_run(recipe / "rl", None) == recipe / "rl"


def test_folders_that_cannot_answer(recipe, tmp_path):
  (tmp_path / "new").mkdir()
  (tmp_path / "new" / "config.json").write_text('{"order": ["a", "b"]}')
  (tmp_path / "young").mkdir()
  (tmp_path / "young" / "config.json").write_text("{}")
  for workdir, stage, message in (
    (tmp_path / "none", None, "there is no such folder"),
    (tmp_path, None, "holds no config.json"),
    (tmp_path / "young", None, "holds no checkpoint yet"),
    (tmp_path / "new", None, "none of its stages a, b has a checkpoint"),
    (recipe, "rejection", "no such stage with .* It has pretrain, rl"),
    (recipe, "pretrian", "did you mean 'pretrain'"),
    (recipe / "rl", "rl", "is one run, without stages. Leave --stage out"),
  ):
    with pytest.raises(ValueError, match=message):
      sample_run.find_run(str(workdir), stage)


def test_help_and_mistakes_do_not_import_jax(tmp_path):
  program = (
    "import sys; from experiments import launch, sample\n"
    "try: launch.command(sample.body, sample.__doc__, sample.define_flags(),"
    " sys.argv)\n"
    "except SystemExit as stop: print('code', stop.code)\n"
    "print('jax' in sys.modules)"
  )
  for args, expected in (
    (["--help"], "False"),
    ([], "code 2\nFalse"),
    (["--workdir=none-such"], "code 2\nFalse"),
    ([f"--workdir={tmp_path}", "--prompt= "], "code 2\nFalse"),
  ):
    done = subprocess.run(
      [sys.executable, "-c", program, *args],
      capture_output=True,
      text=True,
      check=True,
    )
    assert done.stdout.endswith(expected + "\n"), done.stderr
  assert "--prompt is empty" in done.stderr


# What is shown ---------------------------------------------------------------


def merged(pieces):
  """Neighbouring pieces of one style joined."""
  out = []
  for text, style in pieces:
    if text and out and out[-1][1] == style:
      out[-1] = (out[-1][0] + text, style)
    elif text:
      out.append((text, style))
  return out


def test_thinking_is_dimmed_and_the_answer_is_not():
  tokens = CHAT.encode_response("2+2=4 é", "4")
  assert merged(sample_run.styled(TOKENIZER, tokens)) == [
    ("<think>2+2=4 é</think><answer>", "dim"),
    ("4", ""),
    ("</answer>", "dim"),
  ]


def test_control_characters_are_spelt_out():
  text = "\x1b[31mred\r\x07\u202eabc\n\tkept"
  shown = merged(sample_run.styled(TOKENIZER, TOKENIZER.encode(text)))
  assert shown == [("\\x1b[31mred\\x0d\\x07\\u202eabc\n\tkept", "")]


def test_half_a_character_is_shown_when_it_is_cut():
  tokens = TOKENIZER.encode("aé")[:-1]
  assert merged(sample_run.styled(TOKENIZER, tokens)) == [("a\ufffd", "")]
  tokens = [*tokens, TOKENIZER.end_think_id]
  assert merged(sample_run.styled(TOKENIZER, tokens)) == [
    ("a\ufffd", ""),
    ("</think>", "dim"),
  ]


@pytest.mark.parametrize(
  ("prompt", "thinking", "answer", "finished", "expected"),
  [
    (PROMPT, STEPS, ANSWER, True, "right, and so are the steps"),
    (PROMPT, "", ANSWER, True, "right, by wrong steps"),
    (PROMPT, STEPS, "f1", True, f"wrong; right is {ANSWER}"),
    (PROMPT, STEPS, ANSWER, False, "no answer in the format; right is f1e7d6"),
    (PROMPT, STEPS, "<answer>", True, "no answer in the format"),
    ("How are you?", STEPS, ANSWER, True, ""),
  ],
)
def test_the_verdict(prompt, thinking, answer, finished, expected):
  task = make_task(TASK)
  text = f"<think>{thinking}</think><answer>{answer}</answer>"
  said = sample_run.verdict(task, prompt, text, finished)
  assert said.startswith(expected) and bool(said) == bool(expected)
  assert sample_run.verdict(None, prompt, text, finished) == ""


def test_an_example_is_held_out_and_of_a_level_that_was_trained():
  task = make_task(TASK)
  config = {"curriculum": {"levels": [5, 6]}, "data": {"a": {"levels": [7]}}}
  for i in range(5):
    problem = sample_run.example_problem(task, config, i)
    assert problem.level == 6
    assert task.is_heldout(problem)
  assert sample_run.example_problem(task, {}, 0).level in task.levels
  everything = make_task({**TASK, "heldout_fraction": 0.0})
  assert sample_run.example_problem(everything, config, 0).level == 6


def test_one_prompt_is_answered_and_checked(recipe, monkeypatch, capsys):
  run(monkeypatch, f"--workdir={recipe}", "--temperature=0", "--prompt=b12a34?")
  out = capsys.readouterr().out
  model, variables = model_and_variables()
  sampling = SamplingConfig(
    temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=16
  )
  sampler = Sampler(
    model,
    sampling,
    slots=1,
    prompt_length=32,
    mesh=replicas(1),
    eos_token=257,
    pad_token=258,
  )
  tokens = CHAT.encode_prompt("b12a34?")
  drawn = sampler.generate(
    variables, [tokens], jax.random.split(jax.random.key(0), 1)
  )
  tokens = drawn.tokens[0, : drawn.lengths[0]].tolist()
  shown = "".join(text for text, _ in sample_run.styled(TOKENIZER, tokens))
  flat = "".join(out.split())
  assert flat.startswith("".join(shown.split()))
  # 13 + 24 = 37.
  assert flat.endswith("rightisc0b3a7)")


def test_a_conversation(recipe, monkeypatch, capsys):
  typed(monkeypatch, "", "x" * 60, "Hello?", "Hello?")
  run(monkeypatch, f"--workdir={recipe}", "--stage=pretrain", "--seed=3")
  out = capsys.readouterr().out
  assert out.startswith(f"{recipe}/pretrain answers.")
  examples = [line for line in out.splitlines() if "It learned" in line]
  assert len(set(examples)) == 2  # at the start, and for the empty line
  before, refusal, answers = out.partition("Shorten the prompt.\n")
  assert refusal and before.endswith(
    "error: the prompt has 63 tokens with its markers; the model's context of"
    " 48 has no room to answer. "
  )
  first, second = re.findall("(.+?)\\(cut after 16 tokens\\)", answers, re.S)
  assert first != second  # draws differ from turn to turn


def test_ctrl_c_stops_an_answer_and_then_the_chat(recipe, monkeypatch, capsys):
  def interrupted(self, prompt, turn):
    yield TOKENIZER.think_id
    raise KeyboardInterrupt

  monkeypatch.setattr(sample_run.Chat, "answer", interrupted)
  typed(monkeypatch, "Hello?", KeyboardInterrupt())
  run(monkeypatch, f"--workdir={recipe}")
  assert "<think>(stopped)" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--temperature=-1", "temperature=-1.0 must be at least 0"),
    ("--top_p=2", r"top_p=2.0 must lie in \(0, 1\]"),
    (f"--prompt={'x' * 60}", "Shorten the prompt"),
  ],
)
def test_mistakes_are_told(recipe, monkeypatch, capsys, flag, message):
  with pytest.raises(SystemExit) as stopped:
    run(monkeypatch, f"--workdir={recipe}", "--prompt=a?", flag)
  assert stopped.value.code == 2
  assert re.search(message, capsys.readouterr().err)
