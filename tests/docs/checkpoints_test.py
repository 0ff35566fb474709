"""docs/checkpoints.md says what the code does."""

import pathlib
import re

from rlm.checkpoint.initial import shapes
from rlm.checkpoint.published_names import published_tensors
from rlm.models.published_config import read_published_config
from rlm.models.published_families import FAMILIES
from rlm.models.transformer import Transformer
from tests.parity.cases import CONFIGS

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "checkpoints.md").read_text()
MTP = CONFIGS["deepseek_v3"] | {"num_nextn_predict_layers": 1}


def pairs(config):
  """(our leaf, published name) within a layer, numbers left out."""
  cfg = read_published_config(config)
  tree = shapes(Transformer(cfg))
  for leaf, tensors in published_tensors(cfg, tree).items():
    collection, _, name = leaf.partition(".")
    name = re.sub(r"^(dense_layers|moe_layers|mtp_modules)\.", "", name)
    name = name.removeprefix("block.").replace(".", "/")
    if collection == "router":
      name = "router/moe_layers/" + name
    for tensor in tensors:
      published = re.sub(r"model\.layers\.\d+\.", "", tensor.name)
      yield name, re.sub(r"experts\.\d+", "experts.{e}", published)


def test_the_table_of_names_is_complete_and_right():
  rows = re.findall(r"^\| `([^`]+)`[^|]*\| `([^`]+)` \|$", TEXT, re.MULTILINE)
  used = {pair for c in (*CONFIGS.values(), MTP) for pair in pairs(c)}
  assert set(rows) == used


def test_every_family_is_named():
  named = set(re.findall(r"^\| `(\w+)` \| [A-Z]", TEXT, re.MULTILINE))
  assert named == set(FAMILIES)


def test_paths_exist():
  for path in re.findall(r"(?:configs|tools|tests|rlm)/[\w/]+(?:\.py)?", TEXT):
    assert (ROOT / path).exists(), path
