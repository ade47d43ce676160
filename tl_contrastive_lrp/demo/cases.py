"""The demo model's held-out cases, read from ``data/cases.jsonl``."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files

# The kinds of task in the benchmark.
KINDS = ("format", "arithmetic", "code", "tool")


@dataclass(frozen=True)
class DemoCase:
    """One choice between two tokens on a held-out prompt.

    Attributes:
        id: Name of the case.
        kind: One of ``KINDS``.
        family: The template within the kind.
        failed: Whether the model's answer is wrong. If so, ``target`` is the wrong token that it
            wrote and ``contrast`` the right one. If not, ``target`` is the right token that it
            wrote and ``contrast`` the best wrong alternative.
        user: The user's message alone.
        answer_prefix: The beginning of the answer, which the prompt includes.
        prompt: The whole text in the chat format; the token after it is explained.
        answer: The whole right answer.
        model_answer: The answer that greedy decoding writes.
        target: Text of the token that the model preferred.
        target_id: Its id.
        contrast: Text of the token that it is compared with.
        contrast_id: Its id.
        delta: logit(target) − logit(contrast) after the prompt, in float32; above 1.
        n_tokens: Number of tokens of the prompt.
        decisive_positions: The positions of the prompt that decide which token is right, in
            ascending order, as recorded by the generator of the benchmark.
        decisive_text: The text of these tokens.

    Raises:
        ValueError: The fields contradict each other.

    Example:
        >>> case = clrp.load_demo_cases("code")[0]
        >>> case.failed, case.delta > 1, case.answer == case.model_answer
        (True, True, False)
    """

    id: str
    kind: str
    family: str
    failed: bool
    user: str
    answer_prefix: str
    prompt: str
    answer: str
    model_answer: str
    target: str
    target_id: int
    contrast: str
    contrast_id: int
    delta: float
    n_tokens: int
    decisive_positions: tuple[int, ...]
    decisive_text: tuple[str, ...]

    def __post_init__(self) -> None:
        where = f"demo case {self.id!r}"
        if self.kind not in KINDS:
            raise ValueError(f"{where}: kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.target_id == self.contrast_id:
            raise ValueError(f"{where}: target and contrast are the same token {self.target_id}")
        if not self.delta > 1:
            raise ValueError(f"{where}: delta is {self.delta}, but must be above 1")
        positions = self.decisive_positions
        if not positions or list(positions) != sorted(set(positions)):
            raise ValueError(f"{where}: decisive_positions must ascend and not be empty")
        if positions[0] < 0 or positions[-1] >= self.n_tokens:
            raise ValueError(f"{where}: decisive_positions must lie in 0..{self.n_tokens - 1}")
        if len(self.decisive_text) != len(positions):
            raise ValueError(f"{where}: decisive_text needs one text per decisive position")
        if self.failed == (self.answer == self.model_answer):
            raise ValueError(f"{where}: failed is {self.failed}, which the two answers contradict")
        if not self.prompt.endswith(self.answer_prefix):
            raise ValueError(f"{where}: the prompt does not end with answer_prefix")


@cache
def _all_cases() -> tuple[DemoCase, ...]:
    """Every case of the file, checked."""
    text = files(__package__).joinpath("data").joinpath("cases.jsonl").read_text("utf-8")
    names = {f.name for f in fields(DemoCase)}
    cases = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        values = json.loads(line)
        if set(values) != names:
            differing = ", ".join(sorted(set(values) ^ names))
            raise ValueError(f"cases.jsonl, line {number}: fields missing or unknown: {differing}")
        for name in ("decisive_positions", "decisive_text"):
            values[name] = tuple(values[name])
        cases.append(DemoCase(**values))
    return tuple(cases)


def load_demo_cases(kind: str | None = None, failed: bool | None = True) -> tuple[DemoCase, ...]:
    """Load held-out cases of the demo model.

    Args:
        kind: "format", "arithmetic", "code" or "tool"; None for all four.
        failed: True for failures, False for solved cases, None for both.

    Returns:
        The cases, always in the same order.

    Raises:
        ValueError: The kind is unknown.
        TypeError: ``failed`` is not True, False or None.

    Example:
        >>> cases = clrp.load_demo_cases("arithmetic", failed=False)
        >>> {case.kind for case in cases}, any(case.failed for case in cases)
        ({'arithmetic'}, False)
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(
            f"unknown kind of demo case: {kind!r}. Use one of {', '.join(map(repr, KINDS))}, "
            "or None for all."
        )
    if failed is not None and not isinstance(failed, bool):
        raise TypeError(f"failed is {failed!r}; use True, False, or None for both.")
    return tuple(
        case
        for case in _all_cases()
        if (kind is None or case.kind == kind) and (failed is None or case.failed == failed)
    )
