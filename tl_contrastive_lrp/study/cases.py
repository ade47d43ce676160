"""The record of one failure: what was asked, what was written, and the two tokens to compare.

A case is self-contained: it holds the exact token ids of prompt and completion, so that no chat
template, tokenizer version or decoding setting can change what is explained. Its version is the
version of this record; files of another one are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CASE_VERSION = 1


@dataclass(frozen=True)
class Verdict:
    """What a benchmark's checker says of a completion.

    Attributes:
        passed: Whether the completion is right.
        reason: Why not, in a few words; "" where it passed.
        checked: False where nobody could tell: the checker's library or data is missing, or code
            would have to run and there is no sandbox. ``passed`` is False then, and means nothing.
    """

    passed: bool
    reason: str = ""
    checked: bool = True

    def __post_init__(self) -> None:
        if self.passed and not self.checked:
            raise ValueError("A verdict that passes was checked; use Verdict.unchecked(reason).")

    @classmethod
    def unchecked(cls, reason: str) -> Verdict:
        """The verdict on a completion that cannot be checked here.

        Args:
            reason: Why not, and what would help.

        Returns:
            A verdict that neither passes nor fails.
        """
        return cls(False, reason, checked=False)

    @property
    def failed(self) -> bool:
        """Whether the completion was checked and is wrong."""
        return self.checked and not self.passed


@dataclass(frozen=True)
class Provenance:
    """Where a completion comes from.

    Attributes:
        model: Name of the model as the study calls it: a hub name, a folder, or a demo model.
        revision: Branch, tag or commit of a hub model; None for the default.
        fingerprint: Hash of the model's weights and configuration; "" where unknown (logs).
        decoding: How the completion was made: max_new_tokens, thinking, dtype, and so on.
        package: Version of this package, or name and version of the tool that wrote a log.
        source: The benchmark file or log that the item was read from.
    """

    model: str
    revision: str | None = None
    fingerprint: str = ""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""
    source: str = ""


@dataclass(frozen=True)
class Case:
    """One failure with its first wrong token (target) and a right alternative (contrast).

    What is explained is logit(target) − logit(contrast) after ``ids``: the prompt and the part of
    the completion before the target.

    Attributes:
        id: Unique in a study: "benchmark/item".
        benchmark: Name of the benchmark.
        prompt: The whole text before the completion, chat template included.
        prompt_ids: Its token ids.
        completion: What the model wrote.
        completion_ids: Its token ids.
        target_position: Index in ``completion_ids`` of the first wrong token.
        target_id: That token.
        target: Its text.
        contrast_id: The token that should have been written instead.
        contrast: Its text.
        delta: logit(target) − logit(contrast) of the model that wrote the completion.
        verdict: What the checker said of the completion.
        provenance: Model, decoding and versions.
        messages: The chat that became the prompt; None where the prompt was plain text.
        tools: Tools that the chat offered.
        reference: The right answer, as the benchmark gives it.
        segments: Named stretches of ``ids``, each a tuple of (start, end) in tokens, ends excluded:
            "instruction" at least, where the benchmark knows it.
        decisive_positions: Positions in ``ids`` that decide which token is right, if known.
        locator: Name of the locator that found the target.
        contrast_source: Where the contrast is from: "own top 10", "sibling NAME", "given".
        version: Version of this record.
    """

    id: str
    benchmark: str
    prompt: str
    prompt_ids: tuple[int, ...]
    completion: str
    completion_ids: tuple[int, ...]
    target_position: int
    target_id: int
    target: str
    contrast_id: int
    contrast: str
    delta: float
    verdict: Verdict
    provenance: Provenance
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    reference: str | None = None
    segments: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    decisive_positions: tuple[int, ...] | None = None
    locator: str = "given"
    contrast_source: str = "given"
    version: int = CASE_VERSION

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids whose next token is explained."""
        return self.prompt_ids + self.completion_ids[: self.target_position]


@dataclass(frozen=True)
class Dropped:
    """A completion that did not become a case, and why.

    Attributes:
        id: "benchmark/item", as a case would be called.
        benchmark: Name of the benchmark.
        reason: One of ``REASONS``.
        detail: More words.
    """

    id: str
    benchmark: str
    reason: str
    detail: str = ""


REASONS = {
    "passes": "the checker passes the completion: no failure",
    "not located": "no locator found the first wrong token",
    "no contrast": "no other token there makes the completion pass",
    "small delta": "Δℓ is not above the study's minimum",
    "not the top token": "the wrong token is not the model's first choice at its position",
    "too long": "prompt and completion do not fit into the model's context",
    "malformed": "the row cannot be read",
    "unchecked": "there is no checker for this row here",
}
