"""Compiling for a slice that is not there; the tests marked tpu need libtpu."""

import json
import types

import jax
import pytest
from absl import flags

from rlm.hardware import CHIPS
from rlm.models.layout import make_layout
from rlm.parallel.config import MeshConfig
from tests.tiny_model import tiny_model
from tools import ahead, compile_only

CONFIG = "configs/pretrain/deepseek_v3.py"
# V3 with every width small, on a slice of four chips.
SMALL = (
  "--topology=v5p:2x2x1",
  "--config.mesh.fsdp=2",
  "--config.mesh.expert=2",
  "--config.model.num_hidden_layers=3",
  "--config.model.first_k_dense_replace=1",
  "--config.model.hidden_size=512",
  "--config.model.intermediate_size=1024",
  "--config.model.moe_intermediate_size=256",
  "--config.model.n_routed_experts=16",
  "--config.model.n_group=2",
  "--config.model.topk_group=1",
  "--config.model.num_experts_per_tok=4",
  "--config.model.num_attention_heads=4",
  "--config.model.vocab_size=2048",
  "--config.model.n_vocab_used=2048",
  "--config.model.logits_chunk=0",
  "--config.data.row_length=1024",
  "--config.batch.rows=16",
  "--config.batch.first_rows=4",
  "--config.batch.microbatch_rows=4",
)


def run(tmp_path, *arguments):
  output = tmp_path / "figures.json"
  compile_only.main(
    ["compile_only", f"--config={CONFIG}", *arguments, f"--json={output}"]
  )
  return json.loads(output.read_text())


@pytest.mark.tpu
def test_a_training_step_is_compiled_and_counted(tmp_path, capsys):
  pytest.importorskip("libtpu", reason="needs pip install 'rlm[tpu]'")
  figures = run(tmp_path, *SMALL)
  assert figures["chips"] == 4
  assert figures["tokens_per_device"] == 4 * 1024
  memory = figures["memory"]
  assert memory["state"] < memory["arguments"] < memory["peak"]
  assert memory["peak"] < memory["hbm"] <= CHIPS["v5p"].hbm_bytes
  assert memory["host"] == 0
  # The loop over microbatches turns as often as the batch has them.
  loops = figures["loops_of_unknown_length"].values()
  assert 4.0 in {loop["trips"] for loop in loops}
  # A quarter of the tokens' choices cannot be told from all in the formula, and
  # masked attention is executed: never less than the formula, nor much more.
  ratio = figures["executed_flops_per_token"] / figures["flops_per_token"]
  assert 1.0 < ratio < 2.0
  kinds = " ".join(figures["collectives"])
  assert "ragged-all-to-all over expert" in kinds
  assert "reduce-scatter over fsdp" in kinds
  # One of two groups a token: half of the rows cross, in 2 bytes a number.
  # Forward and backward there and back, and the way there once more when the
  # layer is recomputed; in MTP, whose norm needs the sum, also the way back.
  sent = sum(
    sums["sent"]
    for name, sums in figures["collectives"].items()
    if name == "ragged-all-to-all over expert, bf16"
  )
  assert sent == pytest.approx(4096 * 0.5 * 512 * 2 * (5 + 5 + 6), rel=0.02)
  assert not figures["not_counted"]
  assert "tokens/s/chip" in capsys.readouterr().out


@pytest.mark.tpu
@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_serving_is_compiled(tmp_path, program):
  pytest.importorskip("libtpu", reason="needs pip install 'rlm[tpu]'")
  figures = run(
    tmp_path, *SMALL, f"--program={program}", "--context=1024", "--steps=8"
  )
  assert figures["program"] == program
  assert figures["step"]["summed"]["tokens_per_second_per_chip"] > 0


@pytest.mark.tpu
def test_what_does_not_fit_is_said(tmp_path, capsys):
  pytest.importorskip("libtpu", reason="needs pip install 'rlm[tpu]'")
  before = jax.config.jax_optimization_level
  with pytest.raises(SystemExit):
    run(tmp_path, *SMALL, "--config.model.vocab_size=16777216")
  assert "train does not fit" in capsys.readouterr().err
  assert jax.config.jax_optimization_level == before


@pytest.mark.tpu
def test_rows_that_are_divided_do_not_decode(tmp_path, capsys):
  pytest.importorskip("libtpu", reason="needs pip install 'rlm[tpu]'")
  divided = ("--config.mesh.fsdp=1", "--config.mesh.context=2")
  with pytest.raises(SystemExit):
    run(tmp_path, *SMALL, *divided, "--program=decode", "--context=1024")
  assert "mesh.context=2: decoding adds one" in capsys.readouterr().err


def test_an_unknown_chip_is_named(tmp_path, capsys):
  with pytest.raises(SystemExit):
    run(tmp_path, "--topology=v9:2x2")
  assert "'v9' is no chip of rlm/hardware.py" in capsys.readouterr().err


def program(tokens, **mesh):
  sizes = dict(data=1, fsdp=1, expert=1, context=1, tensor=1) | mesh
  sizes_of = dict(n_routed_experts=8, n_group=4, topk_group=4, q_lora_rank=16)
  model, _ = tiny_model(**sizes_of)
  layout = make_layout(model, MeshConfig(**sizes), "mesh")
  return types.SimpleNamespace(layout=layout, tokens=tokens, trips=1)


def test_expected_rows_of_an_exchange():
  """Two of eight experts, on four devices: 6 of 7 seconds are elsewhere."""
  rows = 60 * (1 + 6 / 7)
  exchanged, multiplied = compile_only.expected_rows(program(60, expert=4))
  assert exchanged == {1: pytest.approx(rows, rel=0.02)}
  assert multiplied == 120
  assert compile_only.expected_rows(program(60)) == ({}, 120.0)
  divided = program(60, expert=4, tensor=2)
  assert compile_only.expected_rows(divided)[0].keys() == {2}


def test_expected_rows_of_two_legs():
  """To each of 4 groups of 2 devices once, then to every expert of its own."""
  exchanged, _ = compile_only.expected_rows(program(60, expert=8))
  assert exchanged == {
    2: pytest.approx(60 * (1 + 6 / 7), rel=0.02),
    1: pytest.approx(120),
  }


def test_the_command_has_its_flags(capsys):
  compile_only.main(["compile_only", "--help"])
  out = capsys.readouterr().out
  values = flags.FlagValues()
  compile_only.define_flags(values)
  assert all(f"--{name}" in out for name in values)


def test_a_slice_needs_libtpu(monkeypatch):
  from jax.experimental import topologies

  def missing(**options):
    raise RuntimeError("no libtpu")

  monkeypatch.setattr(topologies, "get_topology_desc", missing)
  with pytest.raises(ValueError, match="pip install 'rlm"):
    ahead.describe_slice("v5p:8x8x8")
