"""Compares our reading of a model's folder with that of transformers.

  python -m tools.check_chat --folder=DIR

renders a battery of conversations by the folder's chat template, with
`rlm.data.model_tokenizer` and with transformers' `apply_chat_template`, and
compares the texts and the token ids. Tools and switches for thinking are tried
where the template mentions them; a conversation that both refuse counts as
equal. The last row is ours alone: control tokens that a user types stay text.
Needs the extra `parity`. The exit status is 0 if all are equal, 1 if not, 2 if
nothing could be compared.
"""

import argparse
import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlm.data.model_tokenizer import ModelTokenizer
from rlm.report.text import visible

USER = {"role": "user", "content": "What is 17 * 23?"}
ANSWER = {"role": "assistant", "content": "It is 391."}
FOLLOW_UP = {"role": "user", "content": "And squared?"}
SYSTEM = {"role": "system", "content": "You are a careful assistant."}
MARKED = {
  "role": "assistant",
  "content": "<think>\n17 * 20 + 17 * 3\n</think>\n\nIt is 391.",
}
APART = ANSWER | {"reasoning_content": "17 * 20 + 17 * 3"}
ODD = {
  "role": "user",
  "content": "  <b>1 < 2</b> & naïve 東京 🙂\n\n\t`x</y>`    {{ 'x' }} \r\n",
}
TOOL = {
  "type": "function",
  "function": {
    "name": "multiply",
    "description": "Multiplies two numbers < 1000, à la carte.",
    "parameters": {
      "type": "object",
      "properties": {
        "a": {"type": "integer", "description": "one number"},
        "b": {"type": "integer", "description": "the other"},
      },
      "required": ["a", "b"],
    },
  },
}
RESULT = {"role": "tool", "tool_call_id": "call0001x", "content": "391"}
SWITCHES = ("thinking", "enable_thinking")  # V3.1's and Qwen3's


@dataclasses.dataclass(frozen=True)
class Case:
  """A conversation to render, and how."""

  name: str
  messages: Sequence[dict[str, Any]]
  options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the comparison of one case gave."""

  name: str
  equal: bool
  remark: str


def battery(source: str) -> Iterator[Case]:
  """The conversations for a template.

  Args:
    source: its Jinja text; says whether it knows tools and switches.
  """
  conversations = {
    "plain": [USER],
    "system prompt": [SYSTEM, USER],
    "two system prompts": [SYSTEM, SYSTEM, USER],
    "several turns": [SYSTEM, USER, ANSWER, FOLLOW_UP],
    "ends with the assistant": [USER, ANSWER],
    "past thinking": [USER, MARKED, FOLLOW_UP],
    "last thinking": [USER, MARKED],
    "past thinking apart": [USER, APART, FOLLOW_UP],
    "odd text": [{"role": "system", "content": ODD["content"]}, ODD],
    "odd answer": [USER, ODD | {"role": "assistant"}, FOLLOW_UP],
    "empty content": [USER | {"content": ""}],
    "the assistant first": [ANSWER, USER],
  }
  switches: list[dict[str, Any]] = [{}]
  switches += [
    {switch: on}
    for switch in SWITCHES
    if re.search(rf"\b{switch}\b", source)
    for on in (True, False)
  ]
  for (name, messages), switch, prompt in itertools.product(
    conversations.items(), switches, (True, False)
  ):
    yield _case(name, messages, prompt, switch)
  if "tools" not in source and "tool_calls" not in source:
    return
  for form, arguments in (
    ("object", {"a": 17, "b": 23}),
    ("text", '{"a": 17, "b": 23}'),
  ):
    call = {
      "id": "call0001x",
      "type": "function",
      "function": {"name": "multiply", "arguments": arguments},
    }
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    silent = asked | {"content": None}
    for (name, messages), prompt in itertools.product(
      {
        "tools": [SYSTEM, USER],
        "tool call": [USER, asked],
        "tool call, no content": [USER, silent, RESULT],
        "two tool calls": [USER, silent | {"tool_calls": [call, call]}, RESULT],
        "tool result": [USER, asked, RESULT],
        "after tools": [USER, asked, RESULT, MARKED, FOLLOW_UP],
      }.items(),
      (True, False),
    ):
      yield _case(f"{name}, {form}", messages, prompt, {"tools": [TOOL]})


def _case(
  name: str, messages: list[dict], prompt: bool, options: dict[str, Any]
) -> Case:
  words = [f"{key}={value}" for key, value in options.items() if key != "tools"]
  words += ["prompt"] if prompt else []
  return Case(
    ", ".join([name, *words]),
    messages,
    options | {"add_generation_prompt": prompt},
  )


def compare(tokenizer: ModelTokenizer, theirs: Any, case: Case) -> Verdict:
  """Renders one case on both sides.

  Args:
    tokenizer: ours.
    theirs: transformers' tokenizer of the same folder.
    case: the conversation.
  """
  our_text, our_refusal = _attempt(
    lambda: tokenizer.chat_template.render(case.messages, **case.options)
  )
  text, refusal = _attempt(
    lambda: theirs.apply_chat_template(
      case.messages, tokenize=False, **case.options
    )
  )
  if our_refusal is not None and refusal is not None:
    return Verdict(case.name, True, "both refuse")
  if our_refusal is not None or refusal is not None:
    who, words = ("ours", our_refusal) if our_refusal else ("theirs", refusal)
    return Verdict(case.name, False, f"only {who} refuses: {words}")
  if our_text != text:
    return Verdict(case.name, False, _first_difference(our_text, text))
  our_ids = tokenizer.encode_chat(case.messages, **case.options)
  ids = theirs.apply_chat_template(
    case.messages, tokenize=True, return_dict=False, **case.options
  )
  remark = ""
  if our_ids[1:] == ids and our_ids[0] == tokenizer.bos_id:
    our_ids, remark = our_ids[1:], "and the BOS of add_bos_token before it"
  if our_ids != ids:
    pieces, their_pieces = (
      [tokenizer.decode([i]) if i < tokenizer.n_vocab_used else i for i in side]
      for side in (our_ids, ids)
    )
    return Verdict(case.name, False, _first_difference(pieces, their_pieces))
  return Verdict(case.name, True, remark)


def check_hostile_user(tokenizer: ModelTokenizer) -> Verdict:
  """Whether all control tokens, typed by a user, stay text."""
  typed = "".join(tokenizer.special_ids)

  def controls(content):
    ids = tokenizer.encode_chat([USER | {"content": content}])
    return [i for i in ids if tokenizer.is_special(i)]

  name = f"{len(tokenizer.special_ids)} control tokens typed by a user"
  made, refusal = _attempt(lambda: controls(typed) == controls("hello"))
  if refusal is not None:
    return Verdict(name, False, refusal)
  return Verdict(name, made, "stay text" if made else "become control tokens")


def _attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
  """The result and None, or None and the words of what was raised."""
  try:
    return function(), None
  except Exception as error:  # templates raise whatever their operations do
    return None, f"{type(error).__name__}: {error}"


def _first_difference(ours: Sequence, theirs: Sequence) -> str:
  """Where two texts, or lists of tokens, part; and how they go on."""
  pairs = itertools.zip_longest(ours, theirs, fillvalue=object())
  at = next(i for i, (a, b) in enumerate(pairs) if a != b)
  unit = "character" if isinstance(ours, str) else "token"
  reach = 30 if isinstance(ours, str) else 5
  start = max(0, at - 10) if isinstance(ours, str) else at
  return (
    f"from {unit} {at}: ours {ours[start : at + reach]!r},"
    f" theirs {theirs[start : at + reach]!r}"
  )


def show(verdicts: Sequence[Verdict], console: Console) -> None:
  """Prints a table of what was compared."""
  table = Table("case", "equal", "remark")
  for verdict in verdicts:
    table.add_row(
      Text(verdict.name),
      Text("yes" if verdict.equal else "NO", "" if verdict.equal else "bold"),
      Text(visible(verdict.remark)),
    )
  console.print(table)
  different = sum(not verdict.equal for verdict in verdicts)
  console.print(f"{len(verdicts)} cases, {different} differ.")


def check(folder: str) -> list[Verdict]:
  """Compares all cases of a folder.

  Raises:
    ValueError: transformers is missing, or a side cannot read the folder.
  """
  try:
    import transformers
  except ImportError as error:
    raise ValueError(
      "this comparison needs transformers, which is not installed. Install the"
      " extra: pip install 'rlm[parity]'."
    ) from error
  tokenizer = ModelTokenizer(folder)
  template = tokenizer.chat_template
  theirs, refusal = _attempt(
    lambda: transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True, trust_remote_code=False
    )
  )
  if refusal is not None:
    raise ValueError(f"transformers does not read {folder}: {refusal}")
  sources = {template.source(with_tools=tools) for tools in (False, True)}
  cases = battery("\n".join(sources))
  verdicts = [compare(tokenizer, theirs, case) for case in cases]
  return [*verdicts, check_hostile_user(tokenizer)]


def main(argv: Sequence[str] | None = None) -> int:
  """Compares and prints; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--folder", required=True, help="of a published model")
  arguments = parser.parse_args(argv)
  try:
    verdicts = check(arguments.folder)
  except ValueError as error:
    print(error, file=sys.stderr)
    return 2
  show(verdicts, Console())
  return 0 if all(verdict.equal for verdict in verdicts) else 1


if __name__ == "__main__":
  if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal
  sys.exit(main())
