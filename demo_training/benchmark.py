"""Write the demo benchmark of the study room: held-out tasks with their truth, token by token.

    python -m demo_training.benchmark --out tl_contrastive_lrp/demo/data/tasks.jsonl

The generator is not part of the wheel, so what it knows is written down: the user's message, the
right answer as tokens, and for each token (and for the end of the answer) which passages of the
message and of the answer so far decide it. Whatever a model of the family writes, its first wrong
token is then the first that leaves the answer, and what should have decided is known.

Tasks are of the held-out part (a hash of the text, see ``marked.py``), so no model has seen them.
First come ``--each`` new tasks of each kind, in turn, then the tasks of ``cases.jsonl``. Two runs
write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tl_contrastive_lrp.demo import demo_dir, load_demo_cases

from .evaluate import held_out
from .marked import Task, strip
from .tasks import KINDS, make_task
from .tokenizer import chat_prompt
from .train import load_tokenizer

CASES_SEED, CASES_LONGEST, CASES_DRAWN = 1, 1152, 4000
"""With these `export.py` drew the tasks of cases.jsonl."""


def record(task: Task, name: str, tokenizer: Any) -> dict[str, Any]:
    """One line of the file.

    marks: where the named passages are, [first character, one past the last], in the message and
    in the answer. tokens: the answer's, each with the index of its piece. pieces: the names of the
    passages that decide it, and its number of options; the last one is the end of the answer.
    """
    turn = task.turns[0]
    user, user_marks = strip(turn.user)
    answer, answer_marks = strip("".join(s.text for s in turn.answer))
    ends, at = [], 0
    for segment in turn.answer:
        at += len(strip(segment.text)[0])
        ends.append(at)
    prompt = chat_prompt(user)
    coded = tokenizer(prompt + answer, return_offsets_mapping=True)
    n = len(tokenizer(prompt)["input_ids"])
    tokens = []
    for a, b in coded["offset_mapping"][n:]:
        a, b = a - len(prompt), b - len(prompt)
        tokens.append([answer[a:b], next(i for i, end in enumerate(ends) if b <= end)])
    if "".join(text for text, _ in tokens) != answer:
        raise AssertionError(f"{name}: the tokens do not spell the answer")
    used = {name for s in turn.answer for name in s.by} | set(turn.end_by)
    pieces = [[list(s.by), s.options] for s in turn.answer] + [
        [list(turn.end_by), turn.end_options]
    ]
    return {
        "id": name,
        "kind": task.kind,
        "family": task.family,
        "user": user,
        "answer": answer,
        "instructions": _instructions(task.kind, user),
        "marks": {
            "user": _by_name(user_marks, used),
            "answer": _by_name(answer_marks, used),
        },
        "tokens": tokens,
        "pieces": pieces,
    }


def _by_name(marks: list[tuple[str, int, int]], used: set[str]) -> dict[str, list[list[int]]]:
    named: dict[str, list[list[int]]] = {}
    for name, a, b in marks:
        if name in used:
            named.setdefault(name, []).append([a, b])
    return named


def _instructions(kind: str, user: str) -> list[str]:
    """The sentences that say what to do, in the words of the message."""
    if kind == "format":
        return re.split(r"(?<=\.) (?=[A-Z])", user)[1:]
    if kind == "arithmetic":
        return [user[user.rindex("How many") :]]
    return [user.split("\n")[0] if kind == "code" else user.split("\n")[-1]]


def _of_cases(kind: str) -> Iterator[tuple[str, Task]]:
    """The tasks of cases.jsonl of one kind, each once."""
    wanted: dict[str, str] = {}
    for case in load_demo_cases(kind, failed=None):
        wanted.setdefault(case.user, case.id)
    for task in held_out(kind, CASES_SEED, CASES_DRAWN, CASES_LONGEST):
        name = wanted.pop(strip(task.turns[0].user)[0], None)
        if name is not None:
            yield name, task
        if not wanted:
            return
    raise AssertionError(f"not drawn again: {sorted(wanted.values())}")


def lines(each: int, seed: int, longest: int, tokenizer: Any) -> list[dict[str, Any]]:
    """All records, in the file's order."""
    cases = {kind: list(_of_cases(kind)) for kind in KINDS}
    new: dict[str, list[dict[str, Any]]] = {}
    for kind in KINDS:
        rng = random.Random(f"study/{kind}/{seed}")
        seen = {strip(task.turns[0].user)[0] for _, task in cases[kind]}
        made = new.setdefault(kind, [])
        while len(made) < each:
            task = make_task(kind, rng, max_length=longest)
            user = strip(task.turns[0].user)[0]
            if user not in seen:
                seen.add(user)
                made.append(record(task, f"{kind}-{len(made):03d}", tokenizer))
    found = [new[kind][i] for i in range(each) for kind in KINDS]
    return found + [record(task, name, tokenizer) for kind in KINDS for name, task in cases[kind]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--each", type=int, default=70, help="new tasks of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=500, help="longest new log, in tokens")
    args = parser.parse_args()
    made = lines(args.each, args.seed, args.longest, load_tokenizer(demo_dir()))
    with args.out.open("w", encoding="utf-8", newline="\n") as file:
        for line in made:
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{len(made)} tasks, {args.out.stat().st_size} bytes in {args.out}")


if __name__ == "__main__":
    main()
