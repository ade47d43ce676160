"""The record of one failure: what was asked, what was written, and the two tokens to compare.

A case is self-contained: it holds the exact token ids of prompt and completion, so that no chat
template, tokenizer version or decoding setting can change what is explained. Its version is the
version of this record; files of another one are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import FileFormatError

CASE_VERSION = 1


@dataclass(frozen=True)
class Verdict:
    """What a benchmark's checker says of a completion.

    Attributes:
        passed: Whether the completion is right.
        reason: Why not, in a few words; "" where it passed.
        checked: False where nobody could tell: the checker's library or data is missing, or code
            would have to run and there is no sandbox. ``passed`` is False then, and means nothing.

    Raises:
        ValueError: It passes and is unchecked, or a field has the wrong type.

    Example:
        >>> clrp.study.Verdict(False, "the tests fail").failed
        True
    """

    passed: bool
    reason: str = ""
    checked: bool = True

    def __post_init__(self) -> None:
        for name in ("passed", "checked"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"field 'verdict.{name}' is {getattr(self, name)!r}, but must be true or false"
                )
        _text("verdict.reason", self.reason, blank=True)
        if self.passed and not self.checked:
            raise ValueError("field 'verdict.checked' is false, but the verdict passes")

    @classmethod
    def unchecked(cls, reason: str) -> Verdict:
        """The verdict on a completion that cannot be checked here.

        Args:
            reason: Why not, and what would help.

        Returns:
            A verdict that neither passes nor fails.

        Example:
            >>> verdict = clrp.study.Verdict.unchecked("there is no sandbox")
            >>> verdict.passed, verdict.failed
            (False, False)
        """
        return cls(False, reason, checked=False)

    @property
    def failed(self) -> bool:
        """Whether the completion was checked and is wrong.

        Example:
            >>> clrp.study.Verdict(True).failed
            False
        """
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

    Raises:
        ValueError: A field has the wrong type, or ``decoding`` cannot be written as JSON.

    Example:
        >>> clrp.study.Provenance("demo", decoding={"max_new_tokens": 64}).decoding
        {'max_new_tokens': 64}
    """

    model: str
    revision: str | None = None
    fingerprint: str = ""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "fingerprint", "package", "source"):
            _text(f"provenance.{name}", getattr(self, name), blank=name != "model")
        if self.revision is not None:
            _text("provenance.revision", self.revision)
        decoding = _plain("provenance.decoding", self.decoding)
        if not isinstance(decoding, dict):
            raise ValueError(f"field 'provenance.decoding' is {decoding!r}, but must be an object")
        object.__setattr__(self, "decoding", decoding)


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

    Raises:
        ValueError: A field has the wrong type, or fields contradict each other.

    Example:
        >>> prompt = clrp.chat(model, [{"role": "user", "content": case.user}])
        >>> written = tuple(model.tokenizer.encode(case.model_answer, add_special_tokens=False))
        >>> failure = clrp.study.Case(
        ...     id="demo/1", benchmark="demo",
        ...     prompt=prompt, prompt_ids=tuple(prompt.tokens.tolist()),
        ...     completion=case.model_answer, completion_ids=written,
        ...     target_position=written.index(case.target_id),
        ...     target_id=case.target_id, target=case.target,
        ...     contrast_id=case.contrast_id, contrast=case.contrast, delta=case.delta,
        ...     verdict=clrp.study.Verdict(False, "another answer"),
        ...     provenance=clrp.study.Provenance("demo"), reference=case.answer,
        ... )
        >>> len(failure.ids) == case.n_tokens
        True
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

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != CASE_VERSION:
            raise ValueError(
                f"field 'version' is {self.version!r}, this package reads {CASE_VERSION}"
            )
        for name in ("id", "benchmark", "locator", "contrast_source"):
            _text(name, getattr(self, name))
        for name in ("prompt", "completion", "target", "contrast"):
            _text(name, getattr(self, name), blank=True)
        if self.reference is not None:
            _text("reference", self.reference, blank=True)
        if not isinstance(self.verdict, Verdict):
            raise ValueError(f"field 'verdict' is {self.verdict!r}, but must be a Verdict")
        if not isinstance(self.provenance, Provenance):
            raise ValueError(f"field 'provenance' is {self.provenance!r}, but must be a Provenance")
        if not self.verdict.failed:
            said = "passes" if self.verdict.passed else "is unchecked"
            raise ValueError(f"field 'verdict' says that the completion {said}: it is no failure")
        delta = self.delta
        if (
            not isinstance(delta, int | float)
            or isinstance(delta, bool)
            or not math.isfinite(delta)
        ):
            raise ValueError(f"field 'delta' is {delta!r}, but must be a finite number")
        values: dict[str, Any] = {
            name: _ids(name, getattr(self, name)) for name in ("prompt_ids", "completion_ids")
        }
        for name in ("target_position", "target_id", "contrast_id"):
            values[name] = _index(name, getattr(self, name))
        written = values["completion_ids"]
        if self.target_position >= len(written):
            raise ValueError(
                f"field 'target_position' is {self.target_position}, but the completion has "
                f"{len(written)} tokens"
            )
        if written[self.target_position] != self.target_id:
            raise ValueError(
                f"field 'target_id' is {self.target_id}, but completion_ids has "
                f"{written[self.target_position]} at position {self.target_position}"
            )
        if self.target_id == self.contrast_id:
            raise ValueError(f"field 'contrast_id' is the target's, {self.target_id}")
        length = len(values["prompt_ids"]) + self.target_position
        for name in ("messages", "tools"):
            values[name] = _objects(name, getattr(self, name))
        for number, message in enumerate(values["messages"] or (), 1):
            if not isinstance(message.get("role"), str):
                raise ValueError(f"field 'messages': message {number} has no role")
        values["segments"] = _segments(self.segments, length)
        values["decisive_positions"] = _positions(self.decisive_positions, length)
        values["delta"] = float(delta)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids whose next token is explained: the prompt's, and the completion's before it.

        Example:
            >>> failure = clrp.study.Case(
            ...     "a/1", "a", "Hi", (5, 6), "abc", (7, 8, 9), target_position=1, target_id=8,
            ...     target="b", contrast_id=3, contrast="x", delta=2.0,
            ...     verdict=clrp.study.Verdict(False), provenance=clrp.study.Provenance("demo"),
            ... )
            >>> failure.ids
            (5, 6, 7)
        """
        return self.prompt_ids + self.completion_ids[: self.target_position]


@dataclass(frozen=True)
class Dropped:
    """A completion that did not become a case, and why.

    Attributes:
        id: "benchmark/item", as a case would be called.
        benchmark: Name of the benchmark.
        reason: One of ``REASONS``.
        detail: More words.

    Example:
        >>> clrp.study.Dropped("demo/3", "demo", "small delta", "Δℓ is 0.4").reason
        'small delta'
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
    "too long": "prompt and completion exceed the model's context or the study's limit",
    "malformed": "the row cannot be read",
    "unchecked": "there is no checker for this row here",
    "tokens unknown": "the exact token ids cannot be rebuilt from the log",
}


def record_of(case: Case) -> dict[str, Any]:
    """A case as JSON data; ``case_from`` makes the same case of it.

    Args:
        case: The case.

    Returns:
        Its fields, nested as in ``Case``, with lists for tuples.
    """
    record: dict[str, Any] = json.loads(json.dumps(asdict(case)))
    return record


def case_from(record: Mapping[str, Any], where: str = "this case") -> Case:
    """Make a case of JSON data and check it.

    Args:
        record: The fields of ``Case``; ``verdict`` and ``provenance`` are objects too.
        where: The place it was read from, for messages: "cases.jsonl, line 3".

    Returns:
        The case.

    Raises:
        FileFormatError: A field is missing, unknown or wrong, or the record has another version.
    """
    if not isinstance(record, Mapping):
        raise FileFormatError(f"{where}: {record!r} in place of an object with a case's fields.")
    version = record.get("version")
    if "version" in record and version != CASE_VERSION:
        raise FileFormatError(
            f"{where}: field 'version': the record has version {version!r}, this package reads "
            f"{CASE_VERSION}; upgrade tl_contrastive_lrp, or save the cases again."
        )
    values = _known(record, Case, where)
    for name, kind in (("verdict", Verdict), ("provenance", Provenance)):
        if not isinstance(values[name], Mapping):
            raise FileFormatError(f"{where}: field {name!r} must be an object.")
        values[name] = _built(kind, _known(values[name], kind, where, f"{name}."), where)
    for name in ("prompt_ids", "completion_ids", "messages", "tools", "decisive_positions"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    case: Case = _built(Case, values, where)
    return case


def _built(kind: Any, values: dict[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except ValueError as error:
        raise FileFormatError(f"{where}: {error}.") from error


def _known(
    record: Mapping[str, Any], kind: type[Any], where: str, prefix: str = ""
) -> dict[str, Any]:
    """The values of a record whose names are a class's fields, none of the needed ones missing."""
    known = {f.name: f for f in fields(kind)}
    unknown = [name for name in record if name not in known]
    if unknown:
        raise FileFormatError(f"{where}: there is no field {prefix + str(unknown[0])!r} in a case.")
    missing = [name for name in _REQUIRED[kind] if name not in record]
    if missing:
        raise FileFormatError(f"{where}: field {prefix + missing[0]!r} is missing.")
    return dict(record)


_REQUIRED: Mapping[type[Any], tuple[str, ...]] = {
    # A file says its version, and whether a verdict was checked; only in Python are they implied.
    Case: (
        "version", "id", "benchmark", "prompt", "prompt_ids", "completion", "completion_ids",
        "target_position", "target_id", "target", "contrast_id", "contrast", "delta", "verdict",
        "provenance",
    ),
    Verdict: ("passed", "checked"),
    Provenance: ("model",),
}  # fmt: skip


def _text(name: str, value: Any, blank: bool = False) -> None:
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {value!r}, but must be a text")
    if not blank and not value.strip():
        raise ValueError(f"field {name!r} is blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"field {name!r} is no Unicode text: {error.reason}") from error


def _index(name: str, value: Any) -> int:
    """A number that counts from 0; numpy's and torch's whole numbers are not taken."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"field {name!r} is {value!r}, but must be a whole number from 0")
    return value


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"field {name!r} must be a list of token ids that is not empty")
    for id in value:
        _index(name, id)
    return tuple(value)


def _plain(name: str, value: Any) -> Any:
    """A value as JSON gives it back, with lists for tuples."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ValueError(f"field {name!r} cannot be written as JSON: {error}") from error
    if not _has_text_keys(value):  # JSON would write the key 1 as "1"
        raise ValueError(f"field {name!r} has keys that are no texts")
    return json.loads(text)


def _has_text_keys(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _has_text_keys(v) for k, v in value.items())
    return not isinstance(value, list | tuple) or all(map(_has_text_keys, value))


def _objects(name: str, value: Any) -> tuple[dict[str, Any], ...] | None:
    if value is None:
        return None
    plain = _plain(name, value)
    if not isinstance(plain, list) or not all(isinstance(one, dict) for one in plain):
        raise ValueError(f"field {name!r} must be a list of objects")
    return tuple(plain)


def _segments(value: Any, length: int) -> dict[str, tuple[tuple[int, int], ...]]:
    if not isinstance(value, Mapping):
        raise ValueError("field 'segments' must be an object: names, each with (start, end) pairs")
    segments = {}
    for name, spans in value.items():
        _text("segments", name)
        checked = []
        if not isinstance(spans, list | tuple):
            raise ValueError(f"field 'segments': {name!r} must be a list of (start, end)")
        for span in spans:
            if (
                not isinstance(span, list | tuple)
                or len(span) != 2
                or any(type(end) is not int for end in span)
                or not 0 <= span[0] < span[1] <= length
            ):
                raise ValueError(
                    f"field 'segments': {name!r} has {span!r}; a stretch is (start, end) with "
                    f"0 <= start < end <= {length}, the number of tokens before the target"
                )
            checked.append((span[0], span[1]))
        segments[name] = tuple(checked)
    return segments


def _positions(value: Any, length: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ValueError("field 'decisive_positions' must be a list of positions, or null")
    for position in value:
        if _index("decisive_positions", position) >= length:
            raise ValueError(
                f"field 'decisive_positions' has {position}, but {length} tokens are before the "
                "target"
            )
    if list(value) != sorted(set(value)):
        raise ValueError("field 'decisive_positions' must ascend")
    return tuple(value)
