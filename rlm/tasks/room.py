"""Whether problems fit the sampler's room, told before anything is sampled."""

from collections.abc import Sequence

from rlm.data.chat import Chat
from rlm.tasks.base import Problem, Task


def check_room(
  task: Task,
  problems: Sequence[Problem],
  chat: Chat,
  *,
  prompt_length: int,
  max_new_tokens: int,
) -> None:
  """Checks that problems can be asked, and that every level can be solved.

  Of a level whose solutions differ in length the shortest one must fit; longer
  ones may be cut off, as in R1.

  Args:
    task: the family.
    problems: some of each level that will be asked.
    chat: how the model is asked.
    prompt_length: room for a prompt in tokens, chat markers included.
    max_new_tokens: longest completion in tokens, its end included.

  Raises:
    ValueError: a prompt is longer than its room, or all worked solutions of a
      level are longer than a completion, so that none could ever be rewarded.
  """
  longest, length = None, 0
  shortest: dict[int, int] = {}
  for problem in problems:
    asked = len(chat.encode_prompt(problem.prompt))
    if asked > length:
      longest, length = problem, asked
    if task.has_worked_solutions:
      solution = task.worked_solution(problem)
      said = len(chat.encode_response(solution.thinking, solution.answer))
      shortest[problem.level] = min(said, shortest.get(problem.level, said))
  if longest is not None and length > prompt_length:
    raise ValueError(
      f"config.prompt_length={prompt_length} has no room for the prompt"
      f" {longest.prompt[:40]!r} of level {longest.level}, {length} tokens with"
      f" its markers. Make it at least {length}, or leave that level out."
    )
  for level, said in sorted(shortest.items()):
    if said > max_new_tokens:
      raise ValueError(
        f"config.sampling.max_new_tokens={max_new_tokens} cuts off every"
        f" worked solution of level {level}: the shortest has {said} tokens"
        " with its markers, so no such completion could be rewarded. Make it"
        f" at least {said}, or leave that level out."
      )
