import json

import pytest

from rlm.tasks.registry import make_task

LINES = [{"prompt": f"What is {i}+1?", "answer": str(i + 1)} for i in range(40)]


@pytest.fixture
def write(tmp_path):
  def write(*lines, name="problems.jsonl"):
    path = tmp_path / name
    raw = [
      line if isinstance(line, bytes) else json.dumps(line).encode()
      for line in lines
    ]
    path.write_bytes(b"\n".join(raw))
    return str(path)

  return write


def make(path, heldout_fraction=0.25, max_line_bytes=200):
  return make_task(
    dict(
      name="jsonl",
      path=path,
      heldout_fraction=heldout_fraction,
      max_line_bytes=max_line_bytes,
    )
  )


def test_reads_prompts_answers_levels_and_ids(write):
  task = make(
    write(
      {"prompt": "1+1?", "answer": "2", "level": 3, "id": "a"},
      b"",
      {"prompt": "1+2?", "answer": 3},
      b"  \r",
      b'{"prompt": "pi?", "answer": 3.14159265358979323846, "level": 2}\r',
    )
  )
  first, second, third = task.problems
  assert (first.prompt, first.answer, first.level) == ("1+1?", "2", 3)
  assert first.metadata == {"line": 1, "id": "a"}
  assert (second.answer, second.level) == ("3", 1)
  assert second.metadata == {"line": 3, "id": None}
  assert third.answer == "3.14159265358979323846"  # no digit rounded away
  assert task.levels == (1, 2, 3)
  assert not task.has_worked_solutions


def test_a_pass_sees_each_problem_once_then_again_in_another_order(write):
  task = make(write(*LINES))
  pool = [p for p in task.problems if not task.is_heldout(p)]
  n = len(pool)
  assert 15 < n < 40
  stream = [task.problem(0, i, 1, "train") for i in range(2 * n)]
  key = lambda p: p.metadata["line"]  # noqa: E731
  assert sorted(stream[:n], key=key) == sorted(stream[n:], key=key) == pool
  assert stream[:n] != stream[n:]
  assert stream[:n] != pool
  assert stream[:n] != [task.problem(1, i, 1, "train") for i in range(n)]


def test_problem_is_pure_even_after_many_other_streams(write):
  task = make(write(*LINES))
  before = [task.problem(0, i, 1, "train") for i in range(10)]
  for seed in range(100):
    task.problem(seed, 0, 1, "train")
  assert [task.problem(0, i, 1, "train") for i in range(10)] == before


def test_the_split_is_by_prompt_not_by_place(write):
  task = make(write(*LINES))
  again = make(write(*LINES[::-1], name="reversed.jsonl"))
  heldout = {p.prompt for p in task.problems if task.is_heldout(p)}
  assert heldout
  assert heldout == {p.prompt for p in again.problems if again.is_heldout(p)}
  drawn = {task.problem(0, i, 1, "train").prompt for i in range(200)}
  assert not drawn & heldout
  evaluated = task.distinct_problems(0, len(heldout), 1, "heldout")
  assert {p.prompt for p in evaluated} == heldout


def test_answers_are_compared_as_text_or_number(write):
  task = make(
    write({"prompt": "a", "answer": "1/2"}, {"prompt": "b", "answer": "Paris"})
  )
  half, paris = task.problems
  assert task.verify(half, "0.50") and task.verify(half, "2/4")
  assert not task.verify(half, "0.51")
  assert task.verify(paris, "  Paris ") and not task.verify(paris, "paris")


def test_no_steps_are_credited_and_no_solution_is_made_up(write):
  task = make(write(*LINES))
  problem = task.problems[0]
  assert not task.check_steps(problem, "")
  for solve in (
    lambda: task.worked_solution(problem),
    lambda: task.authored_solution(problem, None),
  ):
    with pytest.raises(
      ValueError, match=r"gives prompts and answers, no worked"
    ):
      solve()


def test_repeated_problems_count_once(write):
  task = make(
    write(
      {"prompt": "1+1?", "answer": "2"},
      {"prompt": " 1+1?  ", "answer": "2.0"},
      {"prompt": "1+2?", "answer": "3"},
    )
  )
  assert [p.metadata["line"] for p in task.problems] == [1, 3]


def test_two_answers_to_one_prompt(write):
  path = write({"prompt": "x", "answer": "2"}, {"prompt": "x", "answer": "3"})
  with pytest.raises(
    ValueError, match=r"problems.jsonl:2: asks the same as line 1.*'3' instead"
  ):
    make(path)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b'{"prompt": "\xff"}', r"problems.jsonl:2: not UTF-8 .* at byte 12"),
    (b'{"prompt": ', r"problems.jsonl:2: not valid JSON"),
    (b"[" * 199, r"problems.jsonl:2: not valid JSON"),
    (b"[1, 2]", r"problems.jsonl:2: expected a JSON object .* got list"),
    (b'{"prompt": "a"}', r"problems.jsonl:2: missing answer\..*found: prompt"),
    (b'{"answer": "a"}', r"problems.jsonl:2: missing prompt\."),
    (b"{}", r"problems.jsonl:2: missing prompt and answer\..*found: none"),
    (b'{"prompt": 3, "answer": "a"}', r":2: prompt is 3, but must be text"),
    (b'{"prompt": " ", "answer": "a"}', r":2: prompt is ' ', but must be text"),
    (b'{"prompt": "a", "answer": ""}', r":2: answer is '', .* or a number"),
    (b'{"prompt": "a", "answer": true}', r":2: answer is True, but must be"),
    (b'{"prompt": "a", "answer": null}', r":2: answer is None, but must be"),
    (b'{"prompt": "\\ud800", "answer": "a"}', r":2: prompt has half a surrog"),
    (b'{"prompt":"a","answer":"b","level":"3"}', r":2: level is '3', but must"),
    (b'{"prompt":"a","answer":"b","level":1.5}', r":2: level is '1.5', but"),
    (
      b'{"prompt": "' + b"a" * 200 + b'"}',
      r":2: the line is longer than max_l",
    ),
  ],
)
def test_a_bad_line_is_named(write, line, message):
  path = write({"prompt": "fine", "answer": "1"}, line)
  with pytest.raises(ValueError, match=message):
    make(path)


def test_limits_of_the_json_reader_are_errors_of_the_line(write):
  # Both are no JSONDecodeError: an int of 5000 digits, and deep nesting.
  for line in (b'{"prompt":"a","answer":' + b"1" * 5000 + b"}", b"[" * 99_999):
    with pytest.raises(ValueError, match=r":1: not valid JSON"):
      make(write(line), max_line_bytes=100_000)


def test_the_longest_line_allowed_passes(write):
  line = json.dumps({"prompt": "a", "answer": "1"}).encode()
  for end in (b"", b"\n", b"\r\n"):
    assert make(write(line + end), max_line_bytes=len(line)).problems
    with pytest.raises(ValueError, match="longer than max_line_bytes"):
      make(write(line + end), max_line_bytes=len(line) - 1)


def test_a_byte_order_mark_is_no_error(write):
  assert make(write(b'\xef\xbb\xbf{"prompt": "a", "answer": "1"}')).problems


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_file(write, content):
  with pytest.raises(ValueError, match=r"problems.jsonl: has no problems"):
    make(write(content))


def test_no_such_file(tmp_path):
  for path in (tmp_path / "missing.jsonl", tmp_path):
    with pytest.raises(ValueError, match=r"config.task|no such file"):
      make(str(path))


def test_a_split_without_problems(write):
  task = make(write({"prompt": "a", "answer": "1"}))
  empty = "train" if task.is_heldout(task.problems[0]) else "heldout"
  with pytest.raises(
    ValueError, match=rf"no problem of the '{empty}' split at"
  ):
    task.problem(0, 0, 1, empty)
  with pytest.raises(ValueError, match=r"asks jsonl for level 2, but it has"):
    task.problem(0, 0, 2, "train")
  with pytest.raises(ValueError, match=r"heldout_fraction is 0"):
    make(write({"prompt": "a", "answer": "1"}), 0.0).problem(0, 0, 1, "heldout")


def test_line_limit_must_be_positive(write):
  with pytest.raises(ValueError, match=r"max_line_bytes is 0, but must be"):
    make(write(*LINES), max_line_bytes=0)


def test_a_prompt_tells_its_problem(write):
  task = make(write(*LINES))
  for problem in task.problems:
    assert task.problem_of(problem.prompt) == problem
  assert task.problem_of("  What is  3+1?\n").answer == "4"
  assert task.problem_of("What is 3+2?") is None
