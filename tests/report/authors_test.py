import json

import pytest

from rlm.report.authors import noisy_authors
from rlm.report.run_folder import read_run


def change(folder, **changes):
  """Changes fields of the one source or the one task of a stage."""
  path = folder / "config.json"
  config = json.loads(path.read_text())
  for section in (
    config["data"]["sources"]["columns"],
    *config["tasks"].values(),
  ):
    section.update({k: v for k, v in changes.items() if k in section})
  path.write_text(json.dumps(config))


def test_the_authors_of_what_rl_started_from(recipe):
  (authors,) = noisy_authors(read_run(recipe), "rl")
  assert authors.task == "column_addition"
  assert authors.stages == ("Pretraining", "Cold start")
  assert authors.noise == (
    "50% of the authors never carry",
    "each step slips with a chance of 2%",
  )
  assert list(authors.wrong) == [2, 3, 4, 5, 6]
  # At two columns half the authors miss a carry out of the lowest column, which
  # has one in 45 of 100 cases; slips are few.
  assert authors.wrong[2] == pytest.approx(0.5 * 0.45 + 0.03, abs=0.05)
  assert authors.wrong[6] > authors.wrong[3] > authors.wrong[2]
  assert "in pretraining and cold start are by simulated" in authors.sentence
  assert f"about {100 * authors.wrong[2]:.0f}% at level 2" in authors.sentence
  assert noisy_authors(read_run(recipe), "rl") == [authors], "not seeded"


def test_other_models_have_other_authors(recipe):
  (authors,) = noisy_authors(read_run(recipe), "distill")
  assert authors.stages == ("Student base",)


def test_nothing_is_said_of_authors_who_do_not_err(recipe):
  change(recipe / "pretrain", author="clean")
  change(recipe / "cold_start", forget_carry=0.0, slip=0)
  assert noisy_authors(read_run(recipe), "rl") == []


def test_an_unknown_task_is_described_by_its_numbers_alone(recipe):
  for name in ("pretrain", "cold_start"):
    path = recipe / name / "config.json"
    config = json.loads(path.read_text())
    config["tasks"]["column_addition"]["name"] = "of_another_version"
    path.write_text(json.dumps(config))
  (authors,) = noisy_authors(read_run(recipe), "rl")
  assert authors.wrong == {}
  assert authors.sentence.endswith("each step slips with a chance of 2%)")
