"""What is kept of a policy's samples, by hand and by property."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.data.chat import Trace, load_messages, save_messages
from rlm.data.template_chat import TemplateChat
from rlm.rewards.registry import Scored, Scorer
from rlm.rl import rejection
from rlm.rl.config import RejectionConfig
from rlm.rl.rejection import Sample
from rlm.tasks.registry import make_task
from tests.data import published_folder as published
from tests.rl.chooser import Chooser, broken, cut, longer, marked
from tests.rl.reciter import CHAT, TASK, TOKENIZER, right, wrong

SCORER = Scorer(TASK, {"accuracy": 1.0, "format": 0.1})
PROBLEM = TASK.problem(0, 0, 2, "train")


def config(**changes):
  fields = dict(
    levels=(2, 3),
    problems_per_level=(4, 3),
    samples_per_problem=6,
    require_steps=False,
    keep_per_problem=2,
    problems_per_chunk=3,
  )
  return RejectionConfig(**{**fields, **changes})


def sample(text, length, *, correct=True, steps=True, readable=True):
  score = Scored(1.0, {}, correct, True, steps, "")
  return Sample(PROBLEM, text, length, 5, True, score, readable)


def texts(kept):
  return [s.text for s in kept]


def drawn(cfg, problems, first=0, ways=None, seed=1):
  extra = {} if ways is None else {"ways": ways}
  return rejection.sample_chunk(
    Chooser(problems, **extra),
    None,
    problems,
    first,
    CHAT,
    SCORER,
    jax.random.key(seed),
    samples_per_problem=cfg.samples_per_problem,
  )


def test_the_shortest_different_right_answers_are_kept():
  samples = [
    sample("long", 9),
    sample("short", 4),
    sample("wrong", 1, correct=False),
    sample("short", 4),
    sample("unreadable", 2, readable=False),
    sample("middle", 6, steps=False),
    sample("also 4", 4),
  ]
  kept = rejection.select(samples, config(keep_per_problem=3))
  assert texts(kept) == ["short", "also 4", "middle"]
  kept = rejection.select(
    samples, config(keep_per_problem=3, require_steps=True)
  )
  assert texts(kept) == ["short", "also 4", "long"]
  assert texts(rejection.select(samples, config(keep_per_problem=1))) == [
    "short"
  ]
  assert rejection.select(samples[2:3], config()) == []


@given(
  st.lists(
    st.tuples(
      st.sampled_from("abcd"),
      st.integers(1, 9),
      st.booleans(),
      st.booleans(),
    ),
    max_size=12,
  ),
  st.integers(1, 4),
  st.booleans(),
)
def test_selection_keeps_the_shortest_distinct_accepted_samples(
  drawn, keep, steps
):
  cfg = config(keep_per_problem=keep, require_steps=steps)
  samples = [sample(t, n, correct=c, steps=s) for t, n, c, s in drawn]
  kept = rejection.select(samples, cfg)
  accepted = [s for s in samples if s.score.correct]
  if steps:
    accepted = [s for s in accepted if s.score.steps_correct]
  assert all(s in accepted for s in kept)
  assert len(set(texts(kept))) == len(kept)
  assert len(kept) == min(keep, len({s.text for s in accepted}))
  assert [s.length for s in kept] == sorted(s.length for s in kept)
  assert rejection.select(kept, cfg) == kept


def test_verdicts_of_sampled_text(tmp_path):
  ways = (right, wrong, longer, marked, broken, cut)
  for way in ways:
    cfg = config(samples_per_problem=2)
    (row,) = drawn(cfg, [PROBLEM], ways=(way,))
    kept = rejection.select(row, cfg)
    assert len(kept) == (way in (right, longer)), way
    assert row[0].length == len(way(PROBLEM))
    # What is kept comes back, as fine-tuning data, as the tokens sampled.
    for s in kept:
      path = tmp_path / "kept.jsonl"
      save_messages(path, [Trace(PROBLEM.prompt, s.text)])
      [(tokens, mask)] = load_messages(path, CHAT, row_length=1000)
      asked = CHAT.encode_prompt(PROBLEM.prompt)
      assert tokens == [*asked, *way(PROBLEM)]
      assert sum(mask) == len(way(PROBLEM))
  strict = config(samples_per_problem=2, require_steps=True)
  (row,) = drawn(strict, [PROBLEM], ways=(longer,))
  assert row[0].score.correct and rejection.select(row, strict) == []


@pytest.mark.parametrize("template", ["R1", "CHATML", "V2"])
def test_what_a_template_would_change_is_not_kept(tmp_path, template):
  folder = tmp_path / "model"
  if template == "CHATML":
    published.write_qwen(folder)
  else:
    published.write_deepseek(folder, getattr(published, template))
  chat = TemplateChat(folder)
  said = chat.encode_response("1+1=2", "2")[:-1]
  text = chat.response_text(said)
  assert rejection.comes_back(chat, PROBLEM, text)
  assert not rejection.comes_back(chat, PROBLEM, text + "\n")
  assert not rejection.comes_back(chat, PROBLEM, text.replace("</think>", ""))


def test_problems_are_distinct_training_problems_of_the_asked_counts():
  cfg = config(levels=(2, 4), problems_per_level=(30, 20))
  problems = rejection.draw_problems(TASK, cfg, seed=5)
  assert not any(TASK.is_heldout(p) for p in problems)
  assert len({p.identity for p in problems}) == len(problems) == 50
  levels = [p.level for p in problems]
  assert (levels.count(2), levels.count(4)) == (30, 20)
  assert levels != sorted(levels)  # mixed, so that chunks cost alike
  assert problems == rejection.draw_problems(TASK, cfg, seed=5)
  assert problems != rejection.draw_problems(TASK, cfg, seed=6)


def test_samples_do_not_depend_on_how_problems_are_cut_into_chunks():
  cfg = config()
  problems = rejection.draw_problems(TASK, cfg, seed=0)
  whole = drawn(cfg, problems)
  cut_up = [
    row
    for first in range(0, len(problems), 2)
    for row in drawn(cfg, problems[first : first + 2], first)
  ]
  assert whole == cut_up
  assert whole != drawn(cfg, problems, seed=2)
  # Every request has a key of its own, so a problem's samples differ.
  assert len({s.text for s in whole[0]}) > 1


def test_counts_add_up_over_chunks_and_levels():
  cfg = config(require_steps=True)
  problems = rejection.draw_problems(TASK, cfg, seed=0)
  samples = drawn(cfg, problems)
  whole = rejection.count_chunk(samples, cfg)
  parts = [rejection.count_chunk(samples[i : i + 3], cfg) for i in (0, 3, 6)]
  assert [p.keys() for p in parts] == [whole.keys()] * 3
  totals = rejection.total_counts([p | {"step": 1} for p in parts], cfg)
  levels = totals.pop("levels")
  assert totals == {k: v for k, v in whole.items() if "/" not in k}
  for name, number in totals.items():
    assert number == sum(levels[k][name] for k in ("2", "3"))
  assert totals["problems"] == 7 and totals["sampled"] == 42
  assert levels["2"]["problems"] == 4
  # By hand: of this chooser's six ways, four are right by their answer (one
  # of them cut off, which counts as nothing), and two of those unreadable.
  flat = [s for row in samples for s in row]
  said = {s.text for s in flat if s.score.correct and s.readable}
  assert totals["correct"] > totals["verified"] >= totals["accepted"]
  assert totals["accepted"] == sum(
    s.text in said and s.score.steps_correct for s in flat
  )
  assert totals["solved"] == totals["kept"] <= 7  # one right text a problem
  assert totals["kept_tokens"] == sum(
    min(s.length for s in row if s.text in said and s.score.steps_correct)
    for row in samples
    if rejection.select(row, cfg)
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(levels=()), "must name one or more levels"),
    (dict(levels=(2, 2)), "each once"),
    (dict(problems_per_level=(4,)), r"needs one number for each of levels"),
    (dict(problems_per_level=(4, 0)), "each must be at least 1"),
    (dict(samples_per_problem=0), "samples_per_problem=0"),
    (dict(problems_per_chunk=0), "problems_per_chunk=0"),
    (dict(keep_per_problem=7), "exceeds samples_per_problem=6"),
  ],
)
def test_impossible_numbers_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    config(**changes)


def test_steps_cannot_be_required_of_a_task_that_knows_answers_only(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_text('{"prompt": "2+2?", "answer": "4"}\n')
  answers_only = make_task(
    dict(
      name="jsonl",
      heldout_fraction=0.0,
      path=str(path),
      max_line_bytes=1000,
    )
  )
  cfg = config(levels=answers_only.levels, problems_per_level=(1,))
  assert len(rejection.draw_problems(answers_only, cfg, 0)) == 1
  strict = dataclasses.replace(cfg, require_steps=True)
  with pytest.raises(ValueError, match="cannot check steps"):
    rejection.draw_problems(answers_only, strict, 0)


def test_unknown_levels_are_refused():
  with pytest.raises(ValueError, match=r"config.rejection.levels asks"):
    rejection.draw_problems(TASK, config(levels=(2, 99)), seed=0)


def test_bytes_that_are_no_text_are_unreadable():
  for tokens, readable in (
    ([104, 105], True),
    ([TOKENIZER.think_id, 104, TOKENIZER.end_answer_id], True),
    ([0xC3, 0xA9], True),  # é
    ([0xC3], False),
    ([104, TOKENIZER.pad_id], False),
    ([TOKENIZER.answer_id, *b"</answer>"], False),  # letters, not the marker
  ):
    tokens = np.array(tokens, np.int32)
    assert rejection.is_readable(TOKENIZER, tokens) is readable
