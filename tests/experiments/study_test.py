"""The study's plan and its results; stages are stand-ins but for one test."""

import io
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import rich.console

from experiments import (
  distill,
  evaluate,
  pretrain,
  r1,
  reject,
  rl,
  sft,
  study,
)
from rlm import files, stopping
from rlm.report import html

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "configs/r1/laptop.py")
# pass@1 of seed 0; seeds lie 0.01 apart, RL and the student's RL further.
ACCURACY = {
  "pretrain": 0.05,
  "cold_start": 0.3,
  "rl": 0.8,
  "sft": 0.7,
  "rl_final": 0.85,
  "student_pretrain": 0.02,
  "distill": 0.6,
  "sft_control": 0.4,
  "sft_verified": 0.9,
  "student_rl": 0.55,
}


def config(**changes):
  return (
    dict(
      recipe=RECIPE,
      recipe_changes=dict(evaluate=dict(slots=8)),
      seeds=(0, 1, 2),
      sft_control=dict(
        data=dict(sources=dict(traces=dict(documents=9, levels=(2, 5))))
      ),
      sft_verified=dict(data=dict(sources=dict(traces=dict(author="clean")))),
      student_rl=dict(schedule=dict(peak=1e-4)),
      confidence=0.95,
    )
    | changes
  )


def measure(mean):
  return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02, "n": 40}


class Stages:
  """Stand-ins for every experiment: they note their config, and cost FLOPs.

  Attributes:
    ran: (seed's folder, stage or evaluate/stage) in order.
    configs: the same -> config.
    die_at: how many may run before one is killed; None for all.
    stop_at: how many run before a signal comes; None for no signal.
  """

  def __init__(self, monkeypatch):
    self.ran, self.configs = [], {}
    self.die_at = self.stop_at = None
    for module in (pretrain, sft, rl, reject, distill):
      monkeypatch.setattr(module, "run", self.stage)
    monkeypatch.setattr(evaluate, "run", self.evaluate)

  def finish(self, c, workdir, summary):
    path = pathlib.Path(workdir)
    parent = path.parent
    home = parent.parent if parent.name == "evaluate" else parent
    name = str(path.relative_to(home))
    if not (path / "summary.json").exists():
      if len(self.ran) == self.die_at:
        raise KeyboardInterrupt
      if len(self.ran) == self.stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
      self.ran.append((home.name, name))
      self.configs[home.name, name] = c
      path.mkdir(parents=True)
      files.write_json(path / "config.json", c)
      files.write_json(path / "summary.json", summary)
    return files.read_json(path / "summary.json")

  def stage(self, c, workdir, *, console=None):
    # A step of SFT costs 1e8, RL 5.55e9 and more with the seed.
    flops = 5.55e9 + 1e9 * c["seed"] if "curriculum" in c else 0.0
    if "steps" in c and not flops:
      flops = 1e8 * c["steps"]
    return self.finish(
      c,
      workdir,
      {
        "stage": c["stage"],
        "steps": c["steps"] if "steps" in c else None,
        "tokens": 100,
        "flops": flops,
        "seconds": 2.0,
        "model": {"total": 10, "activated": 5},
      },
    )

  def evaluate(self, c, workdir, *, console=None):
    name = c["stage"]
    seed = int(pathlib.Path(c["init_from"]).parent.name.removeprefix("seed_"))
    accuracy = ACCURACY[name] + 0.01 * seed * (2 if name == "rl" else 1)
    accuracy += 0.05 * (seed % 2) * (name == "student_rl")
    return self.finish(
      c,
      workdir,
      {
        "stage": name,
        "n_problems": 40,
        "n_samples": 8,
        "pass_at_1": measure(accuracy),
        "pass_at_1_given_format": measure(0.9 * accuracy + 0.1),
        "response_length": measure(40.0 - (name == "rl")),
        "levels": {"2": {"pass_at_1": measure(accuracy)}},
        "levels_trained": [2],
      },
    )


@pytest.fixture
def stages(monkeypatch):
  # Both take seconds; one test each lets them be.
  monkeypatch.setattr(r1, "check_plan", lambda *_: None)
  monkeypatch.setattr(
    html, "write_report", lambda home: pathlib.Path(home) / "report.html"
  )
  return Stages(monkeypatch)


def run(tmp_path, name="study", **changes):
  console = rich.console.Console(file=io.StringIO(), width=100)
  summary = study.run(config(**changes), str(tmp_path / name), console=console)
  return summary, console.file.getvalue()


def test_each_seed_runs_the_recipe_and_then_its_controls(stages, tmp_path):
  run(tmp_path)
  for seed in (0, 1, 2):
    home = f"seed_{seed}"
    ran = [name for folder, name in stages.ran if folder == home]
    assert ran[:2] == ["pretrain", "evaluate/pretrain"]
    assert ran[-6:] == [
      "sft_control",
      "evaluate/sft_control",
      "sft_verified",
      "evaluate/sft_verified",
      "student_rl",
      "evaluate/student_rl",
    ]
    assert stages.configs[home, "rl"]["seed"] == seed
    assert stages.configs[home, "evaluate/rl"]["slots"] == 8


def test_the_controls_are_in_the_report_of_their_seed(monkeypatch, tmp_path):
  Stages(monkeypatch)
  run(tmp_path, seeds=(0,))
  report = (tmp_path / "study" / "seed_0" / "report.html").read_text()
  assert "SFT control" in report and "Student RL" in report


def test_the_sft_control_gets_the_flops_of_rl(stages, tmp_path):
  run(tmp_path)
  start = stages.configs["seed_1", "cold_start"]
  control = stages.configs["seed_1", "sft_control"]
  # RL used 6.55e9 with seed 1, and a step costs 1e8: 65.5 steps, rounded up.
  assert control["steps"] == 66
  assert stages.configs["seed_0", "sft_control"]["steps"] == 56
  assert control["init_from"].endswith("seed_1/cold_start")
  assert start["init_from"].endswith("seed_1/pretrain")
  # The schedule is stretched from 30 steps: 2, 13, 15 times 2.2.
  phases = control["schedule"]["phases"]
  assert [p["steps"] for p in phases] == [4, 29, 33]
  assert [p["factor"] for p in phases] == [
    p["factor"] for p in start["schedule"]["phases"]
  ]
  # Other data, as the study's config says; everything else as it was.
  sources = control["data"]["sources"]["traces"]
  assert sources["documents"] == 9 and sources["levels"] == (2, 5)
  assert start["data"]["sources"]["traces"]["documents"] == 256
  same = set(start) - {"steps", "schedule", "data", "init_from", "stage"}
  assert {k: control[k] for k in same} == {k: start[k] for k in same}
  # Its twin learns from solutions without an error.
  twin = stages.configs["seed_1", "sft_verified"]
  assert twin["steps"] == 66 and twin["schedule"] == control["schedule"]
  assert twin["data"]["sources"]["traces"]["author"] == "clean"
  assert sources["author"] == "noisy"


def test_rl_on_the_student_starts_from_its_pretraining(stages, tmp_path):
  run(tmp_path, seeds=(4,))
  teacher = stages.configs["seed_4", "rl"]
  student = stages.configs["seed_4", "student_rl"]
  assert student["model"] == stages.configs["seed_4", "distill"]["model"]
  assert student["model"] != teacher["model"]
  assert student["init_from"].endswith("seed_4/student_pretrain")
  assert student["steps"] == teacher["steps"]
  assert student["schedule"]["peak"] == 1e-4
  assert student["schedule"]["phases"] == teacher["schedule"]["phases"]


def test_the_comparison_holds_every_seed_and_verdict(stages, tmp_path):
  summary, text = run(tmp_path)
  found = files.read_json(tmp_path / "study" / "comparison.json")
  assert found["seeds"] == [0, 1, 2]
  assert set(found["stages"]) == set(ACCURACY)
  verdicts = {c["name"]: c["verdict"] for c in found["claims"]}
  # RL leads by 0.5, 0.51, 0.52 and lengths fall by one in each seed; the
  # student's RL trails by 0.05, 0, 0.05: half of its interval is 0.072.
  assert verdicts == {
    "rl_raises_accuracy": "holds",
    "rl_beats_sft": "holds",
    "rl_beats_sft_given_format": "holds",
    "rl_beats_verified_sft": "reversed",
    "responses_lengthen": "reversed",
    "distillation_beats_rl": "undecided",
  }
  assert found["costs"]["rl"]["flops"] == {
    "0": 5.55e9,
    "1": 6.55e9,
    "2": 7.55e9,
  }
  assert found["costs"]["sft_control"]["flops"] == {
    "0": 5.6e9,
    "1": 6.6e9,
    "2": 7.6e9,
  }
  assert summary["claims"] == found["claims"]
  assert "the reverse holds here" in text and "comparison.html" in text
  assert (tmp_path / "study" / "comparison.html").exists()


def test_a_study_killed_anywhere_continues_and_repeats_nothing(
  stages, tmp_path
):
  run(tmp_path, "whole", seeds=(0, 1))
  total = len(stages.ran)
  expected = (tmp_path / "whole" / "comparison.json").read_bytes()
  assert total == 2 * (11 + 10)  # of 11 stages, rejection is not asked
  for die_at in (0, 19, 20, total - 1):
    name = f"killed_{die_at}"
    stages.ran.clear()
    stages.die_at = die_at
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path, name, seeds=(0, 1))
    stages.die_at = None
    run(tmp_path, name, seeds=(0, 1))
    assert len(stages.ran) == len(set(stages.ran)) == total
    found = (tmp_path / name / "comparison.json").read_bytes()
    assert found.replace(name.encode(), b"whole") == expected
  stages.ran.clear()
  _, text = run(tmp_path, name, seeds=(0, 1))
  assert not stages.ran and "is finished" in text


@pytest.mark.full
def test_a_signal_ends_the_study_after_the_stage(stages, tmp_path):
  run(tmp_path, "whole", seeds=(0, 1))
  for stop_at, why, done in (
    (3, "the recipe, with cold_start done", 4),
    (14, "the study, before sft_control of seed_0", 15),
    (15, "the study, before sft_verified of seed_0", 17),
    (17, "the study, before student_rl of seed_0", 19),
    (20, "the study, with seed 0 done", 21),
  ):
    stages.ran.clear()
    stages.stop_at = stop_at
    with pytest.raises(stopping.Stopped, match=why):
      run(tmp_path, f"stopped_{stop_at}", seeds=(0, 1))
    assert len(stages.ran) == done
    stages.stop_at = None
    run(tmp_path, f"stopped_{stop_at}", seeds=(0, 1))
    assert len(stages.ran) == len(set(stages.ran))


def test_mistakes_are_told_before_the_first_stage(stages, tmp_path):
  def refused(message, **changes):
    with pytest.raises(ValueError, match=message):
      run(tmp_path, **changes)
    assert not stages.ran and not (tmp_path / "study").exists()

  refused("seeds=.* each once", seeds=(1, 1))
  refused("confidence=95.0 must lie", confidence=95.0)
  refused("recipe='no.py': there is no such file", recipe="no.py")
  refused(
    r"recipe_changes.evaluate.slotz changes .* 'slots'\?",
    recipe_changes=dict(evaluate=dict(slotz=1)),
  )
  refused(
    r"config.sft_control.stepz changes .* 'steps'\?", sft_control=dict(stepz=1)
  )
  refused(r"student_rl.*group_size=1", student_rl=dict(group_size=1))
  refused("compares distillation", recipe_changes=dict(distilled=None))


def test_what_a_control_would_refuse_late_is_told_first(monkeypatch, tmp_path):
  stages = Stages(monkeypatch)
  with pytest.raises(ValueError, match=r"sft_control.*level 99"):
    traces = dict(levels=(2, 99))
    run(tmp_path, sft_control=dict(data=dict(sources=dict(traces=traces))))
  assert not stages.ran and not (tmp_path / "study").exists()


def test_another_recipe_in_the_same_folder_is_refused(stages, tmp_path):
  run(tmp_path, seeds=(0,))
  with pytest.raises(ValueError, match=r"recipe.evaluate.slots: 8 -> 9"):
    run(tmp_path, seeds=(0,), recipe_changes=dict(evaluate=dict(slots=9)))


def test_merging_leaves_the_section_as_it_was():
  section = {"a": {"b": 1, "c": (1, 2)}, "d": 3}
  merged = study.merge(section, {"a": {"c": (5,)}}, "x")
  assert merged == {"a": {"b": 1, "c": (5,)}, "d": 3}
  assert section == {"a": {"b": 1, "c": (1, 2)}, "d": 3}
  assert study.merge(section, {}, "x") == section


CONFIG = """
import ml_collections
def get_config():
  c = ml_collections.ConfigDict()
  c.recipe = "tests/experiments/shrunk_laptop.py"
  c.recipe_changes = {}
  c.seeds = (0,)
  c.sft_control = dict(data=dict(sources=dict(traces=dict(documents=600))))
  c.sft_verified = dict(data=dict(sources=dict(traces=dict(author="clean"))))
  c.student_rl = {}
  c.confidence = 0.95
  return c
"""


@pytest.mark.full
def test_the_command_runs_a_study_of_real_stages(recipes, tmp_path):
  (tmp_path / "study.py").write_text(CONFIG)
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "experiments.study",
      f"--config={tmp_path / 'study.py'}",
      f"--workdir={tmp_path / 'study'}",
    ],
    cwd=ROOT,
    env=recipes.env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "R1's findings" in done.stdout
  home = tmp_path / "study" / "seed_0"
  found = files.read_json(tmp_path / "study" / "comparison.json")
  assert {c["verdict"] for c in found["claims"]} == {"undecided"}  # one seed
  for claim in found["claims"]:
    for stage in (claim["stage"], claim["control"]):
      assert claim["measure"] in found["stages"][stage]
  # The control costs what RL cost, to within a step.
  costs = {name: cost["flops"]["0"] for name, cost in found["costs"].items()}
  start = files.read_json(home / "cold_start" / "summary.json")
  step = start["flops"] / start["steps"]
  for control in ("sft_control", "sft_verified"):
    assert abs(costs[control] - costs["rl"]) < 2 * step
  student = files.read_json(home / "student_rl" / "config.json")
  assert student["model"]["first_k_dense_replace"] == 2
