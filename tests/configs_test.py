"""Every config file still runs: as far as the shapes of its models."""

import ast
import dataclasses
import functools
import importlib
import json
import pathlib
import re
import runpy
import tempfile

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from experiments import r1, rl, study
from experiments.from_checkpoint import fill_model
from rlm.config import build
from rlm.data.byte_tokenizer_files import write_byte_tokenizer
from rlm.models.config import ModelConfig
from rlm.models.layout import check_model_fits
from rlm.models.transformer import Transformer
from rlm.parallel.config import MeshConfig
from rlm.tasks.registry import make_task
from tests.parity.cases import CONFIGS

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = [
  str(path.relative_to(ROOT))
  for path in sorted((ROOT / "configs").rglob("*.py"))
  if path.name != "__init__.py"
]
FILES += [
  f"configs/pretrain/deepseek_v3.py:{phase}" for phase in ("32k", "128k")
]


def experiment_of(file: str) -> str:
  """The experiment that the command in the file's docstring runs it by."""
  file = file.partition(":")[0]
  docstring = ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""
  command = re.sub(r"\\\n\s*", "", docstring)  # join continued lines
  match = re.search(rf"python -m experiments\.(\w+)\s+--config={file}", command)
  assert match, f"{file}: its docstring lacks its command, --config={file}"
  return match[1]


@functools.cache
def typed_configs(file: str) -> list:
  """The config as its experiment reads it, and those of a recipe's stages."""
  file, *text = file.split(":")
  config = runpy.run_path(str(ROOT / file))["get_config"](*text)
  assert isinstance(config, ml_collections.ConfigDict)
  if "vocab_size" not in config.get("model", {"vocab_size": 0}):
    config.init_from = published_folder()
    config = fill_model(config, "unused")
  module = importlib.import_module(f"experiments.{experiment_of(file)}")
  typed = build(module.Config, config)
  recipes = []
  if module is r1:
    recipes = [typed]
  elif module is study:
    recipe = study.load_recipe(typed, seed=typed.seeds[0])
    recipe = study.add_controls(typed, recipe, control_steps=1)
    recipes = [build(r1.Config, recipe)]
  stages = [
    r1.stage_config(recipe, name, pathlib.Path("workdir"))
    for recipe in recipes
    for name in recipe.order
  ]
  return [typed, *(build(stage.Config, c) for stage, c in stages)]


@functools.cache
def published_folder() -> str:
  """A model's folder for the configs that leave the sizes to one."""
  folder = pathlib.Path(tempfile.mkdtemp())
  fields = CONFIGS["qwen2"] | {
    "vocab_size": 272,
    "max_position_embeddings": 8192,
  }
  (folder / "config.json").write_text(json.dumps(fields))
  write_byte_tokenizer(folder)
  return str(folder)


def sections_of(section, name: str = ""):
  """(name, value) of a section and of all below it, typed or plain."""
  yield name, section
  if dataclasses.is_dataclass(section):
    fields = dataclasses.fields(section)
    items = [(f.name, getattr(section, f.name)) for f in fields]
  elif isinstance(section, dict):
    items = list(section.items())
  elif isinstance(section, (list, tuple)):
    items = [(name, value) for value in section]
  else:
    return
  for key, value in items:
    yield from sections_of(value, key)


# Sections that stay plain in Config, because their classes depend on a name
# inside; experiments build them first thing in run().
PLAIN = {
  "task": make_task,
  "tasks": lambda tasks: [make_task(task) for task in tasks.values()],
}


@functools.cache  # most configs share a model
def shapes_of(cfg: ModelConfig):
  row = jax.ShapeDtypeStruct((2, 8), jnp.int32)
  init = Transformer(cfg).init
  return jax.eval_shape(init, jax.random.key(0), row, row, row)


def test_there_are_configs():
  assert "configs/r1/laptop.py" in FILES


@pytest.mark.parametrize("file", FILES)
def test_config_is_what_its_experiment_reads(file, monkeypatch):
  monkeypatch.chdir(ROOT)  # configs name files from there
  for name, section in sections_of(typed_configs(file)):
    if name in PLAIN and isinstance(section, dict):
      PLAIN[name](section)


@pytest.mark.parametrize("file", FILES)
def test_models_have_shapes(file, monkeypatch):
  monkeypatch.chdir(ROOT)
  sections = [section for _, section in sections_of(typed_configs(file))]
  for cfg in {s for s in sections if isinstance(s, ModelConfig)}:
    leaves = jax.tree.leaves(shapes_of(cfg)["params"])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(cfg.param_dtype)}


@pytest.mark.parametrize("file", FILES)
def test_meshes_fit_what_lies_on_them(file, monkeypatch):
  """Heads, experts, matrices and slots divide, on however many devices.

  That the rows of updates do is checked where the config is built.
  """
  monkeypatch.chdir(ROOT)
  for typed in typed_configs(file):
    model = getattr(typed, "model", None)
    for name in ("mesh", "sampling_mesh"):
      mesh = getattr(typed, name, None)
      assert mesh is None or isinstance(mesh, MeshConfig)
      if mesh is not None and isinstance(model, ModelConfig):
        check_model_fits(model, mesh, name)
    if (mesh := getattr(typed, "sampling_mesh", None)) is not None:
      mesh.check_rows("sampling_mesh", "slots", typed.slots)
      assert mesh.context == 1


def test_every_run_says_on_which_devices(monkeypatch):
  monkeypatch.chdir(ROOT)
  names = {
    file: {
      name
      for typed in typed_configs(file)
      for name, section in sections_of(typed)
      if isinstance(section, MeshConfig)
    }
    for file in FILES
  }
  assert names["configs/pretrain/laptop.py"] == {"mesh"}
  assert names["configs/rl/laptop.py"] == {"mesh", "sampling_mesh"}
  assert names["configs/evaluate/laptop.py"] == {"sampling_mesh"}
  assert [file for file, found in names.items() if not found] == []


@pytest.mark.parametrize(
  "file", [f for f in FILES if f.startswith("configs/rl/")]
)
def test_rl_could_begin(file, monkeypatch):
  """Levels, prompts and worked solutions fit the rows of the sampler."""
  monkeypatch.chdir(ROOT)
  (typed,) = typed_configs(file)
  rl.check_inputs(typed, pending=pathlib.Path("unused"))
