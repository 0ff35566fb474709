"""Models loaded from folders, each once."""

import functools

import pytest

from tests.parity import cases
from tests.parity.ours import Ours


@pytest.fixture(scope="session")
def load(tmp_path_factory):
  """(name of a case, dtype) -> Ours."""

  @functools.cache
  def load(name, dtype="float32"):
    folder = tmp_path_factory.mktemp(name)
    cases.write_case(folder, name)
    return Ours.load(folder, dtype)

  return load
