"""The notebook runs on small checkpoints of both kinds of attention."""

import json
import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

from rlm.data.byte_tokenizer_files import write_byte_tokenizer
from tests.parity import cases

NOTEBOOK = (
  pathlib.Path(__file__).resolve().parents[2]
  / "notebooks"
  / "inspect_checkpoint.ipynb"
)


@pytest.mark.parametrize(
  "name", [pytest.param("deepseek_v3", marks=pytest.mark.full), "qwen2"]
)
def test_the_notebook_runs(tmp_path, monkeypatch, capsys, name):
  config = cases.CONFIGS[name] | {"vocab_size": 272}
  cases.write_folder(tmp_path, config, cases.make_weights(config, seed=0))
  write_byte_tokenizer(tmp_path)
  monkeypatch.setenv("RLM_CHECKPOINT", str(tmp_path))
  monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
  jax.config.update("jax_numpy_rank_promotion", "allow")
  names: dict = {}
  try:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
      if cell["cell_type"] == "code":
        exec("".join(cell["source"]), names)
  finally:
    jax.config.update("jax_numpy_rank_promotion", "raise")
  width = {"deepseek_v3": 16 + 8, "qwen2": 2 * 2 * 8}[name]
  assert names["cache_bytes"]["this model"] == 2 * 2 * width
  model, variables = names["model"], names["variables"]
  # The lens of the last layer is the model.
  probs = jax.nn.softmax(model.logits(variables, names["tokens"])[0])
  np.testing.assert_allclose(names["probs"][-1], probs, atol=1e-5)
  out = capsys.readouterr().out
  if name == "qwen2":
    assert "A dense model" in out
  else:
    load = names["load"]
    assert load.shape == (1, 8)
    np.testing.assert_allclose(load.sum(axis=1), 3, rtol=1e-6)
    assert "MaxVio by layer:" in out
