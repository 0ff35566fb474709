"""The benchmark of experts, small: bytes by hand, every case once."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tools import bench_moe as bench

HIDDEN, K = 16, 2
# What goes along with a row of 16 float32: two ids and two gates of 4 bytes.
BESIDE = 1 + 16 / 64


def case(ids):
  """Two devices with two tokens and two experts each."""
  rng = np.random.default_rng(0)
  x, gates, _, weights = bench.make_inputs(rng, 4, HIDDEN, 8, 4, K, "float32")
  return x, gates, jnp.asarray(ids, jnp.int32), weights


@pytest.mark.parametrize(
  ("transport", "rows"), [("gather", 1), ("padded", 1), ("ragged", 0.75)]
)
def test_bytes_over_the_least(transport, rows):
  """3 of 4 tokens have an expert elsewhere, one of them both: a row each."""
  ids = [[0, 1], [0, 2], [0, 1], [1, 3]]
  _, ratio = bench.divided_case(transport, 2, *case(ids))
  assert ratio == pytest.approx(rows * BESIDE / 0.75)


def test_routes_are_distinct_experts():
  _, gates, ids, _ = bench.make_inputs(
    np.random.default_rng(0), 50, HIDDEN, 8, 4, K, "float32"
  )
  assert (np.asarray(ids)[:, 0] != np.asarray(ids)[:, 1]).all()
  np.testing.assert_array_equal(gates, 1 / K)


def test_it_is_printed_and_written(tmp_path, capsys):
  output = tmp_path / "moe.json"
  sizes = ["--tokens=8", "--hidden=16", "--width=8", "--experts=4", "--k=2"]
  rest = ["--growing", "4", "8", "--rounds=1", "--devices=2"]
  bench.main([*sizes, *rest, f"--output={output}"])
  result = json.loads(output.read_text())
  assert set(result["milliseconds"]) == {
    "form grouped",
    "form dense",
    "bound",
    "4 experts",
    "8 experts",
    "transport gather",
    "transport padded",  # ragged does not run on a CPU
  }
  assert min(result["milliseconds"].values()) > 0
  assert 1 < result["sent_over_least"]["ragged"] < 1.5
  assert "times the least bytes" in capsys.readouterr().out


def test_devices_that_are_not_there_are_told(capsys):
  with pytest.raises(SystemExit):
    bench.main(["--devices=16"])
  assert "JAX_NUM_CPU_DEVICES=16" in capsys.readouterr().err
