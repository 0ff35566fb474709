import json

from rlm.report.heldout_text import HeldoutText, heldout_text
from rlm.report.run_folder import read_run


def test_text_stands_beside_its_entropies(recipe):
  # The sums, whose entropy says nothing, are left out.
  assert heldout_text(read_run(recipe)) == [
    HeldoutText("Pretraining", "stdlib", 2.78, unigram=4.71, bigram=3.62)
  ]


def test_odd_summaries_are_no_trouble(recipe):
  path = recipe / "pretrain" / "summary.json"
  for heldout in (
    None,
    [1],
    {"stdlib": 3},
    {"stdlib": {"bits_per_byte": None}},
  ):
    path.write_text(json.dumps({"heldout": heldout}))
    assert heldout_text(read_run(recipe)) == []
