"""The notebook runs on a run folder, and says what the folder holds."""

import json
import pathlib

import matplotlib.pyplot as plt
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOK = FOLDER / "did_rl_teach.ipynb"


def code_cells(path: pathlib.Path) -> list[dict]:
  cells = json.loads(path.read_text())["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


def write_json(path: pathlib.Path, value) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


@pytest.fixture
def recipe(tmp_path):
  """A recipe of two stages: 20% to 80%, and 50% to 90% given the format."""
  for stage, plain, formed in (("cold_start", 0.2, 0.5), ("rl", 0.8, 0.9)):
    write_json(
      tmp_path / "evaluate" / stage / "summary.json",
      {
        "stage": stage,
        "pass_at_1": dict(mean=plain, low=plain - 0.1, high=plain + 0.1, n=9),
        "pass_at_1_given_format": dict(
          mean=formed, low=formed - 0.1, high=formed + 0.1, n=9
        ),
      },
    )
    flags = dict(well_formed=True, finished=True, steps_correct=False)
    write_json(
      tmp_path / "evaluate" / stage / "traces" / "0.jsonl",
      dict(flags, stage=stage, correct=stage == "rl"),
    )
    write_json(tmp_path / stage / "metrics.jsonl", {"step": 1, "accuracy": 0.5})
  return tmp_path


def test_the_notebook_runs(recipe, monkeypatch, capsys):
  monkeypatch.setenv("RLM_WORKDIR", str(recipe))
  monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
  names: dict = {}
  for cell in code_cells(NOTEBOOK):
    exec("".join(cell["source"]), names)
  assert names["gains"] == pytest.approx(
    {"pass_at_1": 60.0, "pass_at_1_given_format": 40.0}
  )
  assert names["counts"]["cold_start"].tolist() == [0, 0, 1, 0]
  assert names["counts"]["rl"].tolist() == [0, 1, 0, 0]
  assert "pass@1: +60.0 points, intervals apart" in capsys.readouterr().out


@pytest.mark.parametrize(
  "path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.name
)
def test_notebooks_hold_no_outputs(path):
  cells = code_cells(path)
  assert cells
  assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
