"""The comparison of placements, small: counts, order, files written."""

import json
import re

import numpy as np
import pytest

from tools import bench_placement as bench


def test_every_token_chooses_distinct_experts():
  rng = np.random.default_rng(0)
  popularity = bench.zipf_popularity(rng, 1.0, layers=3, experts=8)
  np.testing.assert_allclose(np.sort(popularity)[:, -2:], [[0.5, 1.0]] * 3)
  load = bench.zipf_load(rng, popularity, tokens=500, choices=3)
  assert (load.sum(axis=1) == 1500).all()
  assert load.max() <= 500  # at most once a token
  assert (load.argmax(axis=1) == popularity.argmax(axis=1)).all()


def test_placements_by_hand():
  load = np.array([[1, 1, 6, 4]])
  shape = bench.Shape("EP2", devices=2, nodes=1, redundant=2)
  case = bench.compare(load, load, shape, groups=1)
  assert case["mode"] == "hierarchical" and case["slots_per_device"] == 3
  assert case["contiguous"] == pytest.approx(10 / 6)
  assert case["packed"] == pytest.approx(7 / 6)  # 6 + 1 and 4 + 1
  assert case["repeated"] == pytest.approx(7 / 6)  # 1/2 + 1/2 + 6
  assert case["eplb"] == pytest.approx(1.0)  # 3 + 2 + 1 twice
  assert case["gain"] == pytest.approx(10 / 6)
  assert case["bound"] == 1.0


def test_where_experts_do_not_divide_there_is_no_contiguous_placement():
  load = np.array([[8, 1, 1, 1]])
  shape = bench.Shape("EP5", devices=5, nodes=5, redundant=1)
  case = bench.compare(load, load, shape, groups=2)
  assert case["mode"] == "global"
  assert case["contiguous"] is None and case["packed"] is None
  assert case["eplb"] == case["bound"] == pytest.approx(4 / (11 / 5))
  assert case["gain"] == pytest.approx(case["repeated"] / case["eplb"])


def test_zipf_is_printed_written_and_drawn(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(bench, "EXPONENTS", (0.0, 0.75))
  output, picture = tmp_path / "out.json", tmp_path / "out.png"
  flags = ["--layers=1", "--tokens=256", "--history=2"]
  bench.main([*flags, f"--output={output}", f"--plot={picture}"])
  result = json.loads(output.read_text())
  assert len(result["cases"]) == 2 * len(bench.SHAPES)
  assert {"command", "commit", "versions"} <= result.keys()
  skewed = result["cases"][len(bench.SHAPES)]
  assert skewed["bound"] <= skewed["eplb"] < skewed["contiguous"]
  assert picture.read_bytes()[1:4] == b"PNG"
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 1 + 2 * len(bench.SHAPES)
  assert lines[0].split()[-2:] == ["bound", "gain"]


def test_loads_of_a_run(tmp_path, capsys):
  even, skewed = [[0.25] * 4], [[0.7, 0.1, 0.1, 0.1]]
  loads = [even, skewed, skewed, skewed, skewed]
  records = [{"step": i, "expert_load": x} for i, x in enumerate(loads)]
  records.insert(3, {"step": 2})  # nothing measured
  text = "".join(json.dumps(record) + "\n" for record in records)
  (tmp_path / "metrics.jsonl").write_text(text)
  fitted, measured = bench.run_loads(tmp_path, window=2)
  np.testing.assert_allclose(fitted, skewed)
  np.testing.assert_allclose(measured, skewed)
  flags = [f"--workdir={tmp_path}", "--devices=2", "--redundant=2"]
  bench.main([*flags, "--window=2"])
  assert re.search(r"run +2\.80 +EP2 +1\.60", capsys.readouterr().out)
  with pytest.raises(
    ValueError, match="5 records with expert_load; --window=3"
  ):
    bench.run_loads(tmp_path, window=3)
