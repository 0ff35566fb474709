"""Rejection sampling: a policy's own right answers become fine-tuning data.

R1's third stage (2501.12948, section 3): sample every training problem n
times, keep what is right and readable, drop repetitions, prefer the shorter.
Selection looks at one problem at a time, so that a run can go chunk by chunk.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlm.data.chat import Chat
from rlm.data.tokenizer import (
  ANSWER,
  END_ANSWER,
  END_THINK,
  THINK,
  Vocabulary,
)
from rlm.rewards.answering import Sampler, Scorer, answer_problems
from rlm.rewards.registry import Scored
from rlm.rl.config import RejectionConfig
from rlm.tasks.base import Problem, Task
from rlm.tasks.draws import Draws


@dataclasses.dataclass(frozen=True)
class Sample:
  """One completion with its verdict.

  Attributes:
    problem: what was asked.
    text: the completion, without EOS.
    length: tokens, EOS included.
    prompt_length: tokens.
    finished: ended by EOS.
    score: the verdict.
    readable: its tokens are text, and markers no other than the format's, and
      fine-tuning would read that text back; all else has no faithful spelling.
  """

  problem: Problem
  text: str
  length: int
  prompt_length: int
  finished: bool
  score: Scored
  readable: bool


def draw_problems(task: Task, cfg: RejectionConfig, seed: int) -> list[Problem]:
  """Different training problems of all levels, in a random order.

  Mixed, so that every chunk costs about the same and shows every level.

  Args:
    task: the family.
    cfg: which levels, how many.
    seed: of the problems and their order.

  Returns:
    The problems; fewer than `cfg.num_problems` where two levels share some.

  Raises:
    ValueError: the task lacks a level or has too few problems there, or its
      steps cannot be checked although `require_steps` asks for it.
  """
  task.check_levels(cfg.levels, "config.rejection.levels")
  if cfg.require_steps and not task.has_worked_solutions:
    raise ValueError(
      f"config.rejection.require_steps=True, but {task.name} cannot check"
      " steps: it knows answers only. Set it to False."
    )
  problems = {
    (problem.task, problem.identity): problem
    for level, count in zip(cfg.levels, cfg.problems_per_level, strict=True)
    for problem in task.distinct_problems(seed, count, level, "train")
  }
  return Draws("rejection", seed).shuffled(list(problems.values()))


def sample_chunk(
  sampler: Sampler,
  variables: Any,
  problems: Sequence[Problem],
  first: int,
  chat: Chat,
  scorer: Scorer,
  key: jax.Array,
  *,
  samples_per_problem: int,
) -> list[list[Sample]]:
  """Draws and scores n samples of each of some consecutive problems.

  Args:
    sampler: draws, at the temperature it was built with.
    variables: of the policy.
    problems: P problems.
    first: place of the first of them among all problems.
    chat: encodes prompts, decodes completions.
    scorer: judges texts.
    key: sample s of the problem at place i is drawn with
      fold_in(fold_in(key, i), s), however the problems are cut into chunks.
    samples_per_problem: n.

  Returns:
    [P][n] samples.

  Raises:
    ValueError: a prompt is too long for the sampler or the model.
  """
  n = samples_per_problem
  places = np.arange(first, first + len(problems), dtype=np.int32)
  keys = jax.vmap(
    lambda i: jax.vmap(
      lambda s: jax.random.fold_in(jax.random.fold_in(key, i), s)
    )(np.arange(n, dtype=np.int32))
  )(places).reshape(-1)
  answers = answer_problems(
    sampler,
    variables,
    problems,
    chat,
    scorer,
    keys,
    samples_per_problem=n,
  )
  samples = [
    Sample(
      problem=problem,
      text=answers.texts[i],
      length=int(answers.completions.lengths[i]),
      prompt_length=len(answers.prompts[i]),
      finished=bool(answers.completions.finished[i]),
      score=answers.scores[i],
      readable=is_readable(chat.tokenizer, answers.tokens(i))
      and comes_back(chat, problem, answers.texts[i]),
    )
    for i, problem in enumerate(answers.problems)
  ]
  return [samples[i : i + n] for i in range(0, len(samples), n)]


def is_readable(tokenizer: Vocabulary, tokens: np.ndarray) -> bool:
  """Whether a completion is text and the format's markers, nothing else.

  A sampled `<|User|>`, or half a character, has no faithful spelling: as
  fine-tuning data it would come back as other tokens than were sampled.

  Args:
    tokenizer: spells tokens.
    tokens: int32 [length], without EOS.
  """
  markers = {
    name: tokenizer.special_ids[name]
    for name in (THINK, END_THINK, ANSWER, END_ANSWER)
    if name in tokenizer.special_ids
  }
  allowed = markers.values()
  if any(tokenizer.is_special(t) and int(t) not in allowed for t in tokens):
    return False
  try:
    text = tokenizer.decode_bytes(tokens).decode("utf-8")
  except UnicodeDecodeError:
    return False
  # A marker spelled letter by letter would come back as the marker.
  return all(
    text.count(name) == int(np.sum(tokens == token))
    for name, token in markers.items()
  )


def comes_back(chat: Chat, problem: Problem, text: str) -> bool:
  """Whether a response, learned from a file, would be the same text.

  Args:
    chat: how the model is written to.
    problem: what was asked.
    text: the response, without EOS.
  """
  messages = [
    {"role": "user", "content": chat.question(problem.prompt)},
    {"role": "assistant", "content": text},
  ]
  try:
    [(tokens, mask)] = chat.encode_messages(messages)
  except ValueError:  # not in the format, so it is not learned either
    return False
  said = tokens[mask.index(True) : -1]
  return chat.response_text(said) == text


def is_accepted(sample: Sample, *, require_steps: bool) -> bool:
  """Whether a sample is good enough to learn from.

  `Scored.correct` says finished, well formed and rightly answered.
  """
  return (
    sample.score.correct
    and sample.readable
    and (sample.score.steps_correct or not require_steps)
  )


def select(samples: Sequence[Sample], cfg: RejectionConfig) -> list[Sample]:
  """The samples of one problem that are kept, the shortest first.

  Args:
    samples: all samples of the problem.
    cfg: what is kept.

  Returns:
    At most `keep_per_problem` accepted samples of different text; among
    samples of equal length the one drawn first.
  """
  distinct: dict[str, Sample] = {}
  for sample in samples:
    if is_accepted(sample, require_steps=cfg.require_steps):
      distinct.setdefault(sample.text, sample)
  by_length = sorted(distinct.values(), key=lambda sample: sample.length)
  return by_length[: cfg.keep_per_problem]


def count_samples(
  samples: Sequence[Sequence[Sample]], cfg: RejectionConfig
) -> dict[str, int]:
  """What became of samples, in numbers that add up over sets of problems.

  Args:
    samples: [P][n].
    cfg: what is kept.

  Returns:
    problems; sampled, well_formed, correct, verified (correct by right steps),
    accepted and kept samples; solved, the problems that gave something; tokens
    of completions, and of each prompt once; kept_tokens, of kept completions.
  """
  drawn = [s for row in samples for s in row]
  chosen = [select(row, cfg) for row in samples]
  kept = [s for row in chosen for s in row]
  return {
    "problems": len(samples),
    "sampled": len(drawn),
    "well_formed": sum(s.score.well_formed for s in drawn),
    "correct": sum(s.score.correct for s in drawn),
    "verified": sum(s.score.correct and s.score.steps_correct for s in drawn),
    "accepted": sum(
      is_accepted(s, require_steps=cfg.require_steps) for s in drawn
    ),
    "kept": len(kept),
    "solved": sum(map(bool, chosen)),
    "tokens": sum(row[0].prompt_length for row in samples)
    + sum(s.length for s in drawn),
    "kept_tokens": sum(s.length for s in kept),
  }


def count_chunk(
  samples: Sequence[Sequence[Sample]], cfg: RejectionConfig
) -> dict[str, int]:
  """`count_samples` of a chunk, and of each of `cfg.levels` in it.

  Returns:
    NAME -> number, and level/K/NAME -> number; the same keys for every chunk.
  """
  counts = count_samples(samples, cfg)
  for level in cfg.levels:
    rows = [row for row in samples if row[0].problem.level == level]
    for name, number in count_samples(rows, cfg).items():
      counts[f"level/{level}/{name}"] = number
  return counts


def total_counts(
  chunks: Sequence[Mapping[str, Any]], cfg: RejectionConfig
) -> dict[str, Any]:
  """The counts of all chunks.

  Args:
    chunks: what `count_chunk` gave for each; other keys are passed over.
    cfg: what was asked.

  Returns:
    NAME -> number, and under "levels" the same of each level, which is a
    string there, as in JSON.
  """

  def total(prefix: str) -> dict[str, int]:
    names = count_samples([], cfg)
    return {name: sum(c[prefix + name] for c in chunks) for name in names}

  return total("") | {
    "levels": {str(level): total(f"level/{level}/") for level in cfg.levels}
  }
