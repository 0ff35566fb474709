"""Accuracy on held-out problems, by level, with intervals and traces.

Sampling (`sample_problems`) is apart from what is made of it (`summarise`,
`trace_records`), which is plain numpy.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlm import flops
from rlm.data.chat import Chat
from rlm.eval.config import EvaluationConfig
from rlm.eval.pass_at_k import (
  Interval,
  bootstrap_interval,
  majority_at_k,
  pass_at_k,
  share_interval,
)
from rlm.models.config import ModelConfig
from rlm.rewards.answering import Sampler, Scorer, answer_problems
from rlm.rewards.registry import Scored
from rlm.sampling.sampler import request_keys
from rlm.tasks.base import Problem, Task


@dataclasses.dataclass(frozen=True)
class Samples:
  """n samples of each of P problems.

  Attributes:
    problems: the P problems.
    prompt_lengths: int32 [P], tokens, chat markers included.
    texts: [P][n] completions without EOS.
    scores: [P][n] verdicts.
    lengths: int32 [P, n], tokens, EOS included.
    finished: bool [P, n].
  """

  problems: list[Problem]
  prompt_lengths: np.ndarray
  texts: list[list[str]]
  scores: list[list[Scored]]
  lengths: np.ndarray
  finished: np.ndarray

  def counts(self, name: str) -> np.ndarray:
    """How many of each problem's samples have the verdict; int [P]."""
    return np.array([sum(getattr(s, name) for s in row) for row in self.scores])


def heldout_problems(task: Task, cfg: EvaluationConfig) -> list[Problem]:
  """Distinct held-out problems, level by level.

  Args:
    task: the family.
    cfg: which levels, how many.

  Raises:
    ValueError: the task lacks a level, or has too few held-out problems there.
  """
  task.check_levels(cfg.levels, "config.evaluation.levels")
  return [
    problem
    for level in cfg.levels
    for problem in task.distinct_problems(
      cfg.seed, cfg.problems_per_level, level, "heldout"
    )
  ]


def check_heldout(task: Task, problems: Sequence[Problem]) -> None:
  """Raises ValueError if training may have seen one of `problems`."""
  for problem in problems:
    if not task.is_heldout(problem):
      raise ValueError(
        f"{problem.prompt!r} of {task.name} is not held out (by the hash of"
        f" its content, at heldout_fraction={task.heldout_fraction}), so"
        " training may have drawn it. Evaluate problems of the split"
        " 'heldout', with the heldout_fraction that training used."
      )


def sample_problems(
  sampler: Sampler,
  variables: Any,
  task: Task,
  problems: Sequence[Problem],
  chat: Chat,
  scorer: Scorer,
  key: jax.Array,
  *,
  samples_per_problem: int,
) -> Samples:
  """Draws and scores n samples of each problem.

  Args:
    sampler: draws, at the temperature it was built with.
    variables: of the model.
    task: whose split the problems must be held out in.
    problems: P problems.
    chat: encodes prompts, decodes completions.
    scorer: judges texts.
    key: of the evaluation; see `request_keys`.
    samples_per_problem: n.

  Raises:
    ValueError: a problem is not held out, or a prompt is too long.
  """
  check_heldout(task, problems)
  n = samples_per_problem
  answers = answer_problems(
    sampler,
    variables,
    problems,
    chat,
    scorer,
    request_keys(key, len(problems) * n),
    samples_per_problem=n,
  )
  starts = range(0, len(answers.texts), n)
  return Samples(
    problems=list(problems),
    prompt_lengths=np.array(
      [len(answers.prompts[i]) for i in starts], np.int32
    ),
    texts=[answers.texts[i : i + n] for i in starts],
    scores=[answers.scores[i : i + n] for i in starts],
    lengths=np.asarray(answers.completions.lengths, np.int32).reshape(-1, n),
    finished=np.asarray(answers.completions.finished, bool).reshape(-1, n),
  )


def evaluate(
  sampler: Sampler,
  variables: Any,
  task: Task,
  chat: Chat,
  scorer: Scorer,
  cfg: EvaluationConfig,
  model: ModelConfig,
  *,
  stage: str,
  step: int,
  on_level: Callable[[int], None] = lambda levels_done: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Draws held-out problems, samples, scores and sums up, level by level.

  Takes a sampler, so that many weights can be evaluated with one compilation.

  Args:
    sampler: draws.
    variables: of the model.
    task: the family.
    chat: encodes prompts, decodes completions.
    scorer: judges texts.
    cfg: what is asked.
    model: sizes of the model, to say what sampling cost.
    stage: whose weights these are.
    step: updates made to them.
    on_level: told how many levels are done.

  Returns:
    The summary of `summarise` with the tokens and FLOPs of all levels, a prompt
    counted once for its samples; and the lines of `trace_records`.  Both are
    pure functions of the arguments.

  Raises:
    ValueError: see `heldout_problems` and `sample_problems`.
  """
  problems = heldout_problems(task, cfg)
  key = jax.random.key(cfg.seed)
  parts = []
  for done, level in enumerate(cfg.levels, start=1):
    parts.append(
      sample_problems(
        sampler,
        variables,
        task,
        [p for p in problems if p.level == level],
        chat,
        scorer,
        jax.random.fold_in(key, level),
        samples_per_problem=cfg.samples_per_problem,
      )
    )
    on_level(done)
  samples = Samples(
    problems=problems,
    prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
    texts=[row for part in parts for row in part.texts],
    scores=[row for part in parts for row in part.scores],
    lengths=np.concatenate([part.lengths for part in parts]),
    finished=np.concatenate([part.finished for part in parts]),
  )
  prompt_lengths, lengths = samples.prompt_lengths, samples.lengths
  cost = {
    "tokens": int(prompt_lengths.sum() + lengths.sum()),
    "flops": flops.sampling_flops(model, prompt_lengths, lengths),
  }
  return (
    summarise(samples, cfg, stage) | cost,
    trace_records(samples, cfg, stage, step),
  )


def measure(samples: Samples, cfg: EvaluationConfig) -> dict[str, Interval]:
  """Every measure over the problems of `samples`, with 95% intervals.

  Returns:
    pass_at_1, the mean over n samples; pass_at_k and maj_at_k for each k > 1;
    format, the share of well-formed samples; pass_at_1_given_format, the
    correct share of those; steps_correct, the share whose steps are all right;
    steps_correct_given_correct; response_length in tokens; finished.
  """
  n = samples.lengths.shape[1]
  correct = samples.counts("correct")
  well_formed = samples.counts("well_formed")
  steps = samples.counts("steps_correct")
  both = np.array(
    [sum(s.correct and s.steps_correct for s in row) for row in samples.scores]
  )
  ones = np.ones(len(correct))
  measures = {
    "pass_at_1": (correct / n, ones),
    "pass_at_1_given_format": (correct / n, well_formed / n),
    "format": (well_formed / n, ones),
    "steps_correct": (steps / n, ones),
    "steps_correct_given_correct": (both / n, correct / n),
    "finished": (samples.finished.mean(axis=1), ones),
  }
  for k in cfg.ks:
    if k > 1:
      measures[f"pass_at_{k}"] = (pass_at_k(n, correct, k), ones)
      votes = [_vote(row, k) for row in samples.scores]
      measures[f"maj_at_{k}"] = (np.array(votes), ones)
  draws = {"resamples": cfg.bootstrap_resamples, "seed": cfg.seed}
  length = bootstrap_interval(samples.lengths.mean(axis=1), ones, **draws)
  return {
    name: share_interval(numerators, denominators, **draws)
    for name, (numerators, denominators) in measures.items()
  } | {"response_length": length}


def _vote(row: list[Scored], k: int) -> float:
  """maj@k of one problem; ill-formed and cut-off samples do not vote."""
  answers = [s.answer if s.well_formed else None for s in row]
  return majority_at_k(answers, [s.correct for s in row], k)


def _subset(samples: Samples, levels: set[int]) -> Samples:
  """The problems of some levels."""
  keep = [i for i, p in enumerate(samples.problems) if p.level in levels]
  return Samples(
    problems=[samples.problems[i] for i in keep],
    prompt_lengths=samples.prompt_lengths[keep],
    texts=[samples.texts[i] for i in keep],
    scores=[samples.scores[i] for i in keep],
    lengths=samples.lengths[keep],
    finished=samples.finished[keep],
  )


def summarise(
  samples: Samples, cfg: EvaluationConfig, stage: str
) -> dict[str, Any]:
  """The summary of one evaluation, as plain data.

  Args:
    samples: of the problems of all `cfg.levels`.
    cfg: what was asked.
    stage: the stage whose model was asked.

  Returns:
    The measures over the headline's levels (`levels_trained`), each {"mean",
    "low", "high", "n"} with None for what has no value; the same by level under
    "levels" (keys are strings, as in JSON); and the sizes.
  """

  def plain(measures):
    return {
      name: {
        key: None if isinstance(v, float) and math.isnan(v) else v
        for key, v in dataclasses.asdict(interval).items()
      }
      for name, interval in measures.items()
    }

  headline = set(cfg.levels) & set(cfg.levels_trained)
  asked = _subset(samples, headline)
  return {
    "stage": stage,
    "n_problems": len(asked.problems),
    "n_samples": cfg.samples_per_problem,
    **plain(measure(asked, cfg)),
    "levels": {
      str(level): plain(measure(_subset(samples, {level}), cfg))
      for level in cfg.levels
    },
    "levels_trained": sorted(headline),
  }


def trace_record(
  stage: str, step: int, problem: Problem, text: str, score: Scored, finished
) -> dict[str, Any]:
  """One line of traces/*.jsonl.

  Args:
    stage: who answered.
    step: updates made to the weights that answered.
    problem: what was asked.
    text: the completion, without EOS.
    score: its verdict.
    finished: whether it ended by EOS.
  """
  return {
    "stage": stage,
    "step": step,
    "task": problem.task,
    "level": problem.level,
    "prompt": problem.prompt,
    "completion": text,
    "rewards": score.rewards,
    "correct": score.correct,
    "well_formed": score.well_formed,
    "finished": bool(finished),
    "steps_correct": score.steps_correct,
    "answer": score.answer,
    "expected": problem.answer,
    "identity": problem.identity,
  }


def trace_records(
  samples: Samples, cfg: EvaluationConfig, stage: str, step: int
) -> list[dict[str, Any]]:
  """Lines of the first `traces_per_level` problems of each level."""
  records = []
  seen: dict[int, int] = {}
  for p, problem in enumerate(samples.problems):
    seen[problem.level] = seen.get(problem.level, 0) + 1
    if seen[problem.level] > cfg.traces_per_level:
      continue
    for s in range(cfg.samples_per_trace):
      records.append(
        trace_record(
          stage,
          step,
          problem,
          samples.texts[p][s],
          samples.scores[p][s],
          samples.finished[p, s],
        )
      )
  return records
