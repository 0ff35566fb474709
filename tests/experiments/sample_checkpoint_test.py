"""The chat with a published folder: what is asked, shown, and refused."""

import functools
import io
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

import rlm
from experiments import launch, sample
from experiments.sample_checkpoint import styled
from experiments.terminal import loading_bar
from rlm.checkpoint.convert import import_published
from rlm.data.tokenizer import BOS, EOS
from rlm.sampling import answering
from rlm.sampling.generation_config import (
  GenerationConfig,
  read_generation_config,
)
from tests.data.published_folder import V3, write_json, write_qwen
from tests.experiments.sample_test import typed, write_run
from tests.experiments.tiny_published import (
  CONTEXT,
  write_deepseek,
  write_weights,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """In the style of DeepSeek-R1: the prompt opens thinking."""
  root = tmp_path_factory.mktemp("published") / "r1"
  return write_deepseek(root, do_sample=True, temperature=0.7, top_p=0.9)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return write_deepseek(tmp_path_factory.mktemp("published") / "base", None)


def run(monkeypatch, *args):
  monkeypatch.setattr(launch, "keep_compiled", lambda workdir: None)
  values = sample.define_flags()
  launch.command(sample.body, sample.__doc__, values, ["sample", *args])


class Script:
  """Answers in place of the model; what it was asked is kept.

  Attributes:
    asked: prompts as text.
  """

  def __init__(self, monkeypatch, *answers):
    self.asked = []
    self._answers = list(answers)
    monkeypatch.setattr(answering.Answerer, "stream", self._stream())
    monkeypatch.setattr(answering.Checkpoint, "load", lambda *_: None)

  def _stream(self):
    script = self

    def stream(answerer, ids, key):
      tokenizer = answerer.checkpoint.prompts.tokenizer
      script.asked.append(tokenizer.decode(ids))
      answer = script._answers.pop(0)
      if isinstance(answer, BaseException):
        raise answer
      yield from tokenizer.encode(answer, allow_special=True)

    return stream


def test_prompts_are_answered_by_the_model(folder, monkeypatch, capsys):
  tokens = []
  stream = answering.Answerer.stream

  def watched(answerer, ids, key):
    tokens.extend(ids)
    for token in stream(answerer, ids, key):
      tokens.append(token)
      yield token

  monkeypatch.setattr(answering.Answerer, "stream", watched)
  run(monkeypatch, f"--checkpoint={folder}", "--prompt=hi", "--temperature=0")
  checkpoint = answering.open_checkpoint(folder)
  prompt = checkpoint.prompts.encode_prompt("hi")
  completion = tokens[len(prompt) :]
  assert tokens == prompt + completion
  # Each is the likeliest of those that have a text, to the context's end.
  assert len(tokens) == CONTEXT
  model, variables = rlm.load_checkpoint(folder)
  used = checkpoint.cfg.n_vocab_used
  assert used < model.cfg.n_vocab_used
  logits = model.logits(variables, np.array([tokens]))
  logits = np.asarray(logits)[0, len(prompt) - 1 : -1, :used]
  chosen = logits[np.arange(len(completion)), completion]
  np.testing.assert_allclose(chosen, logits.max(axis=1), atol=1e-4)

  tokenizer = checkpoint.prompts.tokenizer
  pieces = styled(tokenizer, iter(completion), (), True)
  expected = "".join(text for text, _ in pieces)
  out = capsys.readouterr().out
  assert out == expected + f"\n(cut: the context of {CONTEXT} is full)\n"


def test_a_conversation_goes_on_by_the_template(folder, monkeypatch, capsys):
  script = Script(
    monkeypatch, f"hm</think>four{EOS}", f"so</think>five{EOS}", f"six{EOS}"
  )
  typed(monkeypatch, "2+2?", "", "and <｜User｜>?", "/new", "3+3?")
  run(monkeypatch, f"--checkpoint={folder}", "--system=Be brief.")
  # R1's template strips the thinking itself, and opens the next one.
  first = f"{BOS}Be brief.<｜User｜>2+2?<｜Assistant｜>"
  assert script.asked == [
    f"{first}<think>\n",
    f"{first}four{EOS}<｜User｜>and <｜User｜>?<｜Assistant｜><think>\n",
    f"{BOS}Be brief.<｜User｜>3+3?<｜Assistant｜><think>\n",
  ]
  out = capsys.readouterr().out
  assert "/new starts a new conversation, Ctrl-D ends." in out
  assert "hmfour\n" in out and "(a new conversation)" in out
  assert EOS not in out
  assert "(cut" not in out


def test_past_thinking_reaches_the_template_whole(tmp_path, monkeypatch):
  keeps = V3.replace(
    "{{ '<｜Assistant｜>' }}{% endif", "{{ '<｜Assistant｜><think>' }}{% endif"
  )
  assert keeps != V3
  folder = write_deepseek(tmp_path / "keeps", keeps)
  script = Script(monkeypatch, f"hm</think>four{EOS}", f"x{EOS}")
  typed(monkeypatch, "2+2?", "more")
  run(monkeypatch, f"--checkpoint={folder}")
  said = "<｜Assistant｜><think>hm</think>four"
  assert f"{said}{EOS}<｜User｜>more" in script.asked[1]


def test_thinking_is_dimmed_and_escapes_are_spelt_out(folder):
  tokenizer = answering.open_checkpoint(folder).prompts.tokenizer
  tokens = tokenizer.encode(f"é<</think>\x1b[2J<b{EOS}", allow_special=True)
  stops = tokenizer.eos_ids
  for inside, style in ((True, "dim"), (False, "")):
    shown = {"dim": "", "": ""}
    for text, kind in styled(tokenizer, iter(tokens), stops, inside):
      shown[kind] += text
    answer = "\\x1b[2J<b"
    if inside:
      assert shown == {"dim": "é<", "": answer}
    else:
      assert shown == {"dim": "", "": f"é<</think>{answer}"}
    assert style in shown


def test_a_full_context_is_told_and_the_chat_goes_on(
  folder, monkeypatch, capsys
):
  long = "cat " * 40
  script = Script(monkeypatch, f"a{EOS}", "b", f"c{EOS}")
  typed(monkeypatch, long * 9, "hi", long * 2, "then", "/new", "hi")
  run(monkeypatch, f"--checkpoint={folder}", "--max_new_tokens=1")
  out = capsys.readouterr().out
  before, first, rest = out.partition("has no room to answer. Shorten it.\n")
  assert first and f"the model's context of {CONTEXT} has" in f"{before}{first}"
  # Nothing was said yet: a new conversation would not help.
  assert "(/new starts a new conversation.)" not in rest.splitlines()[0]
  assert "has no room to answer. Shorten it.\n(/new starts a new" in rest
  assert "(cut after 1 tokens: --max_new_tokens)" in rest
  assert [text.count("<｜User｜>") for text in script.asked] == [1, 2, 1]


def test_ctrl_c_stops_an_answer_and_forgets_its_turn(
  folder, monkeypatch, capsys
):
  script = Script(monkeypatch, KeyboardInterrupt(), f"b{EOS}")
  typed(monkeypatch, "first", "second", KeyboardInterrupt())
  run(monkeypatch, f"--checkpoint={folder}")
  assert "(stopped; this turn is left out" in capsys.readouterr().out
  assert "first" not in script.asked[1] and "second" in script.asked[1]


def test_a_base_model_continues_text(base, monkeypatch, capsys):
  script = Script(monkeypatch, f" sat{EOS}", f" mat{EOS}")
  typed(monkeypatch, "The cat", "The")
  run(monkeypatch, f"--checkpoint={base}")
  assert script.asked == [f"{BOS}The cat", f"{BOS}The"]
  assert "It continues each prompt as text." in capsys.readouterr().out
  with pytest.raises(SystemExit):
    run(monkeypatch, f"--checkpoint={base}", "--system=x", "--prompt=y")
  assert "has no chat template" in capsys.readouterr().err


def test_a_qwen_folder_without_bos_and_with_two_ends(tmp_path, monkeypatch):
  folder = tmp_path / "qwen"
  write_weights(folder, eos_token_id=(7,))
  write_qwen(folder)
  checkpoint = answering.open_checkpoint(folder)
  assert len(checkpoint.stop_tokens) == 3  # config.json's, too
  script = Script(monkeypatch, "b<|endoftext|>", "c<|im_end|>")
  typed(monkeypatch, "a", "b")
  run(monkeypatch, f"--checkpoint={folder}")
  assert script.asked[1] == (
    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
  )


def test_a_run_and_a_converted_folder(folder, tmp_path, monkeypatch):
  write_run(tmp_path / "run")
  script = Script(
    monkeypatch, "<think>x</think><answer>y", f"<answer>{EOS}", f"z{EOS}"
  )
  typed(monkeypatch, "ab", "c")
  run(monkeypatch, f"--checkpoint={tmp_path / 'run'}", "--system=s")
  start = f"{BOS}s<｜User｜>ab<｜Assistant｜>"
  said = f"<think>x</think><answer>y{EOS}"  # though it was cut
  assert script.asked == [start, f"{start}{said}<｜User｜>c<｜Assistant｜>"]
  monkeypatch.undo()
  import_published(folder, tmp_path / "converted")
  for name in (folder, tmp_path / "converted", tmp_path / "run"):
    checkpoint = answering.open_checkpoint(name, dtype="bfloat16")
    assert checkpoint.prompts.encode_prompt("hi")
    params = checkpoint.load()["params"]
    assert jax.tree.leaves(params)[0].dtype == "bfloat16"


def test_settings_come_from_flags_then_the_file_then_r1(folder, tmp_path):
  def sampling(*args, folder=folder):
    values = sample.define_flags()
    values(["sample", f"--checkpoint={folder}", *args])
    found = sample.make_sampling(values, read_generation_config(folder))
    return found.temperature, found.top_p, found.top_k

  assert sampling() == (0.7, 0.9, 0)
  assert sampling("--temperature=0", "--top_k=3") == (0.0, 0.9, 3)
  assert sampling(folder=tmp_path) == (0.6, 0.95, 0)
  write_json(
    tmp_path,
    "generation_config.json",
    do_sample=False,
    top_k=20,
    repetition_penalty=1.05,
    min_p=None,
  )
  assert sampling(folder=tmp_path) == (0.0, 0.95, 20)
  assert sampling("--temperature=1", folder=tmp_path) == (1.0, 0.95, 20)
  config = read_generation_config(tmp_path)
  assert config == GenerationConfig(0.0, 0.95, 20, ("repetition_penalty=1.05",))
  write_json(tmp_path, "generation_config.json", temperature="hot")
  with pytest.raises(ValueError, match="temperature='hot' is no number"):
    read_generation_config(tmp_path)


def test_loading_shows_a_bar_on_a_terminal(folder):
  shown, seen = {}, []

  def both(on_read, done, total):
    on_read(done, total)
    seen.append(done / total)

  for terminal in (True, False):
    console = Console(
      file=io.StringIO(), force_terminal=terminal, width=120, color_system=None
    )
    with loading_bar(console) as on_read:
      checkpoint = answering.open_checkpoint(folder)
      checkpoint.load(functools.partial(both, on_read))
    shown[terminal] = console.file.getvalue()
  half = len(seen) // 2
  assert seen[:half] == seen[half:] == sorted(seen[:half])
  assert seen[-1] == 1
  assert "loading" in shown[True] and "100%" not in shown[False]
  assert not shown[False].strip()


def test_mistakes_are_told_before_jax_is_imported(folder, tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"prompt": "a"}\n')
  batch = [f"--prompts={prompts}", f"--output={tmp_path / 'out'}"]
  ours = f"--checkpoint={folder}"
  cases = [
    ([ours, "--workdir=x"], "both name a model"),
    (["--checkpoint=none-such"], "there is no such folder with a config.json"),
    ([ours, "--stage=rl"], "--stage does not go with --checkpoint"),
    (["--workdir=x", *batch], "--output does not go with --workdir"),
    (["--workdir=x", "--system=s"], "--system does not go with --workdir"),
    ([ours, "--prompt= "], "--prompt is empty"),
    ([ours, "--dtype=float16"], "not one of float32 and bfloat16"),
    ([ours, "--temperature=-1"], "temperature=-1.0 must be at least 0"),
    ([ours, "--seed=-1"], "--seed=-1 must lie in"),
    ([ours, "--max_new_tokens=0"], "must be at least 1"),
    ([ours, batch[0]], "--prompts and --output go together"),
    ([ours, batch[1]], "--prompts and --output go together"),
    ([ours, "--slots=2"], "--slots goes with --prompts"),
    ([ours, *batch, "--slots=0"], "--slots=0 must be at least 1"),
    ([ours, *batch, "--prompt=a"], "--prompt does not go with --prompts"),
    ([ours, "--prompts=none", batch[1]], "there is no such file"),
    ([ours, batch[0], f"--output={tmp_path}"], "is a folder. Name a file"),
    ([ours, batch[0], f"--output={prompts}"], "is the file of --prompts"),
  ]
  program = (
    "import json, sys; from experiments import launch, sample\n"
    "for args in json.loads(sys.argv[1]):\n"
    "  try: launch.command(sample.body, sample.__doc__,"
    " sample.define_flags(), ['sample', *args])\n"
    "  except SystemExit as stop: print(stop.code, 'jax' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program, json.dumps([args for args, _ in cases])],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == "2 False\n" * len(cases), done.stderr
  said = [line for line in done.stderr.splitlines() if "error: " in line]
  for line, (_, message) in zip(said, cases, strict=True):
    assert message in line


def remove_tokenizer(folder):
  (folder / "tokenizer.json").unlink()


def make_recipe(folder):
  write_json(folder, "config.json", order=["rl"])


def make_run(folder):
  write_json(folder, "config.json", model={})


def shrink_vocabulary(folder):
  config = json.loads((folder / "config.json").read_text())
  write_json(folder, "config.json", **(config | {"vocab_size": 300}))


def break_template(folder):
  (folder / "chat_template.jinja").write_text("{% if %}")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (remove_tokenizer, "no file .*tokenizer.json"),
    (make_recipe, "is a recipe's folder. Name one of its stages: .*rl"),
    (make_run, "has no 'tokenizer': it is no published model's folder"),
    (shrink_vocabulary, "has 309 ids and the model vocab_size=300"),
    (break_template, "is no Jinja that can be read"),
  ],
)
def test_folders_that_cannot_be_asked(
  tmp_path, monkeypatch, capsys, change, message
):
  folder = write_deepseek(tmp_path / "folder")
  change(folder)
  with pytest.raises(SystemExit) as stopped:
    run(monkeypatch, f"--checkpoint={folder}", "--prompt=a")
  assert stopped.value.code == 2
  assert re.search(message, capsys.readouterr().err)
