"""HumanEval and EvalPlus: programs are made, and run by nobody but the user's sandbox."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study.benchmarks import open_benchmark
from tl_contrastive_lrp.study.benchmarks.humaneval import described

ROW = {
    "task_id": "Made/0",
    "prompt": (
        "from math import floor\n\n\ndef helper(n):\n    return n\n\n\n"
        'def twice(n: int) -> int:\n    """ Give back n\n    times two.\n'
        '    >>> twice(2)\n    4\n    """\n'
    ),
    "canonical_solution": "    return helper(n) * floor(2)\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "twice",
}


def sandbox(program: str, seconds: float) -> bool:
    """Another process; good enough for programs that this test has written itself."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, timeout=seconds, check=False
    )
    return done.returncode == 0


def opened(tmp_path: Path, name: str = "humaneval", row: Any = ROW, **options: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return open_benchmark(name, path=path, **options)


@pytest.mark.parametrize("name", ["humaneval", "evalplus"])
@pytest.mark.parametrize(
    ("completion", "passes"),
    [
        (ROW["canonical_solution"], True),
        ("    return 3 * n\n", False),
        ("    return 2 * n\n\nprint(1/0)\n", True),  # a continuation ends before print
        ("    return 2 * n\n```\nThat is it.", True),
        ("Here it is:\n```python\ndef twice(n):\n    return helper(n) * floor(2.5)\n```", True),
        (
            "```python\ndef twice(n):\n    return n\n```\nor\n```\ndef twice(n): return 2*n\n```",
            False,
        ),
        ("```\nx = 1\n```\n```python\ndef twice(n):\n    return n + n\n```", True),
        ("def twice(n):\n    return n + n\n", True),
        ("```python\ndef twice(n):\n    return n + n", True),  # cut off
        ("I would multiply.", False),
    ],
)
def test_verdicts(tmp_path: Path, name: str, completion: str, passes: bool) -> None:
    benchmark = opened(tmp_path, name, sandbox=sandbox)
    verdict = benchmark.check(benchmark.items()[0], completion)
    assert verdict.checked
    assert verdict.passed is passes


@pytest.mark.parametrize("name", ["humaneval", "evalplus"])
def test_nothing_is_executed_without_a_sandbox(tmp_path: Path, name: str) -> None:
    """No exec, no compile, no import and no process, whatever the code is."""
    mark = tmp_path / "ran"
    evil = f"    open({str(mark)!r}, 'w').close()\n    return 4\n"
    code = f"```python\nopen({str(mark)!r}, 'w').close()\ndef twice(n):\n{evil}```"
    row = ROW | {"test": f"open({str(mark)!r}, 'w')\n" + ROW["test"]}
    benchmark = opened(tmp_path, name, row)
    item = benchmark.items()[0]
    seen: list[str] = []
    watching = [True]

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if watching and event in ("exec", "compile", "subprocess.Popen", "os.exec", "os.system"):
            seen.append(event)

    sys.addaudithook(hook)  # cannot be removed; watching ends it
    try:
        for completion in (evil, code, ROW["canonical_solution"]):
            verdict = benchmark.check(item, completion)
            assert not verdict.checked
            assert not verdict.failed
            assert benchmark.can_pass(item, completion) is None
    finally:
        watching.clear()
    assert seen == []
    assert not mark.exists()
    assert builtins.exec is exec


def test_the_sandbox_gets_text_and_time(tmp_path: Path) -> None:
    got: list[tuple[str, float]] = []

    def record(program: str, seconds: float) -> bool:
        got.append((program, seconds))
        return True

    benchmark = opened(tmp_path, sandbox=record, timeout=3.5)
    assert benchmark.check(benchmark.items()[0], "    return 2 * n\n").passed
    [(program, seconds)] = got
    assert seconds == 3.5
    assert program == f"{ROW['prompt']}    return 2 * n\n\n\n{ROW['test']}\n\ncheck(twice)\n"


def test_a_sandbox_that_answers_something_else_is_refused(tmp_path: Path) -> None:
    benchmark = opened(tmp_path, sandbox=lambda *_: "ok")
    with pytest.raises(TypeError, match="must answer True or False"):
        benchmark.check(benchmark.items()[0], "    return 2 * n\n")
    with pytest.raises(TypeError, match="callable"):
        opened(tmp_path, sandbox="docker")


@pytest.mark.parametrize("chat", [True, False])
def test_items(tmp_path: Path, chat: bool) -> None:
    [item] = opened(tmp_path, chat=chat).items()
    assert item.instructions == ("Give back n", "times two.")
    assert (item.messages is None, item.prompt is None) == (not chat, chat)
    asked = item.prompt if item.messages is None else item.messages[0]["content"]
    assert all(phrase in asked for phrase in item.instructions)


def test_a_docstring_of_another_function_is_not_taken() -> None:
    prompt = 'def one():\n    """ first """\n\n\n'
    prompt += "def two():\n    ''' second\n    Examples:\n    x'''\n"
    assert described(prompt, "two") == ("second",)
    assert described("def two():\n", "two") == ()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"test": None}, "field 'test' is null"),
        ({"entry_point": "thrice"}, "does not define the entry point 'thrice'"),
        ({"task_id": ""}, "field 'task_id' is blank"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(FileFormatError, match=r"rows\.jsonl, line 1: ") as error:
        opened(tmp_path, row=ROW | change)
    assert named in str(error.value)
