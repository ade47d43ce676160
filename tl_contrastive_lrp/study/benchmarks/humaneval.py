"""HumanEval and EvalPlus: Python functions to complete, checked by running their tests elsewhere.

This package executes nothing. A completion is checked only by the ``sandbox`` that the caller
passes: a callable that gets a whole Python program as text and a time limit in seconds, runs it
where it can do no harm (a container, a virtual machine), and answers whether it ended without an
error. Without one every completion is unchecked.

The program is the code of the completion, the benchmark's test, and the call of its ``check``. A
completion that has a fenced block with the function's definition is that block, after what the
prompt has before the function (imports, helpers). Otherwise it is a continuation of the prompt
and ends where a line begins, without indentation, with one of ``STOPS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from ...errors import FileFormatError, a_kind
from ..cases import Verdict
from .item import Item
from .published import OnError, Published
from .rows import Row, Table

# (program, seconds) -> whether the program ended without an error, within the time.
Sandbox = Callable[[str, float], bool]

# Beginnings of lines that end a continuation, as in the paper of HumanEval.
STOPS = ("class ", "def ", "#", "if ", "print", "```", "@", "assert ", "import ", "from ")

_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_REQUEST = "Complete this Python function. Answer with the whole function in one code block."


class HumanEval(Published):
    """HumanEval: 164 functions, each with a docstring and a test.

    Args:
        rows: The rows as published.
        limit: The most items.
        on_error: What to do with malformed rows.
        sandbox: Runs a program, as the module describes; None to run nothing.
        timeout: Its time limit, in seconds.
        chat: Whether to ask for the function in a chat; otherwise the prompt is continued as text.
    """

    name = "humaneval"
    table = Table(
        "openai/openai_humaneval",
        "MIT",
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    )

    def __init__(
        self,
        rows: Iterable[Row | FileFormatError],
        limit: int | None = None,
        on_error: OnError = "raise",
        sandbox: Sandbox | None = None,
        timeout: float = 10.0,
        chat: bool = True,
    ) -> None:
        if sandbox is not None and not callable(sandbox):
            raise TypeError(
                f"sandbox is {a_kind(sandbox)}; give a callable sandbox(program, seconds) "
                "that answers True or False."
            )
        self.sandbox, self.timeout, self.chat = sandbox, timeout, chat
        super().__init__(rows, limit, on_error)

    def _item(self, row: Row) -> Item:
        prompt, function = row.text("prompt"), row.text("entry_point")
        row.text("test")
        if not re.search(rf"^def {re.escape(function)}\b", prompt, re.MULTILINE):
            raise row.wrong("prompt", f"does not define the entry point {function!r}")
        asked = f"{_REQUEST}\n\n```python\n{prompt.rstrip()}\n```"
        return Item(
            id=row.text("task_id"),
            messages=({"role": "user", "content": asked},) if self.chat else None,
            prompt=None if self.chat else prompt,
            reference=row.text("canonical_solution"),
            instructions=described(prompt, function),
            row=row.values,
            source=row.where,
        )

    def check(self, item: Item, completion: str) -> Verdict:
        """Whether the tests pass in the sandbox; unchecked without one."""
        if self.sandbox is None:
            return Verdict.unchecked(
                "code is executed only by a sandbox that you pass: "
                f"open_benchmark({self.name!r}, sandbox=...)"
            )
        passed = self.sandbox(program(item, completion), self.timeout)
        if not isinstance(passed, bool):
            raise TypeError(f"The sandbox answered {passed!r}; it must answer True or False.")
        return Verdict(True) if passed else Verdict(False, "the tests fail")


class EvalPlus(HumanEval):
    """HumanEval+ of EvalPlus: the same functions with many more tests."""

    name = "evalplus"
    table = Table(
        "evalplus/humanevalplus",
        "Apache-2.0",
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    )


def program(item: Item, completion: str) -> str:
    """The program that decides whether a completion is right. It is text; nothing runs it here.

    Args:
        item: An item of HumanEval or EvalPlus.
        completion: What a model wrote.

    Returns:
        Source code that raises an error unless the completion passes.
    """
    prompt, function = str(item.row["prompt"]), str(item.row["entry_point"])
    definition = re.compile(rf"^def {re.escape(function)}\b", re.MULTILINE)
    blocks = [block for block in _FENCED.findall(completion) if definition.search(block)]
    whole = blocks[0] if blocks else completion if definition.search(completion) else None
    if whole is not None:
        start = definition.search(prompt)
        code = prompt[: start.start() if start else 0] + whole
    else:
        code = prompt + _continuation(completion)
    return f"{code}\n\n{item.row['test']}\n\ncheck({function})\n"


def _continuation(completion: str) -> str:
    stop = re.search(rf"^(?:{'|'.join(map(re.escape, STOPS))})", completion, re.MULTILINE)
    return completion if stop is None else completion[: stop.start()]


def described(prompt: str, function: str) -> tuple[str, ...]:
    """The lines of a function's docstring that say what it must do, without its examples.

    Args:
        prompt: Source code whose function has a docstring.
        function: The function.

    Returns:
        The lines, verbatim but for white space around them, up to the first that shows an example
        (``>>>``, or a line that begins with "Example" or "For example"); () without a docstring.
    """
    body = re.search(
        rf'^def {re.escape(function)}\b.*?("""|\'\'\')(.*?)\1', prompt, re.MULTILINE | re.DOTALL
    )
    lines: list[str] = []
    for line in (body[2] if body else "").splitlines():
        line = line.strip()
        if line.startswith(">>>") or re.match(r"(?i)(for )?examples?\b", line):
            break
        if line:
            lines.append(line)
    return tuple(lines)
