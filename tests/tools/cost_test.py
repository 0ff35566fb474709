import json
import pathlib
import subprocess
import sys

import pytest

from rlm import files
from rlm.models.published_config import write_published_config
from tests.cost_test import V3_LATER, V3_RATE, V3_TOKENS
from tests.flops_test import DENSE, GROUPED
from tests.tiny_model import tiny_config
from tools import cost as tool

ROOT = pathlib.Path(__file__).resolve().parents[2]
V3 = "configs/pretrain/deepseek_v3.py"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """A published model's folder, its config.json alone."""
  folder = tmp_path_factory.mktemp("published")
  cfg = tiny_config(max_position_embeddings=4096)
  files.write_json(folder / "config.json", write_published_config(cfg))
  return str(folder)


def ledger(*flags):
  return tool.make_ledger(tool.make_parser().parse_args(flags))


def refusal(capsys, *flags):
  with pytest.raises(SystemExit) as stopped:
    tool.main(list(flags))
  return f"{stopped.value.code}{capsys.readouterr().err}"


def test_v3s_own_account(tmp_path, capsys):
  file = tmp_path / "ledger.json"
  tool.main(
    [
      f"--config={V3}",
      "--hardware=h800",
      "--chips=2048",
      f"--tokens={V3_TOKENS}",
      f"--tokens_per_second_per_chip={V3_RATE}",
      *(f"--extra_chip_hours={k}={v}" for k, v in V3_LATER.items()),
      f"--json={file}",
    ]
  )
  text = capsys.readouterr().out
  for figure in (
    "671.026 B",
    "37.552 B",
    "11.610 B",
    "250.456 G",
    "70,272",
    "3,997,696",
    "249,856",
    "31,232",
    "2,664,000",
    "2,788,000",
    "5,576,000",
    "39.1%",
  ):
    assert figure in text, figure
  assert "table 1" in text  # where the price is from
  found = json.loads(file.read_text())
  assert round(found["training"]["total_chip_hours"]) == 2_788_000
  assert found["model"]["parts"]["routed experts"]["activated"] > 2e10
  assert found["hardware"]["name"] == "h800"


def test_tokens_of_a_configs_steps():
  found = ledger(f"--config={V3}", "--hardware=v5p")
  # Its docstring: 14.8T tokens, the ramp of the batch included.
  assert found["training"]["tokens"] == pytest.approx(14.8e12, rel=2e-3)
  # No rate was given: the least that the chip could take.
  assert found["training"]["at_peak"] and found["training"]["mfu"] == 1


def test_mtp_is_counted_where_it_is_trained():
  mtp = ledger(f"--config={V3}")["model"]["forward_flops"]
  assert mtp["MTP modules"] > 0
  without = ledger(f"--config={V3}", "--without_mtp")["model"]["forward_flops"]
  assert "MTP modules" not in without
  rl = ledger("--config=configs/rl/laptop.py")
  assert rl["is_rl"] and "MTP modules" not in rl["model"]["forward_flops"]
  student = ledger("--config=configs/pretrain/student.py")["model"]
  assert "MTP modules" not in student["forward_flops"]


def test_rl_has_rows_of_prompt_and_completion_and_a_reference(published):
  found = ledger("--config=configs/rl/published.py", f"--init_from={published}")
  assert found["model"]["row_length"] == 512 + 2048
  assert found["memory"]["reference"] > 0  # grpo has a KL
  zero = ledger("--config=configs/rl/laptop.py")
  assert zero["model"]["row_length"] == 24 + 64


def test_a_published_model_and_a_runs_folder(published, tmp_path):
  with_length = "--sequence_length=32"
  folder = ledger(f"--config={published}", with_length)
  file = ledger(f"--config={published}/config.json", with_length)
  assert folder["model"] == file["model"]
  assert set(folder["memory"]) == {"parameters", "expert bias"}
  config = tool.load_settings("configs/pretrain/laptop.py", None)
  config["model"] = vars(config["model"])
  files.write_json(tmp_path / "config.json", config)
  run = ledger(f"--config={tmp_path}")
  assert run["model"] == ledger("--config=configs/pretrain/laptop.py")["model"]


def test_a_grouped_model(tmp_path, capsys):
  cfg = tiny_config(**DENSE | GROUPED, num_attention_heads=4)
  files.write_json(tmp_path / "config.json", write_published_config(cfg))
  tool.main([f"--config={tmp_path}", "--sequence_length=16"])
  text = capsys.readouterr().out
  assert "MQA (this model)" in text and "MLA" in text
  assert "routed experts" not in text


def test_a_config_may_leave_the_sizes_to_another_model(published, capsys):
  found = ledger(
    "--config=configs/sft/published.py", f"--init_from={published}"
  )
  assert found["model"]["mtp"]["total"] == 0  # as the config says
  message = refusal(capsys, "--config=configs/sft/published.py")
  assert "vocab_size" in message and "--init_from" in message


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config=configs/r1/laptop.py"], "models model, student of a recipe"),
    (["--config=configs/reject/laptop.py"], "has no section `model`"),
    (["--config=nowhere"], "there is no nowhere"),
    (["--config=nowhere.py"], "there is no such file"),
    (["--config=setup.py", "--config=tools/cost.py"], "has no get_config"),
    ([f"--config={V3}", "--chips=3"], "--chips needs to know the chip"),
    ([f"--config={V3}", "--mfu=0"], "--mfu needs to know the chip"),
    ([f"--config={V3}", "--hardware=h801"], "'h801' is unknown"),
    ([f"--config={V3}", "--hardware=v5p", "--chips=0"], "at least 1"),
    ([f"--config={V3}", "--hardware=v5p", "--mfu=1.5"], "MFU of 1.5"),
    ([f"--config={V3}", "--sequence_length=4097"], "embeddings=4096"),
    (
      ["--config=configs/rl/laptop.py", "--hardware=v6e", "--mfu=0.3"],
      "Give --tokens",
    ),
    (
      [f"--config={V3}", "--hardware=v6e", "--extra_chip_hours=a=b"],
      "'b' is no number of hours",
    ),
    (
      [f"--config={V3}", "--hardware=v6e", *["--extra_chip_hours=1"] * 2],
      "'extra' was given before",
    ),
    (
      [f"--config={V3}", "--mfu=0.3", "--tokens_per_second_per_chip=1"],
      "not allowed with",
    ),
  ],
)
def test_what_cannot_be_answered_is_said(capsys, flags, message):
  assert message in refusal(capsys, *flags)


def test_a_published_model_needs_the_length_of_rows(published, capsys):
  assert "--sequence_length" in refusal(capsys, f"--config={published}")


def test_files_that_are_no_config(tmp_path, capsys):
  file = tmp_path / "config.json"
  file.write_text("{")
  assert "is not JSON" in refusal(capsys, f"--config={tmp_path}")


def test_unknown_prices_name_their_flag(capsys):
  tool.main([f"--config={V3}", "--hardware=v6e"])
  text = capsys.readouterr().out
  assert "at least, as no rate was given" in text
  assert "--dollars_per_chip_hour" in text and "--watts_per_chip" in text


@pytest.mark.parametrize(
  "command", [["tools/cost.py"], ["-m", "tools.cost"]], ids=["file", "module"]
)
def test_both_ways_to_call_it(command, tmp_path):
  done = subprocess.run(
    [sys.executable, *command, "--config=configs/pretrain/laptop.py"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert "Parameters" in done.stdout
