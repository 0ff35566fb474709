import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rlm.checkpoint import initial
from rlm.checkpoint.manager import CheckpointManager
from rlm.models.transformer import Transformer
from rlm.train import init_state
from tests.tiny_model import lay, tiny_config, tiny_model

SMALL = dict(num_hidden_layers=1, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run's folder, as far as a later stage reads it."""
  folder = tmp_path_factory.mktemp("run")
  model, variables = tiny_model(**SMALL, first_k_dense_replace=0)
  section = dataclasses.asdict(model.cfg)
  (folder / "config.json").write_text(json.dumps({"model": section}))
  (folder / "summary.json").write_text("{}")
  with CheckpointManager(folder / "checkpoints", keep=1) as manager:
    manager.save(3, init_state(variables, optax.sgd(1.0), ema_decay=None))
  return folder


def model_with(**changes):
  return Transformer(
    tiny_config(**{**SMALL, "first_k_dense_replace": 0, **changes})
  )


def test_the_newest_weights_of_a_run(run):
  _, saved = tiny_model(**SMALL, first_k_dense_replace=0)
  # How it is computed may differ, and the context may widen.
  model = model_with(
    dtype="bfloat16", remat="block", max_position_embeddings=128
  )
  found = initial.initial_variables(lay(model), str(run), jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, found, saved)
  assert "expert_bias" in str(jax.tree_util.tree_structure(found))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(hidden_size=20), "hidden_size: 16 -> 20"),
    (dict(num_experts_per_tok=1), "num_experts_per_tok: 2 -> 1"),
    (dict(param_dtype="bfloat16"), "param_dtype: 'float32' -> 'bfloat16'"),
  ],
)
def test_another_model_is_refused(run, changes, message):
  model = model_with(**changes)
  with pytest.raises(ValueError, match=message):
    initial.initial_variables(lay(model), str(run), jax.random.key(0))


def test_an_unfinished_run_is_pointed_out(run, tmp_path):
  for name in ("config.json", "checkpoints"):
    (tmp_path / name).symlink_to(run / name)
  model = model_with()
  with pytest.warns(UserWarning, match="is a run that has not finished"):
    initial.initial_variables(lay(model), str(tmp_path), jax.random.key(0))


def test_bare_checkpoints_are_compared_by_their_arrays(run, tmp_path):
  (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
  model = model_with(hidden_size=20)
  with pytest.raises(ValueError, match="holds another model"):
    initial.initial_variables(lay(model), str(tmp_path), jax.random.key(0))


def test_random_weights_without_a_run():
  model = model_with(first_k_dense_replace=1)
  a, b, c = (
    initial.initial_variables(lay(model), None, jax.random.key(seed))
    for seed in (0, 0, 1)
  )
  assert initial.digest(a) == initial.digest(b) != initial.digest(c)
  assert jax.tree.structure(a) == jax.tree.structure(initial.shapes(model))
  std = float(a["params"]["head"].std())
  assert std == pytest.approx(0.2, rel=0.2)


def test_the_digest_tells_names_and_bits_apart():
  x = jnp.arange(4, dtype=jnp.bfloat16)
  digests = {
    initial.digest(tree)
    for tree in ({"a": x}, {"b": x}, {"a": x.at[3].add(1)}, {"a": x, "c": x})
  }
  assert len(digests) == 4


def test_a_digest_is_of_values_and_places_not_of_devices(monkeypatch):
  x = jax.random.normal(jax.random.key(0), (4, 8, 16))
  tree = {"a": x, "b": x[0].astype(jnp.bfloat16), "c": jnp.int32(3)}
  digest = initial.digest(tree)
  mesh = jax.make_mesh((2, 4), ("i", "j"))
  for spec in (P(), P("i", "j"), P(None, ("j", "i")), P("j", None, "i")):
    place = jax.sharding.NamedSharding(mesh, spec)
    assert initial.digest({**tree, "a": jax.device_put(x, place)}) == digest
  monkeypatch.setattr(initial, "_WEIGHED_BYTES", 100)  # in pieces
  assert initial.digest(tree) == digest
  swapped = x.at[0, 0, 0].set(x[0, 0, 1]).at[0, 0, 1].set(x[0, 0, 0])
  others = [swapped, x[::-1], x.swapaxes(1, 2).reshape(x.shape), x + 1e-6]
  different = {initial.digest({**tree, "a": other}) for other in others}
  assert len(different | {digest}) == 5
  renamed = {"z" if name == "a" else name: y for name, y in tree.items()}
  assert initial.digest(renamed) != digest
