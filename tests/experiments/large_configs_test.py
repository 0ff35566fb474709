"""The configs of large models, as far as their shapes and their sums."""

import pathlib
import runpy

import jax
import numpy as np
import pytest

from experiments import distill, pretrain, sft
from rlm.checkpoint import initial
from rlm.config import build
from rlm.optim.config import ScheduleConfig
from rlm.optim.schedule import batch_rows
from tests.experiments.pretrain_test import ONE, load


@pytest.mark.parametrize(
  "path",
  [f"configs/pretrain/{n}.py" for n in ("deepseek_v3", "deepseek_v2_lite")],
)
def test_the_large_configs_go_through_a_step_by_its_shapes(path):
  """Nothing of the 671B is computed."""
  # On one device: hundreds are imagined by tools/compile_only.py.
  cfg = build(pretrain.Config, load(path) | dict(mesh=ONE))
  layout, start, step = pretrain.make_training(cfg)
  state = jax.eval_shape(start, initial.shapes(layout.whole))
  b = cfg.batch
  lead = (b.rows // b.microbatch_rows, b.microbatch_rows)
  row = jax.ShapeDtypeStruct((*lead, cfg.data.row_length), np.int32)
  batch = dict.fromkeys(("tokens", "positions", "segment_ids"), row)
  batch["loss_mask"] = jax.ShapeDtypeStruct(row.shape, np.bool_)
  batch["num_live"] = jax.ShapeDtypeStruct((), np.int32)
  batch |= pretrain.make_rates(cfg)(0)
  after, metrics = jax.eval_shape(step, state, batch, jax.random.key(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert metrics["loss"].shape == ()


def test_schedules_of_the_large_configs_end_with_their_steps():
  for name in ("deepseek_v3", "deepseek_v2_lite"):
    cfg = build(pretrain.Config, load(f"configs/pretrain/{name}.py"))
    for schedule in (cfg.schedule, cfg.mtp_weight, cfg.bias_update_rate):
      if isinstance(schedule, ScheduleConfig):
        assert sum(p.steps for p in schedule.phases) == cfg.steps
    rows = [
      batch_rows(
        step,
        first_rows=cfg.batch.first_rows,
        last_rows=cfg.batch.rows,
        ramp_steps=cfg.batch.ramp_steps,
        multiple=cfg.batch.microbatch_rows,
      )
      for step in range(cfg.batch.ramp_steps + 1)
    ]
    tokens = (sum(rows[:-1]) + (cfg.steps - len(rows) + 1) * rows[-1]) * 4096
    trained_on = {"deepseek_v3": 14.8e12, "deepseek_v2_lite": 5.7e12}[name]
    assert abs(tokens / trained_on - 1) < 0.002


@pytest.mark.parametrize("phase", ["32k", "128k"])
def test_the_extension_of_the_context_is_as_published(phase):
  """1000 steps of 62.9B tokens in all, each row on several chips."""
  c = load_phase(phase)
  cfg = build(pretrain.Config, c)
  assert cfg.model.max_position_embeddings == cfg.data.row_length
  tokens = cfg.steps * cfg.batch.rows * cfg.data.row_length
  assert tokens == pytest.approx(62.9e9, rel=1e-3)
  assert cfg.mesh.devices == 512
  assert cfg.mesh.context > 1
  rate = pretrain.make_rates(cfg)(cfg.steps - 1)
  assert rate["learning_rate"] == pytest.approx(7.3e-6)
  assert rate["bias_update_rate"] == 0
  queries = cfg.batch.microbatch_rows * cfg.data.row_length // 512
  assert queries % cfg.model.attention_chunk == 0


def test_another_phase_is_refused():
  with pytest.raises(ValueError, match="'64k' is none of 4k, 32k, 128k"):
    load_phase("64k")


def load_phase(phase):
  path = "configs/pretrain/deepseek_v3.py"
  return runpy.run_path(path)["get_config"](phase)


def test_configs_of_fine_tuning_pass_its_checks():
  for path in pathlib.Path("configs/sft").glob("*.py"):
    c = load(str(path))
    if (
      c["init_from"] is not None
    ):  # else the sizes are those of a model to come
      sft.check(build(sft.Config, c))
  for path in pathlib.Path("configs/distill").glob("*.py"):
    distill.check(build(distill.Config, load(str(path))))
