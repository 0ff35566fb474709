"""The examples of docs/ run as they stand."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("name", ["kernels.md"])
def test_the_example_runs(name):
  (example,) = re.findall(
    r"```python\n(.*?)```", (DOCS / name).read_text(), re.S
  )
  variables: dict = {}
  exec(compile(example, name, "exec"), variables)
  assert variables["out"].shape == (4, 1, 16, 512)
  assert bool(jax.numpy.isfinite(variables["lse"]).all())
