"""The whole recipe from one command: what it leaves, says and answers."""

import re
import shlex
import sys

import pytest

from experiments import r1
from rlm.checkpoint import initial
from rlm.checkpoint.manager import restore_variables
from rlm.files import read_json
from rlm.jsonl import read_jsonl
from tests.experiments import shrunk_laptop

STAGES = (
  *("pretrain", "cold_start", "rl", "rejection", "sft", "rl_final"),
  *("student_pretrain", "distill"),
)
EVALUATED = tuple(name for name in STAGES if name != "rejection")
ASKING = ("rl", "rejection", "rl_final")  # stages that sample and verify


def starts(whole):
  """The output of the first start and of the second, after the end."""
  _, done = whole
  first, second, rest = done.stdout.split("none ended with code 0\n")
  assert rest == ""
  return first, second


def test_every_stage_leaves_its_folder(whole):
  root, _ = whole
  for name in STAGES:
    folder = root / name
    assert read_json(folder / "summary.json")["stage"] == name
    assert read_json(folder / "config.json")["stage"] == name
    assert read_json(folder / "run.json")["devices"] == 2  # they share slots
    records = read_jsonl(folder / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(len(records)))
    assert len(read_jsonl(folder / "timing.jsonl")) == len(records)
    assert list((folder / "tensorboard").iterdir())
    if name != "rejection":
      steps = read_json(folder / "summary.json")["steps"]
      assert len(records) == steps
      assert (folder / "checkpoints" / str(steps)).is_dir()
  messages = (root / "rejection" / "messages.jsonl").read_text().splitlines()
  assert 0 < len(messages) == read_json(root / "rejection/summary.json")["kept"]


def test_traces_of_every_stage_can_be_read_back(whole):
  root, _ = whole
  paths = [root / name / "traces" / f"{name}.jsonl" for name in ASKING]
  paths += [
    root / "evaluate" / name / "traces" / f"{name}.jsonl" for name in EVALUATED
  ]
  for path in paths:
    traces = read_jsonl(path)
    assert traces, path
    for trace in traces:
      assert trace["stage"] == path.stem
      for key in (
        *("step", "task", "level", "prompt", "completion", "rewards"),
        *("correct", "well_formed", "finished", "steps_correct", "answer"),
        *("expected", "identity"),
      ):
        assert key in trace, key


def test_no_stage_trains_on_what_is_evaluated(whole):
  root, _ = whole
  held_out = {
    trace["identity"]
    for name in EVALUATED
    for trace in read_jsonl(
      root / "evaluate" / name / "traces" / f"{name}.jsonl"
    )
  }
  drawn = {
    trace["identity"]
    for name in ASKING
    for trace in read_jsonl(root / name / "traces" / f"{name}.jsonl")
  }
  assert held_out and drawn and not held_out & drawn


def test_the_summary_holds_what_was_promised(whole):
  root, _ = whole
  summary = read_json(root / "summary.json")
  assert [stage["name"] for stage in summary["stages"]] == list(STAGES)
  for stage in summary["stages"]:
    assert stage["seconds"] > 0 and stage["tokens"] > 0
    if stage["name"] == "rejection":
      assert stage["pass_at_1"] is stage["maj_at_8"] is None
      continue
    evaluated = read_json(root / "evaluate" / stage["name"] / "summary.json")
    for name in (
      "pass_at_1",
      "pass_at_1_given_format",
      "maj_at_8",
      "pass_at_8",
    ):
      assert set(stage[name]) == {"mean", "low", "high", "n"}
      assert stage[name] == evaluated[name]
    assert set(stage["levels"]) == {"2"}
  assert summary["seed"] == 0
  assert summary["seconds_total"] == pytest.approx(
    sum(stage["seconds"] for stage in summary["stages"])
  )
  by_name = {stage["name"]: stage for stage in summary["stages"]}

  def gain(before, after):
    before, after = (by_name[n]["pass_at_1"]["mean"] for n in (before, after))
    return pytest.approx(100 * (after - before))

  assert summary["rl_gain_points"] == gain("cold_start", "rl")
  assert summary["distill"]["gain_points"] == gain(
    "student_pretrain", "distill"
  )
  assert 0 < summary["model"]["activated"] < summary["model"]["total"]


def test_each_stage_starts_from_the_one_its_config_names(whole):
  root, _ = whole
  config = read_json(root / "config.json")
  for name in STAGES:
    source = config["stages"][name]["init_from"]
    if source is not None:
      said = read_json(root / name / "config.json")["init_from"]
      assert said == str(root / source.removeprefix("stage:"))
      assert read_json(root / name / "run.json")["inputs"]["init_from"]


def test_the_first_start_shows_its_way_in_plain_lines(whole):
  first, _ = starts(whole)
  assert "\x1b" not in first  # no terminal
  lines = first.splitlines()
  for name, steps in (("pretrain", 200), ("rl", 6), ("distill", 6)):
    own = [line for line in lines if line.startswith(f"{name}  ")]
    assert own[0].startswith(f"{name}  1/{steps}")
    assert own[-1].startswith(f"{name}  {steps}/{steps}  100%")
    assert re.search(r"in \d+:\d\d$", own[-1])
  for name in EVALUATED:
    assert any(line.startswith(f"evaluate {name}  1/1") for line in lines)
  assert any(line.startswith("rejection  64/64  100%") for line in lines)


def check_takeaway(output, root):
  assert "Held-out accuracy after each stage" in output
  assert re.search(r"Cold start +\d", output)
  assert f"Report: {root / 'report.html'}\n" in output
  assert "Chat with the model just trained:\n  " in output


def test_a_start_ends_with_table_report_and_chat(whole):
  root, done = whole
  for output in starts(whole):
    check_takeaway(output, root)
  assert "Warning" not in done.stderr and "Traceback" not in done.stderr


def test_the_same_command_again_says_that_it_is_finished(whole):
  root, _ = whole
  first, second = starts(whole)
  assert "is finished: its results are in summary.json" not in first
  assert f"{root} is finished: its results are in summary.json" in second
  assert "pretrain" not in second.lower().split("held-out accuracy")[0]
  (start,) = read_json(root / "run.json")["starts"]
  assert "--config=" in " ".join(start["command"])


def times(root):
  """When each file was written last, but for the lock."""
  paths = [path for path in root.rglob("*") if path.name != ".lock"]
  return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.full
def test_another_config_in_its_folder_is_refused(whole):
  root, _ = whole
  files = times(root)
  c = shrunk_laptop.get_config()
  c.seed, c.stages.rl.schedule.peak = 1, 1.0
  with pytest.raises(
    ValueError,
    match=r"(?s)holds a run of another config; recorded -> given:\n"
    r"  seed: 0 -> 1\n  stages\.rl\.schedule\.peak: 0\.001 -> 1\.0\nChoose",
  ):
    r1.run(c, str(root))
  assert times(root) == files


def test_what_changes_no_result_may_change(whole):
  root, _ = whole
  c = shrunk_laptop.get_config()
  c.stages.rl.on_nonfinite = "skip"
  c.stages.pretrain.checkpoint_every_steps = 7
  assert r1.run(c, str(root)) == read_json(root / "summary.json")


def test_the_report_is_one_file_with_every_stage(whole):
  root, _ = whole
  page = (root / "report.html").read_text()
  assert "http://" not in page.replace("http://www.w3.org/", "")
  assert "<script" not in page
  for label in ("Pretraining", "Cold start", "RL", "Distilled student"):
    assert label in page


def test_the_chat_command_that_was_printed_answers(whole, recipes):
  first, _ = starts(whole)
  command = first.split("Chat with the model just trained:\n")[1].split("\n")[0]
  done = recipes.run(
    *shlex.split(command), "--prompt=b12a34?", "--max_new_tokens=34"
  )
  assert done.returncode == 0, done.stderr
  # It learned to begin so; what follows may be right or wrong.
  assert done.stdout.startswith("<think>")
  # The task's rule knows the sum: 12 + 34 in the columns b and a.
  assert "right" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.full
def test_rl_goes_from_the_base_without_a_cold_start(whole, recipes):
  base, zero = whole[0] / "pretrain", recipes.folder / "zero"
  done = recipes.run(
    *(sys.executable, "-m", "experiments.rl"),
    "--config=tests/experiments/shrunk_zero.py",
    *(f"--config.init_from={base}", f"--workdir={zero}"),
  )
  assert done.returncode == 0, done.stderr
  start = initial.digest(restore_variables(base / "checkpoints"))
  assert read_json(zero / "run.json")["inputs"]["init_from"] == start
  assert initial.digest(restore_variables(zero / "checkpoints")) != start
  records = read_jsonl(zero / "metrics.jsonl")
  # What the base knows of the format is enough for a reward.
  assert all(r["accuracy"] > 0 for r in records)
  assert records[0]["ratio/min"] < 1 < records[0]["ratio/max"]
  assert all(r["sampler_diff/max"] < 1e-4 for r in records)
  assert read_json(zero / "summary.json")["updates"] == 4
