"""A published model's folder, small enough to be made in a moment."""

import json

import jax
import numpy as np

from rlm.checkpoint.export import export_published
from rlm.checkpoint.published_names import leaf_name
from tests.data.published_folder import R1, write_json
from tests.data.published_folder import write_deepseek as write_tokenizer
from tests.tiny_model import tiny_model

CONTEXT = 96
VOCAB = 320  # more rows than the tokenizers have ids, as published ones do


def write_weights(folder, **changes):
  """config.json and random weights; returns the config."""
  model, variables = tiny_model(
    **{
      **dict(
        vocab_size=VOCAB,
        n_vocab_used=VOCAB,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        max_position_embeddings=CONTEXT,
        initializer_range=0.02,
      ),
      **changes,
    }
  )
  leaves = {
    leaf_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
  }

  def read(leaf, tensor):
    part = np.asarray(leaves[leaf][tensor.place])
    return part.T if tensor.transposed else part

  export_published(folder, model.cfg, variables, read, stored="float32")
  return model.cfg


def write_deepseek(folder, template=R1, **generation):
  """One in the style of DeepSeek-R1, whose prompt opens thinking."""
  write_weights(folder)
  write_tokenizer(folder, template)
  if template is None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    write_json(folder, "tokenizer_config.json", **config)
  if generation:
    write_json(folder, "generation_config.json", **generation)
  return folder
