"""The demo model's held-out cases, read from ``data/cases.jsonl``."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files

KINDS = ("format", "arithmetic", "code", "tool")


@dataclass(frozen=True)
class DemoCase:
    """One choice between two tokens on a held-out prompt.

    id: name of the case. kind: one of `KINDS`; family: the template within the kind.
    failed: True if the model's answer is wrong (target is the wrong token it wrote, contrast the
    right one); False if the whole answer is right (target is the right token it wrote, contrast
    its best wrong alternative).
    prompt: full text in the chat format, answer_prefix included; the token after it is explained.
    user: the user's message alone. answer: the whole right answer; model_answer: what greedy
    decoding writes.
    target, contrast: text of the two tokens; target_id, contrast_id: their ids.
    delta: logit(target) − logit(contrast) after the prompt, float32; above 1.
    n_tokens: tokens in the prompt.
    decisive_positions: ascending token positions in the prompt that decide which token is right,
    as the generator of the benchmark knows; decisive_text: the text of those tokens.
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
    text = files(__package__).joinpath("data").joinpath("cases.jsonl").read_text("utf-8")
    names = {f.name for f in fields(DemoCase)}
    cases = []
    for number, line in enumerate(text.splitlines(), 1):
        values = json.loads(line)
        if set(values) != names:
            differing = ", ".join(sorted(set(values) ^ names))
            raise ValueError(f"cases.jsonl, line {number}: fields missing or unknown: {differing}")
        for name in ("decisive_positions", "decisive_text"):
            values[name] = tuple(values[name])
        cases.append(DemoCase(**values))
    return tuple(cases)


def load_demo_cases(kind: str | None = None, failed: bool | None = True) -> tuple[DemoCase, ...]:
    """Held-out cases of the demo model, in the order of the file.

    kind: "format", "arithmetic", "code" or "tool"; None for all four.
    failed: True for failures (the default), False for solved cases, None for both.
    Raises ValueError for an unknown kind and TypeError if `failed` is not one of the three.
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
