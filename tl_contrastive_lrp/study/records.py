"""Cases and analyses as the store holds them: plain JSON and named tensors, and back, exactly.

Reading builds the same frozen records, whose own checks run again; a record with a field that is
missing or unknown is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor

from ..graph.export import from_parts, to_parts
from ..graph.graph import AttributionGraph
from .analysis import CaseAnalysis, SegmentSum
from .cases import Case, Dropped, Provenance, Verdict

RecordT = TypeVar("RecordT")


def case_data(case: Case | Dropped) -> dict[str, Any]:
    """A case, or a dropped completion, as JSON holds it."""
    return {"type": type(case).__name__, **dataclasses.asdict(case)}


def case_from(data: Mapping[str, Any]) -> Case | Dropped:
    """The case, or dropped completion, that ``case_data`` wrote.

    Raises:
        KeyError, TypeError, ValueError: A field is missing, unknown or wrong.
    """
    rest = {name: value for name, value in data.items() if name != "type"}
    if data["type"] == "Dropped":
        return _made(Dropped, rest)
    if data["type"] != "Case":
        raise ValueError(f"{data['type']!r} is no record of a case")
    for name in ("prompt_ids", "completion_ids", "decisive_positions"):
        rest[name] = _as_tuple(rest[name])
    for name in ("messages", "tools"):
        rest[name] = _as_tuple(rest[name])
    rest["segments"] = {
        name: tuple((int(start), int(end)) for start, end in spans)
        for name, spans in rest["segments"].items()
    }
    rest["verdict"] = _made(Verdict, rest["verdict"])
    rest["provenance"] = _made(Provenance, rest["provenance"])
    return _made(Case, rest)


def analysis_data(analysis: CaseAnalysis) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An analysis as JSON holds it, and its tensors; without the wall time, which is no result."""
    record = {
        one.name: getattr(analysis, one.name)
        for one in fields(analysis)
        if one.name not in ("tokens", "special", "graph", "seconds")
    }
    record["segments"] = [dataclasses.asdict(part) for part in analysis.segments]
    tensors = {"tokens": analysis.tokens, "special": analysis.special}
    record["graph"] = None
    if analysis.graph is not None:
        parts, record["graph"] = to_parts(analysis.graph)
        tensors |= {f"graph.{name}": part for name, part in parts.items() if part is not None}
    return record, tensors


def analysis_from(
    data: Mapping[str, Any], tensors: Mapping[str, Tensor], seconds: Mapping[str, float]
) -> CaseAnalysis:
    """The analysis that ``analysis_data`` wrote.

    Args:
        data: Its record.
        tensors: Its tensors.
        seconds: Wall time of its parts.

    Raises:
        KeyError, TypeError, ValueError: A field is missing, unknown or wrong.
    """
    rest = dict(data)
    rest["segments"] = tuple(_made(SegmentSum, part) for part in rest["segments"])
    rest["str_tokens"] = tuple(rest["str_tokens"])
    rest["tokens"], rest["special"] = tensors["tokens"], tensors["special"]
    if rest["graph"] is not None:
        parts = {
            name.removeprefix("graph."): part
            for name, part in tensors.items()
            if name.startswith("graph.")
        }
        rest["graph"] = from_parts(parts, rest["graph"], AttributionGraph)
    return _made(CaseAnalysis, {**rest, "seconds": dict(seconds)})


def _as_tuple(value: Any) -> Any:
    return None if value is None else tuple(value)


def _made(kind: type[RecordT], data: Mapping[str, Any]) -> RecordT:
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    if names != set(data):
        differing = ", ".join(sorted(names ^ set(data)))
        raise ValueError(f"fields of {kind.__name__} missing or unknown: {differing}")
    return kind(**data)
