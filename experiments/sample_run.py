"""The chat with the model that a run trained, on what it was trained on.

Every line typed is a conversation of its own, asked as in training; at the
start an example is shown. A problem of the training task is checked by rule.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from experiments.terminal import ask, note, show_piece
from rlm import files
from rlm.config import build, did_you_mean
from rlm.data.chat_formats import load_chat
from rlm.data.r1_chat import R1Chat
from rlm.data.tokenizer import StreamDecoder, Tokenizer
from rlm.report.text import visible
from rlm.sampling.config import SamplingConfig
from rlm.tasks.base import Problem, Task

TOKENS_PER_CALL = 4  # decoded before they are shown: 1 would stream slower


def find_run(workdir: str, stage: str | None) -> pathlib.Path:
  """The folder of the run whose model answers.

  Args:
    workdir: folder of a run, or of a recipe whose stages are runs.
    stage: of a recipe; None is the last that has a checkpoint.

  Raises:
    ValueError: there is no such folder, stage or checkpoint.
  """
  root = pathlib.Path(workdir)
  if not root.is_dir():
    raise ValueError(f"--workdir={workdir}: there is no such folder.")
  if not (root / "config.json").is_file():
    raise ValueError(
      f"--workdir={workdir}: it holds no config.json, so it is no run's folder."
    )
  config = files.read_json(root / "config.json")
  if "order" not in config:
    if stage is not None:
      raise ValueError(
        f"--stage={stage}: {workdir} is one run, without stages. Leave --stage"
        " out."
      )
    if not _has_checkpoint(root):
      raise ValueError(
        f"--workdir={workdir}: it holds no checkpoint yet. Let the run save one"
        " first."
      )
    return root
  trained = [name for name in config["order"] if _has_checkpoint(root / name)]
  if not trained:
    raise ValueError(
      f"--workdir={workdir}: none of its stages {', '.join(config['order'])}"
      " has a checkpoint yet. Let the recipe run first."
    )
  if stage is None:
    return root / trained[-1]
  if stage not in trained:
    raise ValueError(
      f"--stage={stage}: no such stage with a checkpoint in {workdir}"
      f"{did_you_mean(stage, trained)} It has {', '.join(trained)}."
    )
  return root / stage


def _has_checkpoint(folder: pathlib.Path) -> bool:
  checkpoints = folder / "checkpoints"
  return checkpoints.is_dir() and any(
    path.name.isdecimal() for path in checkpoints.iterdir()
  )


def task_of(config: dict[str, Any]) -> Task | None:
  """The problems that a run was trained on, by its config.json; or None."""
  from rlm.tasks.registry import make_task

  sections = []
  if "task" in config:
    sections.append(config["task"])
  if "tasks" in config:
    sections += config["tasks"].values()
  return make_task(sections[0]) if sections else None


def example_problem(task: Task, config: dict[str, Any], index: int) -> Problem:
  """A problem that the model has not seen, of a level that it was shown.

  Args:
    task: the family.
    config: the run's; the middle one of all `levels` in it is taken.
    index: which one.
  """
  shown = sorted(set(_levels(config)) & set(task.levels)) or task.levels
  split = "heldout" if task.heldout_fraction else "train"
  return task.problem(0, index, shown[len(shown) // 2], split)


def _levels(value: Any) -> Iterator[int]:
  """What every key `levels` of a nested config lists."""
  if not isinstance(value, dict):
    return
  for key, item in value.items():
    if key == "levels":
      yield from item
    else:
      yield from _levels(item)


def styled(
  tokenizer: Tokenizer, tokens: Iterable[int]
) -> Iterator[tuple[str, str]]:
  """Pieces of a completion to show, safe for a terminal, and their styles.

  Args:
    tokenizer: spells the tokens.
    tokens: of the completion; the end of sequence is left out.

  Yields:
    (text, style): "dim" for markers and thinking, "" for the rest.
  """
  stream, thinking = StreamDecoder(tokenizer), False
  for token in tokens:
    if not tokenizer.is_special(token):
      yield visible(stream.push(token)), "dim" if thinking else ""
      continue
    yield visible(stream.finish()), "dim" if thinking else ""
    if token != tokenizer.eos_id:
      yield tokenizer.decode([token]), "dim"
    thinking = token == tokenizer.think_id
  yield visible(stream.finish()), "dim" if thinking else ""


def verdict(
  task: Task | None, prompt: str, completion: str, finished: bool
) -> str:
  """What the task's rule says of a completion; "" if it states no problem.

  Args:
    task: the training task, or None.
    prompt: what was asked.
    completion: what came back, without the end of sequence.
    finished: whether it ended by itself.
  """
  from rlm.rewards.answers import parse_response

  problem = task.problem_of(prompt) if task is not None else None
  if task is None or problem is None:
    return ""
  expected = f"; right is {problem.answer}" if problem.answer else ""
  response = parse_response(completion)
  if not finished or not response.well_formed:
    return f"no answer in the format{expected}"
  if not task.verify(problem, response.answer):
    return f"wrong{expected}"
  if not task.has_worked_solutions:
    return "right"
  steps = task.check_steps(problem, response.thinking)
  return "right, and so are the steps" if steps else "right, by wrong steps"


class Chat:
  """A trained model that answers prompts.

  Attributes:
    folder: of the run.
    config: its config.json.
    tokenizer: its tokenizer.
    task: what it was trained on, or None.
  """

  def __init__(self, folder: pathlib.Path, sampling: SamplingConfig, seed: int):
    """Reads the config; neither weights are read nor anything compiled yet.

    Args:
      folder: of the run.
      sampling: how to draw.
      seed: the same seed and prompts give the same answers.

    Raises:
      ValueError: the folder is no training run.
    """
    from rlm.models.config import ModelConfig
    from rlm.models.transformer import Transformer

    self.folder = folder
    self.config = files.read_json(folder / "config.json")
    for key in ("model", "tokenizer"):
      if key not in self.config:
        raise ValueError(
          f"{folder / 'config.json'} has no {key!r}: it is no training run."
        )
    self.sampling = sampling
    chat = load_chat(self.config["tokenizer"])
    if not isinstance(chat, R1Chat):
      raise ValueError(
        f"{folder} was trained in the chat format of its tokenizer's folder."
        f" Talk to it with --checkpoint={folder} instead of --workdir."
      )
    self._format = chat
    self.tokenizer = chat.tokenizer
    self.task = task_of(self.config)
    self._model = Transformer(build(ModelConfig, self.config["model"], "model"))
    self._seed = seed
    self._variables = None
    self._samplers: dict[int, Any] = {}

  def answer(self, prompt: str, turn: int) -> Iterator[int]:
    """Yields the tokens that answer a prompt.

    Args:
      prompt: the user's text.
      turn: how many prompts came before; draws differ from turn to turn.

    Raises:
      ValueError: the prompt does not fit the context.
    """
    import jax

    from rlm.checkpoint.manager import restore_variables

    tokens = self._format.encode_prompt(prompt)
    sampler = self._sampler(len(tokens))
    if self._variables is None:
      self._variables = restore_variables(self.folder / "checkpoints")
    key = jax.random.fold_in(jax.random.key(self._seed), turn)
    for part in sampler.stream(self._variables, tokens, key):
      yield from part

  def _sampler(self, length: int) -> Any:
    """The sampler for prompts of this length, compiled once for near ones."""
    from rlm.parallel.config import replicas
    from rlm.sampling.sampler import Sampler, bucket_length

    context = self._model.cfg.max_position_embeddings
    if length >= context:
      raise ValueError(
        f"the prompt has {length} tokens with its markers; the model's context"
        f" of {context} has no room to answer. Shorten the prompt."
      )
    room = min(bucket_length(length), context - 1)
    if room not in self._samplers:
      longest = min(self.sampling.max_new_tokens, context - room)
      self._samplers[room] = Sampler(
        self._model,
        dataclasses.replace(self.sampling, max_new_tokens=longest),
        slots=1,
        prompt_length=room,
        mesh=replicas(1),
        eos_token=self.tokenizer.eos_id,
        pad_token=self.tokenizer.pad_id,
        steps_per_call=TOKENS_PER_CALL,
      )
    return self._samplers[room]


def show_answer(chat: Chat, prompt: str, turn: int, console: Any) -> None:
  """Streams one answer and what the task's rule says of it."""
  tokens: list[int] = []

  def noted() -> Iterator[int]:
    for token in chat.answer(prompt, turn):
      tokens.append(token)
      yield token

  for text, style in styled(chat.tokenizer, noted()):
    show_piece(console, text, style)
  console.print()
  finished = tokens[-1] == chat.tokenizer.eos_id
  if not finished:
    note(console, f"(cut after {len(tokens)} tokens)")
  completion = chat.tokenizer.decode(tokens[:-1] if finished else tokens)
  if said := verdict(chat.task, prompt, completion, finished):
    note(console, f"({said})")


def converse(chat: Chat, console: Any) -> None:
  """Reads prompts and answers them until the input ends."""
  note(console, f"{chat.folder} answers. Ctrl-D ends.")
  turn = examples = 0
  show_example(chat, examples, console)
  while (prompt := ask(console)) is not None:
    if not prompt:
      examples += 1
      show_example(chat, examples, console)
      continue
    try:
      show_answer(chat, prompt, turn, console)
    except KeyboardInterrupt:
      note(console, "(stopped)")
    except ValueError as error:
      note(console, f"error: {error}")
    turn += 1


def show_example(chat: Chat, index: int, console: Any) -> None:
  """Prints a prompt such as the model was trained on, if that is known."""
  if chat.task is not None:
    problem = example_problem(chat.task, chat.config, index)
    note(console, f"It learned such as: {problem.prompt}")
