"""The lines of a batch: a prompt each on the way in, with its completion out.

A line is a JSON object with one of `prompt` (what the user says, or the text
that a base model continues), `messages` or `prompt_ids`, and with whatever else
its author likes, which comes out again. See `ADDED` for what is added.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from rlm.data.jsonl import read_jsonl
from rlm.data.prompts import Prompts
from rlm.data.thinking import opens_thinking, split_thinking
from rlm.sampling.answering import Checkpoint, FinishReason

GIVEN = ("prompt", "messages", "prompt_ids")
ADDED = ("completion", "completion_ids", "thinking", "answer", "finish_reason")


@dataclasses.dataclass(frozen=True)
class Request:
  """A line of the input: the object, and the token ids that it asks with."""

  record: dict[str, Any]
  ids: tuple[int, ...]


def read_requests(
  path: str | os.PathLike, checkpoint: Checkpoint
) -> list[Request]:
  """Reads and checks every line of a file; blank lines are skipped.

  Raises:
    ValueError: a line is no object, has none or two of `GIVEN`, has a key of
      `ADDED`, is refused by the chat template, or fills the context; the
      message starts with `path:line`.
  """
  requests = []
  for number, record in read_jsonl(path):
    try:
      ids = _ids_of(record, checkpoint.prompts)
      checkpoint.room_after(ids)
      json_line(record)
    except ValueError as error:
      raise ValueError(f"{path}:{number}: {error}") from error
    requests.append(Request(record, tuple(ids)))
  return requests


def digest(requests: Iterable[Request]) -> str:
  """SHA-256 of all token ids in order."""
  ids = json.dumps([request.ids for request in requests])
  return hashlib.sha256(ids.encode()).hexdigest()


def answered(
  request: Request,
  completion_ids: Sequence[int],
  finish_reason: FinishReason,
  prompts: Prompts,
) -> dict[str, Any]:
  """The line of the output.

  Args:
    request: the line of the input.
    completion_ids: tokens drawn, the one that ended it included.
    finish_reason: whether there is such a one.
    prompts: spells them.

  Returns:
    The line's own keys, then: completion, its text without the token that ended
    it; completion_ids; thinking and answer, the text divided; finish_reason.
  """
  spell = prompts.tokenizer.decode
  shown = completion_ids[:-1] if finish_reason == "stop" else completion_ids
  text = spell(shown)
  thinking, answer = split_thinking(
    text, starts_inside=opens_thinking(spell(request.ids))
  )
  return request.record | {
    "completion": text,
    "completion_ids": list(completion_ids),
    "thinking": thinking,
    "answer": answer,
    "finish_reason": finish_reason,
  }


def json_line(record: dict[str, Any]) -> bytes:
  """A record as a line of a file.

  Raises:
    ValueError: a text in it is none, for it holds half a surrogate pair.
  """
  try:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()
  except UnicodeEncodeError as error:
    half = error.object[error.start]
    raise ValueError(
      f"a text holds half a surrogate pair ({half!a}). Remove it."
    ) from error


def _ids_of(record: dict[str, Any], prompts: Prompts) -> list[int]:
  given = [key for key in GIVEN if key in record]
  if len(given) != 1:
    raise ValueError(
      f"one of {', '.join(GIVEN)} is needed; the line has"
      f" {' and '.join(given) or 'none, but ' + ', '.join(record)}."
    )
  taken = [key for key in ADDED if key in record]
  if taken:
    raise ValueError(
      f"the line has {', '.join(taken)}, which its completion would replace."
      " Rename the key, such as reference_answer."
    )
  key = given[0]
  value = record[key]
  if key == "messages":
    return prompts.encode_messages(value)
  if key == "prompt":
    if not isinstance(value, str) or not value.strip():
      raise ValueError(f"prompt={value!r:.60} is no text, or an empty one.")
    return prompts.encode_prompt(value)
  if not isinstance(value, list) or not all(type(i) is int for i in value):
    raise ValueError(f"prompt_ids={value!r:.60} is no list of token ids.")
  return value
