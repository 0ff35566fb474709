"""Mistakes in a recipe are told before its first stage, wherever they are."""

import json

import jax
import pytest

from experiments import r1
from rlm.config import plain
from tests.experiments import shrunk_laptop

COMPILED = []  # a name for each program that jax compiled in this process
jax.monitoring.register_event_duration_secs_listener(
  lambda name, *_, **__: COMPILED.append(name) if "compile" in name else None
)
REMOVED = object()


def recipe(changes):
  """The shrunk laptop recipe with changes by dotted key."""
  c = plain(shrunk_laptop.get_config())
  for path, value in changes.items():
    *sections, key = path.split(".")
    section = c
    for name in sections:
      section = section[name]
    if value is REMOVED:
      del section[key]
    else:
      section[key] = value
  return c


def refused(tmp_path, message, changes):
  """Checks that a recipe stops with `message`, and that it did nothing."""
  compiled = len(COMPILED)
  with pytest.raises(ValueError, match=message):
    r1.run(recipe(changes), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
  assert len(COMPILED) == compiled, COMPILED[compiled:]


def test_programs_would_be_counted():
  compiled = len(COMPILED)
  jax.jit(lambda x: x + 1)(1.0)
  assert len(COMPILED) > compiled


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"stages.rl.group_sise": 4},
      r"config\.stages\.rl: unknown key 'group_sise'; did you mean"
      r" 'group_size'",
    ),
    (
      {"stages.rl.selection.num_minibatch": 4},
      r"stages\.rl\.selection: unknown key 'num_minibatch'; did you mean"
      r" 'num_minibatches'",
    ),
    (
      {"stages.pretrain.data.sources.stdlib.max_byte": 4},
      r"stages\.pretrain\.data: sources\.stdlib: unknown key 'max_byte'; did"
      r" you mean 'max_bytes'",
    ),
    (
      {"stages.rl.sampling.temprature": 1.0},
      r"config\.stages\.rl\.sampling: unknown key 'temprature'; did you mean",
    ),
    ({"evaluate.slot": 4}, r"config\.evaluate: unknown key 'slot'; did you"),
    ({"modls": {}}, r"config: unknown key 'modls'; did you mean 'models'"),
    ({"stages.rl.slots": REMOVED}, r"config\.stages\.rl: missing 'slots'"),
    ({"stages.sft.evaluate": REMOVED}, r"config\.stages\.sft lacks evaluate"),
    (
      {"stages.rl.steps": "many"},
      r"config\.stages\.rl\.steps: expected int, got 'many'",
    ),
    ({"task.name": "column_adition"}, r"task.*'column_adition'; did you mean"),
    ({"task.name": REMOVED}, r"task: expected a section with the key 'name'"),
    ({"task.slip": 2.0}, r"task: slip is 2\.0, but is a share"),
    (
      {"stages.rl.rewards": {"acuracy": 1.0}},
      r"stage 'rl': rewards: unknown reward 'acuracy'; did you mean 'accuracy'",
    ),
    ({"tokenizer": "nowhere"}, r"stage 'pretrain': no file nowhere/tokenizer"),
  ],
)
def test_keys_and_names(tmp_path, changes, message):
  refused(tmp_path, message, changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"order": ("pretrain", "rl")},
      r"order=\['pretrain', 'rl'\] must name each of the stages",
    ),
    (
      {
        "order": (
          *("pretrain", "cold_start", "sft", "rl", "rejection", "rl_final"),
          *("student_pretrain", "distill"),
        )
      },
      r"config\.stages\.sft reads 'stage:rejection/messages\.jsonl', but"
      r" 'rejection' is not a stage before it: pretrain, cold_start\.",
    ),
    (
      {"stages.rl.init_from": "stage:rl"},
      r"stages\.rl reads 'stage:rl', but 'rl' is not a stage before it",
    ),
    (
      {"stages.rl.experiment": "rll"},
      r"stages\.rl\.experiment='rll' must be one of pretrain, sft, rl",
    ),
    (
      {"stages.rl.model": "modle"},
      r"stages\.rl\.model='modle' is not among .* did you mean 'model'",
    ),
    (
      {"stages.distill.init_from": "stage:pretrain"},
      r"(?s)stage 'distill': config\.init_from=.*/pretrain' holds another"
      r" model; saved -> needed:.*intermediate_size: 64 -> 32",
    ),
    (
      {
        "stages.distill.model": "model",
        "stages.distill.init_from": "stage:pretrain",
      },
      r"stage 'distill': config\.model: a student is dense, but",
    ),
    (
      {"stages.cold_start.init_from": None},
      r"stage 'cold_start': config\.init_from is None: fine-tuning starts",
    ),
    (
      {"stages.sft.init_from": "stage:rejection"},
      r"stages\.sft\.init_from='stage:rejection' is a stage that trains no",
    ),
    (
      {"stages.rejection.evaluate": True},
      r"stages\.rejection\.evaluate=True, but the stage trains no model",
    ),
    (
      {"rl_gain": ("rejection", "rl")},
      r"compare evaluated stages, and 'rejection' is not among pretrain, cold",
    ),
  ],
)
def test_stages_that_do_not_fit_together(tmp_path, changes, message):
  refused(tmp_path, message, changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"models.model.num_attention_heads": 0},
      r"stages\.pretrain\.model: num_attention_heads=0 must be at least 1",
    ),
    (
      {"models.model.qk_rope_head_dim": 7},
      r"stages\.pretrain\.model: qk_rope_head_dim=7 must be even",
    ),
    (
      {"models.model.n_group": 3},
      r"n_group=3 does not divide n_routed_experts=4",
    ),
    (
      {"models.model.num_experts_per_tok": 5},
      r"num_experts_per_tok=5 must lie between 1 and the 4 experts",
    ),
    (
      {"models.student.first_k_dense_replace": 3},
      r"stages\.student_pretrain\.model: first_k_dense_replace=3 must lie",
    ),
    (
      {"models.model.n_vocab_used": 200},
      r"stage 'pretrain': config\.model\.n_vocab_used=200, but the tokenizer"
      r" 'bytes' uses 268 ids",
    ),
    (
      {"stages.sft.batch.rows": 20},
      r"stages\.sft\.batch: first_rows=16 and rows=20 must be multiples of"
      r" microbatch_rows=8",
    ),
    (
      {"stages.rl_final.prompts_per_step": 3},
      r"stages\.rl_final: .*rows_per_rollout=16 of a rollout of 12",
    ),
    (
      {"stages.rl.selection.microbatch_rows": 5},
      r"stages\.rl\.selection: rows_per_rollout=16 does not split into",
    ),
    (
      {"stages.sft.data.row_length": 65},
      r"stages\.sft: data\.row_length=65 exceeds model\.max_position_embeddings"
      r"=64",
    ),
  ],
)
def test_impossible_sizes(tmp_path, changes, message):
  refused(tmp_path, message, changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"stages.rl_final.curriculum.levels": (2, 9)},
      r"stage 'rl_final': config\.curriculum\.levels asks column_addition for"
      r" level 9, but it has levels 2",
    ),
    (
      {
        "stages.rejection.rejection.levels": (2, 9),
        "stages.rejection.rejection.problems_per_level": (2, 2),
      },
      r"stage 'rejection': config\.rejection\.levels asks .* level 9",
    ),
    (
      {"evaluate.evaluation.levels": (2, 9)},
      r"the evaluation of 'pretrain': config\.evaluation\.levels asks .* 9",
    ),
    (
      {"stages.student_pretrain.data.sources.columns.levels": (2, 9)},
      r"stage 'student_pretrain': data source 'columns': .* level 9",
    ),
    (
      {"stages.distill.eval.levels": (9,)},
      r"stage 'distill': .* level 9, but it has",
    ),
    (
      {"stages.rl.prompt_length": 9},
      r"stage 'rl': config\.prompt_length=9 has no room for the prompt"
      r" '.*' of level 2, 10 tokens with its markers\. Make it at least 10",
    ),
    (
      {"stages.rejection.prompt_length": 9},
      r"stage 'rejection': config\.prompt_length=9 has no room",
    ),
    (
      {"evaluate.prompt_length": 9},
      r"the evaluation of 'pretrain': config\.prompt_length=9 has no room",
    ),
    (
      {"stages.rl.sampling.max_new_tokens": 24},
      r"stage 'rl': config\.sampling\.max_new_tokens=24 cuts off every worked"
      r" solution of level 2: the shortest has 25 tokens.* Make it at least 25",
    ),
    (
      {"evaluate.sampling.max_new_tokens": 24},
      r"the evaluation of 'pretrain': .*max_new_tokens=24 cuts off every",
    ),
    (
      {"stages.rl.sampling.max_new_tokens": 55},
      r"stage 'rl': prompt_length=10 and max_new_tokens=55 need 65 positions;"
      r" the model has max_position_embeddings=64",
    ),
    (
      {"stages.student_pretrain.data.row_length": 30},
      r"stage 'student_pretrain': data source 'columns': a problem of level=2"
      r" is 35 tokens long, but a row has row_length=30",
    ),
    (
      {"evaluate.evaluation.problems_per_level": 5000},
      r"the evaluation of 'pretrain': 5000 distinct problems were asked",
    ),
    (
      {"stages.rl.sampling.temperature": 0.0},
      r"stage 'rl': config\.sampling: RL needs temperature > 0",
    ),
    (
      {"evaluate.sampling.stop_tokens": (3,)},
      r"the evaluation of 'pretrain': .* own EOS may end",
    ),
  ],
)
def test_problems_that_cannot_be_had_or_solved(tmp_path, changes, message):
  refused(tmp_path, message, changes)


TEXT = dict(
  kind="text",
  weight=1.0,
  layout="cross_document",
  heldout_fraction=0.0,
  fim_rate=0.0,
  suffixes=(".txt",),
)
CHAT = dict(kind="messages", weight=1.0, layout="isolated")


def conversation(answer="yes"):
  messages = [
    {"role": "user", "content": "really?"},
    {"role": "assistant", "content": answer},
  ]
  return json.dumps({"messages": messages}).encode() + b"\n"


@pytest.mark.parametrize(
  ("source", "content", "message"),
  [
    (TEXT, None, r"no file or folder .*/own\. Check the path in the config"),
    (TEXT, {}, r"folder .*/own holds no file ending in \.txt; it has none"),
    (TEXT, {"a.txt": b""}, r"every one of the 1 files in .*/own is empty"),
    (
      TEXT,
      {"a.txt": b"fine\nna\xefve\n"},
      r"own/a\.txt:2: byte 0xef is not UTF-8",
    ),
    (CHAT, None, r"no file .*/own\. Check the path"),
    (CHAT, b"", r"own is empty: it has no line with an object"),
    (CHAT, conversation() + b"\xff\n", r"own:2: byte 0xff at column 1 is not"),
    (CHAT, conversation() + b"{'a'", r"own:2: invalid JSON at column 2"),
    (
      CHAT,
      conversation() + conversation("long" * 10),
      r"own:2: this conversation is 51 tokens long, but a row has"
      r" row_length=48",
    ),
  ],
)
def test_data_of_a_late_stage(tmp_path, source, content, message):
  own = tmp_path / "own"
  if isinstance(content, dict):
    own.mkdir()
    for name, data in content.items():
      (own / name).write_bytes(data)
  elif content is not None:
    own.write_bytes(content)
  refused(
    tmp_path,
    "(?s)stage 'sft': data source 'own': .*" + message,
    {"stages.sft.data.sources.own": source | dict(path=str(own))},
  )


def test_a_recipe_without_mistakes_is_not_refused(tmp_path, monkeypatch):
  def reached(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr("experiments.pretrain.run", reached)
  with pytest.raises(KeyboardInterrupt):
    r1.run(recipe({}), str(tmp_path / "run"))
  assert (tmp_path / "run" / "config.json").exists()
