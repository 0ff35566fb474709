"""How near to transformers is near enough, and what is said when it is not.

Measured on the cases: logits differ by 7e-6 at most, gradients by 6e-6 of their
norm, sublayers by 1.4e-6 of their largest entry: rounding in float32.
"""

import functools
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from tests.parity import cases

LOGITS = 1e-4  # largest difference; logits have a std of 1.2 to 1.7
LOSS = 1e-5  # relative
GRADIENTS = 1e-4  # norm of the difference, relative to the gradient's
SUBLAYERS = 1e-5  # largest difference, relative to the largest entry

GOLDEN = pathlib.Path(__file__).parent / "golden"


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
  """What transformers gave for a case; see tools/make_golden.py."""
  return safetensors.numpy.load_file(GOLDEN / f"{name}.safetensors")


def part(name: str, prefix: str) -> dict[str, np.ndarray]:
  """The entries of a golden file below a prefix."""
  prefix += "/"
  return {
    key.removeprefix(prefix): value
    for key, value in golden(name).items()
    if key.startswith(prefix)
  }


def rest_in_full(names, default) -> list:
  """Parameters, of which those outside `default` run under --full."""
  return [
    pytest.param(n, marks=[] if n in default else [pytest.mark.full])
    for n in names
  ]


def check_outputs(found: dict, expected: dict) -> None:
  """logits and loss of a batch; logits are 0 in padding."""
  worst = np.abs(found["logits"] - expected["logits"]).max()
  assert worst <= LOGITS, f"logits differ by {worst:.2e}"
  np.testing.assert_allclose(found["loss"], expected["loss"], rtol=LOSS)


def check_gradients(found: dict, expected: dict) -> None:
  """Gradients, or sketches of them, by published name; none may lack."""
  assert sorted(found) == sorted(expected)
  wrong = []
  for name, theirs in expected.items():
    difference = np.linalg.norm(found[name] - theirs)
    # An expert that no token chose has the gradient 0, exactly.
    if not difference <= GRADIENTS * np.linalg.norm(theirs):
      wrong.append(f"{name}: {difference:.2e} of {np.linalg.norm(theirs):.2e}")
  assert not wrong, "gradients differ:\n" + "\n".join(wrong)


def check_sketches(gradients: dict, expected: dict) -> None:
  """Gradients by published name against `gradients` of a golden batch."""
  found = {n: cases.sketch(n, gradient) for n, gradient in gradients.items()}
  theirs = zip(sorted(found), expected["gradients"], strict=True)
  check_gradients(found, dict(theirs))


def check_sublayers(found: dict, expected: dict) -> None:
  """Outputs of `Ours.run_sublayers`; a failure names the sublayers."""
  expected = dict(expected)
  layers = {name.split(".")[0] for name in expected if "." in name}
  row = cases.make_batch(cases.BATCHES["padded"])["tokens"][0]
  stream = found["embed"][row]
  for layer in sorted(layers):
    expected[f"{layer}.decode"] = expected[f"{layer}.attn"][-1:]
    stream = stream + expected[f"{layer}.attn"] + expected[f"{layer}.ffn"]
    expected[f"{layer}.block"] = stream
  assert set(found) - {"embed"} == set(expected)
  wrong = []
  for name, theirs in sorted(expected.items()):
    difference = np.abs(found[name] - theirs).max() / np.abs(theirs).max()
    if not difference <= SUBLAYERS:
      wrong.append(f"{name}: {difference:.2e}")
  assert not wrong, "sublayers differ:\n" + "\n".join(wrong)


def drift(found: np.ndarray, expected: np.ndarray) -> np.float32:
  """Median over tokens of the rms difference of logits [n, V], over their std.

  The median, since a token that rounding sends to another expert moves far.
  """
  rms = np.sqrt(np.mean(np.square(found - expected), axis=-1))
  return np.float32(np.median(rms) / expected.std())


def unused_token(texts: list[np.ndarray]) -> int:
  """An id that none of them holds: as the end token it ends none of them."""
  used = set(np.concatenate(texts).tolist())
  return min(set(range(40)) - used)
