"""Settings that no distribution has are refused."""

import pytest

from tests.sampling.tiny_sampler import sampling_config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(temperature=-0.1), "temperature=-0.1 must be at least 0"),
    (dict(temperature=float("nan")), "temperature=nan must be at least 0"),
    (dict(temperature=float("inf")), "temperature=inf must be .* finite"),
    (dict(top_k=-1), "top_k=-1 must not be negative"),
    (dict(top_p=0.0), r"top_p=0.0 must lie in \(0, 1\]"),
    (dict(top_p=1.1), r"top_p=1.1 must lie in \(0, 1\]"),
    (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
  ],
)
def test_bad_settings_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    sampling_config(**changes)
