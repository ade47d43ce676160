"""The demo benchmark's file against the generator that wrote it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study.benchmarks import open_benchmark

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # demo_training is not part of the wheel

from demo_training import benchmark as script  # noqa: E402
from demo_training.marked import Task, Turn, strip  # noqa: E402
from demo_training.tasks import KINDS  # noqa: E402
from demo_training.train import load_tokenizer  # noqa: E402

FILE = clrp.demo.demo_dir() / "tasks.jsonl"


def test_the_file_is_what_the_script_writes():
    made = script.lines(70, 0, 500, load_tokenizer(clrp.demo.demo_dir()))
    text = "".join(json.dumps(r, ensure_ascii=False, separators=(",", ":")) + "\n" for r in made)
    assert text == FILE.read_text("utf-8")
    assert FILE.stat().st_size <= 400_000


def test_no_task_is_of_the_training_part():
    """The split's own hash, of the message (of tool tasks: of the log)."""
    items = open_benchmark("demo").items()
    assert len({item.row["user"] for item in items}) == len(items) == 400
    assert [item.row["kind"] for item in items[:8]] == list(KINDS) * 2
    for item in items:
        user = item.row["user"]
        log = user.removeprefix("Log:\n").rpartition("\n")[0] if item.row["kind"] == "tool" else ""
        key = "\n".join(log.split("\n")) if log else ""
        assert Task(item.row["kind"], "", (Turn(user, ()),), split_key=key).held_out, item.id


def test_truth_for_every_token_is_the_generators():
    """Decisive tokens as evaluate.py finds them, for each token of the answer and its end."""
    import torch

    from demo_training.evaluate import END, Asked
    from demo_training.tokenizer import chat_prompt
    from tl_contrastive_lrp.study.collect.spans import character_spans

    tokenizer = load_tokenizer(clrp.demo.demo_dir())
    benchmark = open_benchmark("demo")
    by_user = {item.row["user"]: item for item in benchmark.items()}
    n = 0
    for kind in KINDS:
        for _, task in list(script._of_cases(kind))[:4]:
            user = strip(task.turns[0].user)[0]
            item, prompt = by_user[user], chat_prompt(user)
            text = prompt + task.turns[0].answer_text + END
            coded = tokenizer(text, return_offsets_mapping=True)
            ids, offsets = coded["input_ids"], coded["offset_mapping"]
            first = len(tokenizer(prompt)["input_ids"])
            asked = Asked(task, text, ids, first, torch.zeros(0), offsets)
            pieces = [text[a:b] for a, b in offsets]
            for index in range(first, len(ids)):
                beginning = text[len(prompt) : offsets[index][0]]
                in_user, in_answer = benchmark.decisive_spans(item, beginning)
                start = prompt.index(user)
                spans = [(a + start, b + start) for a, b in in_user]
                spans += [(a + len(prompt), b + len(prompt)) for a, b in in_answer]
                assert list(character_spans(pieces[:index], spans)) == asked.decisive(index)[0]
                rest = benchmark.right_text(item, beginning)
                assert (tokenizer(rest)["input_ids"] or [ids[-1]])[0] == ids[index]
                n += 1
    assert n > 150


def test_verdicts_follow_the_right_answer():
    benchmark = open_benchmark("demo", limit=4)
    for item in benchmark.items():
        answer = item.reference
        assert benchmark.check(item, answer).passed
        assert not benchmark.check(item, answer + " ").passed
        assert not benchmark.check(item, answer[:-1]).passed
        assert benchmark.can_pass(item, answer[:5])
        assert not benchmark.can_pass(item, answer + "x")
        assert benchmark.first_wrong(item, [*answer, "<end>"], True) is None
        assert benchmark.first_wrong(item, [*answer[:3], "<end>"], True) == 3
        assert benchmark.first_wrong(item, [*answer[:3], "\x00"], False) == 3
        assert benchmark.decisive_spans(item, "\x00") is None
        assert all(p in item.row["user"] + answer for p in benchmark.decisive(item, answer, 4))


def test_only_a_newline_ends_a_task(tmp_path):
    row = json.loads(FILE.read_text("utf-8").split("\n")[0])
    row["user"] += "\u2028\x85"
    line = json.dumps(row, ensure_ascii=False)
    (tmp_path / "t.jsonl").write_text(f"{line}\n{line}", "utf-8")
    items = open_benchmark("demo", tmp_path / "t.jsonl").items()
    assert [item.row["user"] for item in items] == [row["user"]] * 2


def test_files_that_are_no_tasks_are_named(tmp_path):
    line = FILE.read_text("utf-8").split("\n")[0]
    row = json.loads(line)
    wrong = {
        "not JSON": "{",
        "no answer": json.dumps({k: v for k, v in row.items() if k != "answer"}),
        "do not spell": json.dumps({**row, "answer": "else"}),
        "is not in the message": json.dumps({**row, "instructions": ["\x00"]}),
    }
    for message, bad in wrong.items():
        (tmp_path / "t.jsonl").write_text(f"{line}\n{bad}\n")
        with pytest.raises(FileFormatError, match=rf"t.jsonl:2: .*{message}"):
            open_benchmark("demo", tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match="unknown kind of demo task: 'maths'"):
        open_benchmark("demo", kinds=("maths",))
    with pytest.raises(ValueError, match="limit is 0"):
        open_benchmark("demo", limit=0)
