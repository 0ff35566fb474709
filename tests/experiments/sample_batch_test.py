"""A file of prompts is answered line by line, whatever interrupts it."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import pytest

from experiments import launch, sample
from rlm.sampling import answering
from rlm.sampling.completions_file import CompletionsFile
from rlm.sampling.config import SamplingConfig
from rlm.sampling.prompts_file import ADDED, read_requests
from tests.experiments.tiny_published import CONTEXT, write_deepseek

SLOTS, SEED, LONGEST = 2, 5, 40
# Many ids end a completion, so that lengths differ.
ENDS = [*range(8), 302]

pytestmark = pytest.mark.usefixtures("quick_compilation")

INPUT = [
  {"id": 0, "prompt": "the cat 東京"},
  {"messages": [{"role": "user", "content": "mat"}], "extra": [1.5, None]},
  {"prompt_ids": [301, 5, 6], "note": "<think>\u2028"},
  {"prompt_ids": [301, *range(90)]},  # leaves less room than LONGEST
  *({"prompt": f"cat {i}"} for i in range(7)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("published") / "r1"
  return write_deepseek(root, eos_token_id=ENDS)


def write_lines(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  return write_lines(tmp_path_factory.mktemp("in") / "prompts.jsonl", INPUT)


def command(folder, prompts, output, *args):
  return [
    f"--checkpoint={folder}",
    f"--prompts={prompts}",
    f"--output={output}",
    f"--slots={SLOTS}",
    f"--seed={SEED}",
    f"--max_new_tokens={LONGEST}",
    *args,
  ]


def run(*args):
  values = sample.define_flags()
  launch.command(sample.body, sample.__doc__, values, ["sample", *args])


def refused(capsys, *args):
  """What a command says that exits with code 2."""
  with pytest.raises(SystemExit) as stopped:
    run(*args)
  assert stopped.value.code == 2
  return capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(folder, prompts, tmp_path_factory):
  """The output of a run that nothing interrupted."""
  output = tmp_path_factory.mktemp("whole") / "new" / "out.jsonl"
  run(*command(folder, prompts, output))
  return output


def copy_of(whole, folder, size):
  """An output, cut after some bytes, with its settings."""
  output = folder / "out.jsonl"
  output.write_bytes(whole.read_bytes()[:size])
  settings = pathlib.Path(f"{whole}.settings.json").read_bytes()
  pathlib.Path(f"{output}.settings.json").write_bytes(settings)
  return output


def test_lines_are_the_inputs_and_their_completions(folder, whole):
  lines = [json.loads(line) for line in whole.read_bytes().splitlines()]
  text_of = answering.open_checkpoint(folder).prompts.tokenizer.decode
  reasons = set()
  for given, line in zip(INPUT, lines, strict=True):
    assert list(line) == [*given, *ADDED]
    assert given.items() <= line.items()
    ids, stopped = line["completion_ids"], line["finish_reason"] == "stop"
    assert stopped == (ids[-1] in ENDS)
    assert not set(ids[:-1]) & set(ENDS)
    assert line["completion"] == text_of(ids[:-1] if stopped else ids)
    # The prompt opens thinking, except where it was given as ids.
    text = "answer" if "prompt_ids" in given else "thinking"
    if "</think>" not in line["completion"] and "<think>" not in text:
      assert line[text] == line["completion"]
    reasons.add((line["finish_reason"], len(ids)))
  assert {"stop", "length"} == {reason for reason, _ in reasons}
  assert len(reasons) > 3
  assert {("length", LONGEST), ("length", CONTEXT - 91)} <= reasons


def test_a_line_depends_on_its_number_alone(folder, prompts, whole):
  checkpoint = answering.open_checkpoint(folder)
  requests = read_requests(prompts, checkpoint)
  sampling = SamplingConfig(
    temperature=0.6, top_p=0.95, top_k=0, max_new_tokens=LONGEST
  )
  answerer = answering.Answerer(checkpoint, checkpoint.load(), sampling)
  sampler = answerer.make_sampler(
    slots=SLOTS,
    prompt_length=answering.batch_prompt_length(
      max(len(request.ids) for request in requests)
    ),
    longest=CONTEXT - 3,
  )
  lines = [json.loads(line) for line in whole.read_bytes().splitlines()]
  for i in (0, 3, 9):
    key = jax.random.fold_in(jax.random.key(SEED), i)
    [(ids, reason)] = answerer.complete(sampler, [requests[i].ids], key[None])
    assert (lines[i]["completion_ids"], lines[i]["finish_reason"]) == (
      ids,
      reason,
    )
    assert len(requests[i].ids) + len(ids) <= CONTEXT


def test_what_was_cut_anywhere_is_continued_to_the_bit(
  folder, prompts, whole, tmp_path, capsys
):
  data = whole.read_bytes()
  ends = [match.end() for match in re.finditer(b"\n", data)]
  for size in (7, ends[0], ends[2] + 30, ends[8] - 1, len(data)):
    output = copy_of(whole, tmp_path, size)
    run(*command(folder, prompts, output))
    assert output.read_bytes() == data
    assert f"{output} is finished: {len(INPUT)} lines." in (
      capsys.readouterr().out
    )


def test_a_finished_output_needs_no_weights(
  folder, prompts, whole, monkeypatch
):
  monkeypatch.delattr(answering.Checkpoint, "load")
  before = whole.stat().st_mtime_ns
  run(*command(folder, prompts, whole))
  assert whole.stat().st_mtime_ns == before


def test_sigterm_stops_after_a_part(
  folder, prompts, whole, tmp_path, monkeypatch, capsys
):
  append = CompletionsFile.append

  def stopped(self, records):
    append(self, records)
    os.kill(os.getpid(), signal.SIGTERM)

  output = tmp_path / "out.jsonl"
  with monkeypatch.context() as patch:
    patch.setattr(CompletionsFile, "append", stopped)
    run(*command(folder, prompts, output))  # exit code 0
  assert (
    f"sampling into {output} (8 of 11 lines) stopped and is saved. The same"
    " command continues it." in capsys.readouterr().out
  )
  assert output.read_bytes().count(b"\n") == 8
  run(*command(folder, prompts, output))
  assert output.read_bytes() == whole.read_bytes()


def test_kill_9_in_the_middle_of_a_line(folder, prompts, whole, tmp_path):
  program = (
    "import os, sys\n"
    "from experiments import launch, sample\n"
    "from rlm.sampling import completions_file as c\n"
    "def append(self, records):\n"
    "  data = b''.join(map(c.json_line, records))\n"
    "  self._file.write(data[:-20]); os.kill(os.getpid(), 9)\n"
    "c.CompletionsFile.append = append\n"
    "launch.command(sample.body, '', sample.define_flags(), sys.argv)"
  )
  output = tmp_path / "out.jsonl"
  done = subprocess.run(
    [sys.executable, "-c", program, *command(folder, prompts, output)],
    # As the tests: other devices are warned of, and other programs round
    # otherwise.
    env={
      **os.environ,
      "JAX_NUM_CPU_DEVICES": "8",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert output.read_bytes().count(b"\n") == 4 * SLOTS - 1
  run(*command(folder, prompts, output))
  assert output.read_bytes() == whole.read_bytes()


def test_another_machine_is_warned_of(folder, prompts, whole, tmp_path):
  output = copy_of(whole, tmp_path, -30)
  path = pathlib.Path(f"{output}.settings.json")
  record = json.loads(path.read_text())
  record["environment"]["device_kind"] = "abacus"
  path.write_text(json.dumps(record))
  with pytest.warns(UserWarning, match="device_kind: 'abacus' -> 'cpu'"):
    run(*command(folder, prompts, output))


def test_an_output_of_something_else_is_refused(
  folder, prompts, whole, tmp_path, capsys
):
  output = copy_of(whole, tmp_path, -30)
  before = output.read_bytes()
  ours = command(folder, prompts, output)
  for other in ("--seed=6", "--slots=3", "--temperature=0", "--dtype=bfloat16"):
    said = refused(capsys, *ours, other)
    assert "was begun with other settings; before -> now:" in said
  assert "model.dtype: 'float32' -> 'bfloat16'" in said

  other = write_lines(tmp_path / "other.jsonl", [*INPUT[:-1], {"prompt": "a"}])
  said = refused(capsys, *command(folder, other, output))
  assert "prompts: " in said
  # Equal prompts, but other keys beside them.
  other = write_lines(tmp_path / "o.jsonl", [INPUT[0] | {"id": 9}, *INPUT[1:]])
  said = refused(capsys, *command(folder, other, output))
  assert "out.jsonl:1: does not belong to this line of the input" in said

  first = before.index(b"\n") + 1
  output.write_bytes(before[: first + 9] + b"\n" + before[first + 9 :])
  assert "out.jsonl:2: is no JSON object" in refused(capsys, *ours)
  output.write_bytes(whole.read_bytes() + b"{}\n")
  assert "has more lines than the input" in refused(capsys, *ours)
  output.write_bytes(before)
  settings = pathlib.Path(f"{output}.settings.json")
  settings.write_text("{}")
  assert "holds no settings of it" in refused(capsys, *ours)
  settings.unlink()
  assert "exists without out.jsonl.settings.json" in refused(capsys, *ours)
  assert output.read_bytes() == before


def test_other_weights_are_refused(
  folder, prompts, whole, tmp_path, monkeypatch, capsys
):
  load = answering.Checkpoint.load

  def changed(self, on_read):
    return jax.tree.map(lambda x: x + 1, load(self, on_read))

  monkeypatch.setattr(answering.Checkpoint, "load", changed)
  output = copy_of(whole, tmp_path, -30)
  said = refused(capsys, *command(folder, prompts, output))
  assert re.search(r"weights: '\w+' -> '\w+'", said)
  # Only what a kill had torn was dropped.
  assert output.read_bytes() == whole.read_bytes()[: len(output.read_bytes())]


def test_two_processes_do_not_write_one_file(whole, tmp_path):
  output = copy_of(whole, tmp_path, 0)
  program = (
    "import sys; from rlm.sampling.completions_file import CompletionsFile\n"
    "try: CompletionsFile(sys.argv[1], [], {})\n"
    "except ValueError as error: print(error)"
  )
  with CompletionsFile(output, [], {}):
    done = subprocess.run(
      [sys.executable, "-c", program, str(output)],
      capture_output=True,
      text=True,
      check=True,
    )
  assert "is being written by another process" in done.stdout


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{}", "one of prompt, messages, prompt_ids is needed; the line has none"),
    ('{"prompt": "a", "prompt_ids": [1]}', "has prompt and prompt_ids"),
    ('{"prompt": " "}', "is no text, or an empty one"),
    ('{"prompt": "a", "answer": "b"}', "the line has answer, which its"),
    ('{"prompt": "\\ud800"}', "half a surrogate pair"),
    ('{"prompt": "a", "b": "\\ud800"}', "half a surrogate pair"),
    ('{"messages": "a"}', "messages must be a list"),
    ('{"messages": [{"content": "a"}]}', "message 0 is no object with a text"),
    ('{"prompt_ids": [1.5]}', "is no list of token ids"),
    ('{"prompt_ids": []}', "the prompt has no tokens"),
    ('{"prompt_ids": [309]}', r"an id outside 0..308"),
    ('{"prompt": "%s"}' % ("x" * 99), "context of 96 has no room to answer"),
    ('{"prompt": "a"', "invalid JSON at column"),
    ("[1]", "expected an object"),
  ],
)
def test_bad_lines_are_told_before_the_weights_are_read(
  folder, tmp_path, monkeypatch, capsys, line, message
):
  monkeypatch.delattr(answering.Checkpoint, "load")
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
  said = refused(capsys, *command(folder, prompts, tmp_path / "out.jsonl"))
  assert f"{prompts}:3: " in said and re.search(message, said)
  assert not (tmp_path / "out.jsonl").exists()
