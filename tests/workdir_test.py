"""A run's folder: who may continue it, and what it says when one may not."""

import io
import subprocess
import sys

import ml_collections
import pytest
import rich.console

from rlm import files, workdir
from rlm.workdir import differences, open_workdir

CONFIG = {"seed": 0, "lr": 0.1, "model": {"hidden_size": 64, "dense": (1, 2)}}


def test_a_new_folder_gets_config_and_environment(tmp_path):
  c = ml_collections.ConfigDict(CONFIG)
  folder = open_workdir(tmp_path / "a" / "b", c)
  assert not folder.resumed and folder.summary is None
  assert files.read_json(folder.path / "config.json") == {
    "seed": 0,
    "lr": 0.1,
    "model": {"hidden_size": 64, "dense": [1, 2]},
  }
  run = files.read_json(folder.path / "run.json")
  assert run["versions"]["jax"] and run["versions"]["python"]
  assert run["devices"] == 8 and run["platform"] == "cpu"
  assert run["threads"] >= 1 and len(run["starts"]) == 1
  assert run["command"][0] == sys.executable


def test_the_same_config_continues_and_each_start_is_recorded(tmp_path):
  open_workdir(tmp_path, CONFIG)
  # As a dict, a ConfigDict or read back from JSON: it is the same config.
  open_workdir(tmp_path, ml_collections.ConfigDict(CONFIG))
  folder = open_workdir(tmp_path, files.read_json(tmp_path / "config.json"))
  assert folder.resumed
  assert len(files.read_json(tmp_path / "run.json")["starts"]) == 3


def test_another_config_is_refused_with_the_differing_fields(tmp_path):
  open_workdir(tmp_path, CONFIG)
  other = {
    "seed": 0,
    "lr": 0.2,
    "model": {"hidden_size": 64, "dense": (1, 3)},
    "new": None,
  }
  with pytest.raises(
    ValueError,
    match=r"(?s)run of another config; recorded -> given:"
    r"\n  lr: 0\.1 -> 0\.2\n  model\.dense: \[1, 2\] -> \[1, 3\]"
    r"\n  new: \(absent\) -> None\nChoose another --workdir",
  ):
    open_workdir(tmp_path, other)
  assert files.read_json(tmp_path / "config.json")["lr"] == 0.1


def test_infinity_in_a_config_is_not_none(tmp_path):
  open_workdir(tmp_path, {"max_grad_norm": float("inf")})
  open_workdir(tmp_path, {"max_grad_norm": float("inf")})
  with pytest.raises(ValueError, match=r"max_grad_norm: 'inf' -> None"):
    open_workdir(tmp_path, {"max_grad_norm": None})


def test_keys_that_may_change_do(tmp_path):
  keys = ("on_nonfinite", "logging")
  c = {"seed": 0, "on_nonfinite": "stop", "logging": {"every": 1}}
  open_workdir(tmp_path, c, may_change=keys)
  c = {"seed": 0, "on_nonfinite": "skip", "logging": {"every": 2}}
  folder = open_workdir(tmp_path, c, may_change=keys)
  assert folder.identity == {"seed": 0}
  assert files.read_json(tmp_path / "config.json") == c
  with pytest.raises(ValueError, match="seed: 0 -> 1"):
    open_workdir(tmp_path, {**c, "seed": 1}, may_change=keys)


def test_other_threads_versions_or_devices_warn(tmp_path, monkeypatch):
  open_workdir(tmp_path, CONFIG)
  real = workdir.environment()
  changed = {
    **real,
    "threads": 96,
    "versions": {**real["versions"], "jax": "9.9"},
  }
  monkeypatch.setattr(workdir, "environment", lambda: changed)
  with pytest.warns(
    UserWarning,
    match=r"(?s)not repeat.*to the bit.*versions\.jax: .* -> '9\.9'.*"
    r"threads: \d+ -> 96",
  ):
    open_workdir(tmp_path, CONFIG)
  starts = files.read_json(tmp_path / "run.json")["starts"]
  assert "threads" in starts[-1]["changed"]
  open_workdir(tmp_path, CONFIG)  # said once


def test_threads_follow_what_xla_reads(monkeypatch):
  monkeypatch.setenv("NPROC", "3")
  assert workdir.environment()["threads"] == 3


def test_a_finished_run_says_so(tmp_path, capsys):
  folder = open_workdir(tmp_path, CONFIG)
  written = folder.finish({"accuracy": 0.5, "levels": (1, 2)})
  again = open_workdir(tmp_path, CONFIG)
  assert again.summary == written == {"accuracy": 0.5, "levels": [1, 2]}
  again.say_finished()
  assert "is finished" in capsys.readouterr().out
  out = io.StringIO()
  again.say_finished(rich.console.Console(file=out, width=20))
  assert f"{tmp_path} is finished: its results are in" in out.getvalue()
  # It was looked at, not started.
  assert len(files.read_json(tmp_path / "run.json")["starts"]) == 1


def test_a_finished_run_of_another_config_is_refused(tmp_path):
  open_workdir(tmp_path, CONFIG).finish({})
  with pytest.raises(ValueError, match="seed: 0 -> 1"):
    open_workdir(tmp_path, {**CONFIG, "seed": 1})


def test_a_folder_that_is_no_run_is_refused(tmp_path):
  (tmp_path / "metrics.jsonl").write_text("")
  with pytest.raises(ValueError, match=r"holds metrics\.jsonl but no config"):
    open_workdir(tmp_path, CONFIG)
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"--workdir=.*file is a file"):
    open_workdir(tmp_path / "file", CONFIG)


def test_a_kill_before_the_config_is_written_starts_anew(tmp_path, monkeypatch):
  def killed(path, data):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(files, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
      open_workdir(tmp_path, CONFIG)
  assert not open_workdir(tmp_path, CONFIG).resumed


def test_inputs_are_recorded_and_must_stay(tmp_path):
  folder = open_workdir(tmp_path, CONFIG)
  folder.record_input("text", {"a.py": "12ab", "b.py": "34cd"})
  folder = open_workdir(tmp_path, CONFIG)
  folder.record_input("text", {"a.py": "12ab", "b.py": "34cd"})
  with pytest.raises(
    ValueError, match=r"(?s)another input 'text'.*text\.b\.py: '34cd' -> 'ff'"
  ):
    folder.record_input("text", {"a.py": "12ab", "b.py": "ff"})
  inputs = files.read_json(tmp_path / "run.json")["inputs"]
  assert inputs["text"]["b.py"] == "34cd"


def test_two_processes_cannot_share_a_folder(tmp_path):
  folder = open_workdir(tmp_path, CONFIG)
  code = (
    "import sys, pathlib; from rlm import workdir\n"
    "try: workdir._lock(pathlib.Path(sys.argv[1]))\n"
    "except ValueError as error: sys.exit(str(error))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
  )
  assert "is being used by process" in done.stderr and done.returncode == 1
  folder.close()
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
  assert done.returncode == 0


def test_differences_name_dotted_fields_up_to_a_limit():
  assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == ""
  assert differences({"a": {"b": 1}}, {"a": 1}) == (
    "  a.b: 1 -> (absent)\n  a: (absent) -> 1"
  )
  many = differences({}, {str(i): i for i in range(9)}, limit=4)
  assert many.endswith("... and 5 more") and many.count("\n") == 4
