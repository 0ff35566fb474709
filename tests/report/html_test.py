import html.parser
import json
import re
import shutil

import pytest

from rlm.report.html import write_report

VOID = {"meta", "br", "link", "img", "path", "use", "rect", "image"}


class Checker(html.parser.HTMLParser):
  """Collects tags and text, and what is closed out of order."""

  def __init__(self):
    super().__init__()
    self.open, self.tags, self.text, self.bad = [], [], [], []
    self.attributes = []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, *a) for a in attrs]
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, *a) for a in attrs]

  def handle_endtag(self, tag):
    if tag in VOID:
      return
    if not self.open or self.open.pop() != tag:
      self.bad.append(tag)

  def handle_data(self, data):
    if not self.open or self.open[-1] != "style":
      self.text.append(data)


def read(path):
  page = path.read_text(encoding="utf-8")
  checker = Checker()
  checker.feed(page)
  assert not checker.bad and not checker.open, "tags do not nest"
  return page, checker, " ".join("".join(checker.text).split())


def check_self_contained(page, checker):
  assert "script" not in checker.tags
  assert not {"link", "iframe", "img", "object"} & {*checker.tags}
  assert not re.search(r"url\(\s*['\"]?(?!#)", page)
  assert "@import" not in page
  for _, name, value in checker.attributes:
    assert not name.startswith("on"), f"an event handler: {name}"
    assert "://" not in (value or ""), f"an address: {value}"
    if name in ("href", "src"):
      assert value.startswith(("#", "data:image/png"))


def test_the_report_of_a_whole_recipe(recipe):
  path = write_report(recipe)
  assert path == recipe / "report.html"
  page, checker, shown = read(path)
  check_self_contained(page, checker)
  assert len(page.encode()) < 2_000_000
  for text in (
    "+47.0 points",
    "RL raised held-out accuracy after cold start",
    "400 problems of levels 2–5, those that RL draws, each answered 8 times.",
    "80.7 – 85.3",  # the interval of RL's pass@1
    "level 6 (seen in pretraining only), level 7 (never seen by any stage).",
    "It started from examples that err by design",
    "stdlib2.783.624.71",  # cells: model, bigram, unigram
    "Drawn in training: Pretraining levels 2–6, Cold start levels 2–3, RL",
    "21.3%",  # MFU
    "given format",
    "Wrong, then right",
    "Held-out bits per byte",
    "unigram entropy 4.71",
    "bigram entropy 3.62",
    "Sampler against trainer",
    *("Reward", "Response length", "Entropy", "KL to the reference"),
    *("Clipped tokens", "Gradient norm", "Expert routes that flip"),
    "Curriculum level",
    "MoE layer 2",
    "2 min 11 s",
    "20.7 T",  # 8 stages and 7 evaluations
    "Held-out evaluations",
    "have a row of their own. Not counted",
    "214 k",
    "model.hidden_size = 64",
    "versions.jax = 0.10.2",
  ):
    assert text in shown, text
  assert "Not in this folder" not in shown
  assert page.count("<svg") == page.count("</svg>") > 20
  anchors = {v for _, name, v in checker.attributes if name == "id"}
  for _, name, value in checker.attributes:
    if name == "href" and value.startswith("#"):
      assert value[1:] in anchors, f"{value} leads nowhere"


def test_model_text_stays_text(recipe):
  # The fixture's first RL trace is hostile; make every other field so too.
  hostile = (
    "<script>alert(1)</script>\" onload='x' {{ 7*7 }} \x1b[2J\u202e\ud800"
  )
  path = recipe / "evaluate" / "rl" / "traces" / "000.jsonl"
  traces = [json.loads(line) for line in path.read_text().splitlines()]
  fields = ("prompt", "completion", "answer", "expected", "task", "level")
  for trace in traces:
    trace.update(dict.fromkeys(fields, hostile))
  path.write_text("".join(json.dumps(t) + "\n" for t in traces))
  config = recipe / "config.json"
  config.write_text(json.dumps({hostile: hostile}))
  for name in ("pretrain", "rl_final", "student_pretrain", "distill"):
    shutil.rmtree(recipe / name)  # for speed
  evil = recipe / "<b>evil & $x$"
  shutil.copytree(recipe / "sft", evil)
  shutil.copytree(recipe / "evaluate" / "sft", recipe / "evaluate" / evil.name)
  metrics = {"step": 1, "heldout/<i>\x07/bits_per_byte": 2.0}
  (evil / "metrics.jsonl").write_text(json.dumps(metrics))

  page, checker, shown = read(write_report(recipe))
  check_self_contained(page, checker)
  assert (
    "<script" not in page and "<b>evil" not in page and "<i>\\x07" not in page
  )
  assert "<script>alert(1)</script>\" onload='x' {{ 7*7 }}" in shown
  assert r"\x1b[2J\u202e\ud800" in shown
  assert r"<i>\x07" in shown
  assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page)


def test_a_partial_recipe_says_what_is_missing(recipe):
  for name in ("rejection", "sft", "rl_final", "student_pretrain", "distill"):
    shutil.rmtree(recipe / name)
    shutil.rmtree(recipe / "evaluate" / name, ignore_errors=True)
  for path in ("summary.json", "rl/summary.json", "rl/config.json"):
    (recipe / path).unlink()
  shutil.rmtree(recipe / "evaluate" / "rl")
  with (recipe / "rl" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 121, "rew')
  _, _, shown = read(write_report(recipe))
  assert "Not in this folder: Rejection sampling, SFT, Final RL" in shown
  assert "Without a summary, so not finished: RL." in shown
  assert "1 unreadable line passed over" in shown
  assert "Entropy" in shown
  assert "RL raised" not in shown


def test_a_recipe_that_has_just_begun(recipe):
  for path in recipe.iterdir():
    if path.is_dir():
      shutil.rmtree(path)
    elif path.name == "summary.json":
      path.unlink()
  (recipe / "pretrain").mkdir()
  (recipe / "pretrain" / "run.json").write_text("{}")
  _, _, shown = read(write_report(recipe))
  assert "No stage has been evaluated" in shown
  assert "Without a summary, so not finished: Pretraining." in shown


@pytest.mark.parametrize(
  ("stage", "present", "absent"),
  [
    ("pretrain", "Held-out bits per byte", "Reinforcement learning"),
    ("rl", "KL to the reference", "Pretraining and fine-tuning"),
  ],
)
def test_a_single_run(recipe, stage, present, absent):
  page, checker, shown = read(write_report(recipe / stage))
  check_self_contained(page, checker)
  assert present in shown
  assert absent not in shown
  assert "Not in this folder" not in shown
  assert "What it cost" in shown
  assert "<details open>" in page  # one stage: nothing to unfold


def test_the_folder_of_one_evaluation(recipe):
  _, _, shown = read(write_report(recipe / "evaluate" / "rl"))
  assert "83.0" in shown and "Accuracy by level" in shown
  assert "Its last completions" in shown and "a step is wrong" in shown


def test_writing_again_gives_the_same_page(recipe):
  folder = recipe / "pretrain"
  first = write_report(folder).read_bytes()
  assert write_report(folder).read_bytes() == first
  assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_nothing_to_report_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"holds no run"):
    write_report(tmp_path)


def test_a_long_run_is_still_small(recipe):
  path = recipe / "rl" / "metrics.jsonl"
  lines = path.read_text().splitlines()
  records = [json.loads(line) for line in lines]
  with path.open("w") as file:
    for i in range(20):
      for record in records:
        file.write(
          json.dumps(record | {"step": i * 120 + record["step"]}) + "\n"
        )
  page = write_report(recipe / "rl").read_bytes()
  assert len(page) < 500_000
