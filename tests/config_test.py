"""build: every way a config can be wrong stops with a message that helps."""

import dataclasses
import subprocess
import sys
from typing import Any, Literal

import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.config import build, plain


@dataclasses.dataclass(frozen=True)
class Schedule:
  warmup_steps: int
  peak: float
  shape: Literal["cosine", "constant"] = "cosine"

  def __post_init__(self):
    if self.warmup_steps < 0:
      raise ValueError(f"warmup_steps={self.warmup_steps} is negative.")


@dataclasses.dataclass(frozen=True)
class Run:
  seed: int
  name: str
  use_ema: bool
  schedule: Schedule
  decay: float | None = None
  levels: tuple[int, ...] = ()
  betas: tuple[float, float] = (0.9, 0.95)
  stages: tuple[Schedule, ...] = ()
  mixture: dict[str, float] = dataclasses.field(default_factory=dict)
  free: dict = dataclasses.field(default_factory=dict)
  by_name: dict[str, Schedule] = dataclasses.field(default_factory=dict)
  path: str | tuple[str, ...] = ""
  anything: Any = None


def section(**changes):
  return {
    "seed": 0,
    "name": "x",
    "use_ema": False,
    "schedule": {"warmup_steps": 1, "peak": 1},
    **changes,
  }


def test_nested_values_arrive_typed():
  run = build(
    Run,
    section(
      levels=[1, 2],
      betas=[0, 1],
      stages=[{"warmup_steps": 2, "peak": 0.5, "shape": "constant"}],
      mixture={"code": 1},
      by_name={"a": {"warmup_steps": 3, "peak": 0.1}},
    ),
  )
  assert run.schedule == Schedule(1, 1.0)
  assert type(run.schedule.peak) is float
  assert run.levels == (1, 2) and run.betas == (0.0, 1.0)
  assert run.stages == (Schedule(2, 0.5, "constant"),)
  assert run.mixture == {"code": 1.0} and type(run.mixture["code"]) is float
  assert run.by_name == {"a": Schedule(3, 0.1)}


def test_config_dict_and_its_references_become_plain():
  c = ml_collections.ConfigDict(section(free={"a": {"b": (1, 2)}}))
  c.decay = ml_collections.FieldReference(0.5)
  c.stages = [ml_collections.ConfigDict({"warmup_steps": 2, "peak": 1.0})]
  run = build(Run, c)
  assert run.decay == 0.5
  assert run.free == {"a": {"b": (1, 2)}} and type(run.free["a"]) is dict
  assert run.stages == (Schedule(2, 1.0),)
  assert plain(c)["schedule"] == {"warmup_steps": 1, "peak": 1}


def test_a_built_section_passes_through():
  schedule = Schedule(1, 1.0)
  assert build(Schedule, schedule) is schedule
  assert build(Run, section(schedule=schedule)).schedule is schedule


def test_numpy_scalars_become_python_scalars():
  run = build(Run, section(seed=np.int64(3), decay=np.float32(0.5)))
  assert type(run.seed) is int and type(run.decay) is float


def test_unions_keep_the_exact_type():
  assert build(Run, section(path="a")).path == "a"
  assert build(Run, section(path=["a", "b"])).path == ("a", "b")


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"sede": 1}, r"^config: unknown key 'sede'; did you mean 'seed'\?"),
    ({"zzzzzz": 1}, r"unknown key 'zzzzzz'\. Run has the keys seed, name,"),
    ({"seed": True}, r"^config\.seed: expected int, got True \(bool\)"),
    ({"seed": 1.5}, r"config\.seed: expected int, got 1\.5 \(float\)"),
    ({"seed": None}, r"config\.seed: expected int, got None \(NoneType\)"),
    ({"decay": "1e-4"}, r"config\.decay: expected float, got '1e-4' \(str\)"),
    ({"decay": True}, r"config\.decay: expected float, got True"),
    ({"decay": float("nan")}, r"config\.decay: is not a number"),
    ({"use_ema": 1}, r"config\.use_ema: expected bool, got 1 \(int\)"),
    ({"name": 3}, r"config\.name: expected str, got 3"),
    ({"levels": 3}, r"config\.levels: expected a list or tuple, got 3"),
    ({"levels": [1, "2"]}, r"config\.levels\[1\]: expected int, got '2'"),
    ({"betas": [0.1]}, r"config\.betas: expected 2 values, got 1"),
    ({"mixture": [1]}, r"config\.mixture: expected a dict, got \[1\]"),
    ({"mixture": {"a": "b"}}, r"config\.mixture\.a: expected float"),
    ({"path": 3}, r"config\.path: expected str \| tuple\[str, \.\.\.\], got 3"),
    ({"schedule": 3}, r"config\.schedule: expected a section with keys, got 3"),
    (
      {"schedule": {"warmup": 1, "peak": 1.0}},
      r"config\.schedule: unknown key 'warmup'; did you mean 'warmup_steps'\?",
    ),
    (
      {"schedule": {"peak": 1.0}},
      r"config\.schedule: missing 'warmup_steps'\..*\(Schedule\)",
    ),
    (
      {"schedule": {"warmup_steps": -1, "peak": 1.0}},
      r"^config\.schedule: warmup_steps=-1 is negative",
    ),
    (
      {"schedule": {"warmup_steps": 1, "peak": 1.0, "shape": "cosin"}},
      r"schedule\.shape: expected one of 'cosine', 'constant', got 'cosin';"
      r" did you mean 'cosine'\?",
    ),
    (
      {"stages": [{"warmup_steps": 1, "peak": 1.0}, {"peak": 1.0}]},
      r"config\.stages\[1\]: missing 'warmup_steps'",
    ),
    (
      {"by_name": {"a": {"peak": 1.0}}},
      r"config\.by_name\.a: missing 'warmup_steps'",
    ),
  ],
)
def test_errors_say_where_what_and_what_instead(changes, text):
  with pytest.raises(ValueError, match=text):
    build(Run, section(**changes))


def test_where_names_the_section():
  with pytest.raises(ValueError, match=r"^eval\.model: unknown key 'x'"):
    build(Schedule, {"x": 1}, "eval.model")


def test_several_misspelt_keys_are_all_named():
  with pytest.raises(ValueError, match=r"'warmup_step'.*'peek'"):
    build(Schedule, {"warmup_step": 1, "peek": 1.0})


@given(
  st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
  )
)
def test_any_data_builds_or_is_a_value_error(value):
  for key in ("seed", "schedule", "levels", "mixture", "path", "free"):
    try:
      build(Run, section(**{key: value}))
    except ValueError as error:
      assert str(error).startswith("config")


def test_importing_config_does_not_import_jax():
  code = "import sys, rlm.config; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
