"""The command line: quick help, and mistakes told before anything starts."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from experiments import launch
from rlm import files, stopping
from rlm.metrics import NonFiniteError

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
import ml_collections
def get_config(size=8):
  c = ml_collections.ConfigDict()
  c.seed, c.lr, c.name, c.levels = 0, 0.1, "a", (1, 2)
  c.ema, c.files = None, ["x"]
  c.model = dict(hidden_size=int(size), dense=False)
  return c
"""


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "laptop.py"
  path.write_text(CONFIG)
  return f"--config={path}"


def launched(*args, run=None):
  """(config, workdir) that run received."""
  seen = []
  launch.main(run or (lambda c, w: seen.append((c, w))), "Doc.", ["x", *args])
  return seen[0]


def error(capsys, *args, code=2, run=None):
  """The message of a command that must fail."""
  with pytest.raises(SystemExit) as stopped:
    launched(*args, run=run or (lambda c, w: None))
  assert stopped.value.code == code
  return capsys.readouterr().err


def test_a_run_gets_its_config_with_overrides(config):
  c, folder = launched(
    config,
    "--workdir=runs/a",
    "--config.seed=3",
    "--config.model.hidden_size=16",
    "--config.model.dense",
    "--config.lr=1",
    "--config.levels=(4,5)",
    "--config.ema=0.99",
    "--config.files=['y', 'z']",
  )
  assert folder == "runs/a"
  assert (c.seed, c.lr, c.levels) == (3, 1.0, (4, 5))
  assert c.model.hidden_size == 16 and c.model.dense
  assert c.ema == 0.99 and c.files == ["y", "z"]


def test_flags_may_stand_apart_and_configs_take_an_argument(tmp_path, config):
  path = config.removeprefix("--config=")
  c, _ = launched("--config", f"{path}:32", "--workdir", "w")
  assert c.model.hidden_size == 32


def test_help_shows_the_docstring_and_flags(capsys):
  for flag in ("--help", "-h"):
    launch.main(None, "What it does.\n\npython -m x", ["x", flag])
    out = capsys.readouterr().out
    assert out.startswith("What it does.")
    assert "--config:" in out and "--workdir:" in out and "--verbosity:" in out


def test_help_and_mistakes_do_not_import_jax(tmp_path, config):
  for args in (["--help"], [config, "--workdir=w", "--config.sede=1"]):
    code = (
      "import sys; from experiments import launch\n"
      "try: launch.main(None, 'Doc.', ['x', *sys.argv[1:]])\n"
      "except SystemExit as e: assert e.code == 2\n"
      "assert not {'jax', 'flax', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *args], check=True)


def test_missing_config(capsys):
  assert "--config is missing: name a config file" in error(capsys)
  assert "--config is missing" in error(capsys, "--config")
  assert "--config is missing" in error(capsys, "--config=", "--workdir=w")


def test_config_file_that_is_not_there(capsys, tmp_path, config):
  (tmp_path / "other.py").write_text("")
  message = error(capsys, f"--config={tmp_path}/laptp.py", "--workdir=w")
  assert "laptp.py: there is no such file. Near it: " in message
  assert f"{tmp_path}/laptop.py" in message


def test_missing_workdir(capsys, config):
  assert "--workdir is missing: name the folder" in error(capsys, config)


@pytest.mark.parametrize(
  "flag, text",
  [
    ("--config.sede=1", "has no key 'sede'; did you mean 'seed'?"),
    (
      "--config.model.hiden_size=1",
      "has no key 'model.hiden_size'; did you mean 'model.hidden_size'?",
    ),
    ("--config.hidden_size=1", "did you mean 'model.hidden_size'?"),
    ("--noconfig.model.dnse", "did you mean 'model.dense'?"),
    ("--config.seed=1.5", "flag --config.seed=1.5: invalid literal for int()"),
    ("--config.lr=fast", "could not convert string to float: 'fast'"),
    ("--workdr=w", "Unknown command line flag 'workdr'. Did you mean: workdir"),
    ("seed=1", "unexpected argument 'seed=1': flags are written --name=value"),
  ],
)
def test_misspelt_flags(capsys, config, flag, text):
  message = error(capsys, config, "--workdir=w", flag)
  assert text in message and "Traceback" not in message


def fails(error):
  def run(c, workdir):
    raise error

  return run


def test_a_users_mistake_is_one_message(capsys, config):
  args = (config, "--workdir=w")
  run = fails(ValueError("heads=3 do not divide. Make it 4."))
  message = error(capsys, *args, run=run)
  assert message.startswith("error: heads=3 do not divide. Make it 4.\n")
  assert "--verbosity=debug shows where" in message
  for debug in (["--verbosity=debug"], ["-v", "debug"], ["-v=debug"]):
    with pytest.raises(ValueError, match="heads=3"):
      launched(*args, *debug, run=run)


def test_failures_of_the_run_exit_with_one(capsys, config):
  args = (config, "--workdir=w")
  full = files.DiskFullError(28, "no space left on the disk")
  assert "error: no space left" in error(capsys, *args, run=fails(full), code=1)
  bad = NonFiniteError(3, "loss", "step 3: loss = nan.")
  assert "error: step 3: loss = nan." in error(
    capsys, *args, run=fails(bad), code=1
  )


def test_ctrl_c_twice_says_what_is_kept(capsys, config):
  message = error(
    capsys, config, "--workdir=w", run=fails(KeyboardInterrupt()), code=130
  )
  assert "same command continues from the last checkpoint" in message


def test_bugs_keep_their_traceback(config):
  for bug in (KeyError("x"), PermissionError(13, "no")):
    with pytest.raises(type(bug)):
      launched(config, "--workdir=w", run=fails(bug))


def test_a_stopped_run_exits_well_and_says_how_to_continue(capsys, config):
  def run(c, workdir):
    with stopping.catch_signals() as stop:
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop.requested
      raise stopping.Stopped("rl", 7)

  launch.main(run, "Doc.", ["x", config, "--workdir=w"])
  out = capsys.readouterr().out
  assert "rl stopped after step 7 and is saved. The same command" in out


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ({}, "4"),
    ({"JAX_NUM_CPU_DEVICES": "8"}, "8"),
    ({"JAX_NUM_CPU_DEVICES": "2"}, "4"),
    ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, None),
  ],
)
def test_the_cpu_becomes_as_many_devices_as_sample(monkeypatch, before, after):
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
  for name, value in before.items():
    monkeypatch.setenv(name, value)

  def mesh(data):
    return dict(data=data, fsdp=2, expert=1, context=1, tensor=1)

  sections = {"rl": {"mesh": mesh(2)}, "sft": {"sampling_mesh": mesh("x")}}
  launch.offer_cpu_devices({"mesh": mesh(0)})  # as a study's control
  launch.offer_cpu_devices({"sampling_mesh": mesh(1), "stages": sections})
  assert os.environ.get("JAX_NUM_CPU_DEVICES") == after


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_run_asks_for_huge_pages_in_the_same_process(tmp_path, config):
  script = tmp_path / "experiment.py"
  script.write_text(
    "import os\n"
    "from experiments import launch\n"
    "def run(c, workdir):\n"
    "  print(os.getpid(), os.environ['GLIBC_TUNABLES'], c.seed, workdir)\n"
    "launch.main(run, 'Doc.')\n"
  )
  child = subprocess.Popen(
    [sys.executable, str(script), config, "--config.seed=7", "--workdir=a b"],
    env={k: v for k, v in os.environ.items() if k != "RLM_HUGE_PAGES"}
    | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "a.b.c=1"},
    stdout=subprocess.PIPE,
    text=True,
  )
  out, _ = child.communicate()
  assert child.returncode == 0
  # One process, started anew once, with its arguments as they were.
  assert out == f"{child.pid} a.b.c=1:glibc.malloc.hugetlb=1 7 a b\n"


def test_several_processes_share_the_cpu_devices(monkeypatch):
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
  mesh = dict(data=2, fsdp=4, expert=1, context=1, tensor=1)
  launch.offer_cpu_devices({"mesh": mesh}, 2)
  assert os.environ["JAX_NUM_CPU_DEVICES"] == "4"


TWO = ("--coordinator_address=localhost:1", "--num_processes=2")


@pytest.mark.parametrize(
  "flags, text",
  [
    (TWO, "--process_id is missing: --coordinator_address, --num_processes"),
    (("--process_id=0",), "--coordinator_address is missing"),
    ((*TWO, "--process_id=2"), "--process_id=2 must lie within 0 and --num_pr"),
    ((*TWO, "--process_id=a"), "--process_id=a"),
    (
      ("--coordinator_address=me", "--num_processes=2", "--process_id=0"),
      "=me",
    ),
    ((*TWO, "--process_id=0"), "this run has 2 processes, but this experiment"),
  ],
)
def test_processes_that_cannot_be_joined(capsys, config, flags, text):
  message = error(capsys, config, "--workdir=w", *flags)
  assert text in message and "Traceback" not in message


def test_a_cluster_is_noticed_where_one_process_is_meant(
  capsys, config, monkeypatch
):
  for name in ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID"):
    monkeypatch.setenv(f"SLURM_{name}", "0")
  monkeypatch.setenv("SLURM_NTASKS", "1")
  launched(config, "--workdir=w")
  monkeypatch.setenv("SLURM_NTASKS", "4")
  message = error(capsys, config, "--workdir=w")
  assert "this run has 4 processes, but this experiment does not" in message


def test_one_process_starts_nothing(config):
  code = (
    "import sys; from experiments import launch\n"
    "launch.main(lambda c, w: None, 'Doc.', sys.argv, several_processes=True)\n"
    "assert not {'jax', 'flax', 'orbax'} & set(sys.modules)"
  )
  command = [sys.executable, "-c", code, config, "--workdir=w"]
  subprocess.run(command, check=True, env={**os.environ, "RLM_HUGE_PAGES": "1"})
  one = ("--coordinator_address=me:1", "--num_processes=1", "--process_id=0")
  subprocess.run(
    [*command, *one], check=True, env={**os.environ, "RLM_HUGE_PAGES": "1"}
  )
