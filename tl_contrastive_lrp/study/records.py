"""What the store holds of a study: plain JSON and named tensors, and back, exactly.

Reading builds the same frozen records, whose own checks run again; a record with a field that is
missing or unknown is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor

from ..attribution.check import MapCheck
from ..graph.export import from_parts, to_parts
from ..graph.graph import AttributionGraph
from .analysis import CaseAnalysis, SegmentSum
from .cases import Case, Dropped, case_from, record_of

RecordT = TypeVar("RecordT")


def collected_data(one: Case | Dropped) -> dict[str, Any]:
    """What became of a completion, as JSON holds it."""
    fields_of_it = record_of(one) if isinstance(one, Case) else dataclasses.asdict(one)
    return {"type": type(one).__name__, **fields_of_it}


def collected_from(data: Mapping[str, Any]) -> Case | Dropped:
    """The case, or dropped completion, that ``collected_data`` wrote.

    Raises:
        KeyError, TypeError, ValueError: A field is missing, unknown or wrong.
    """
    rest = {name: value for name, value in data.items() if name != "type"}
    if data["type"] == "Dropped":
        return _made(Dropped, rest)
    if data["type"] != "Case":
        raise ValueError(f"{data['type']!r} is no record of a case")
    _require_fields(Case, rest)
    return case_from(rest)


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


# What a check cost, which is no result.
_COST = ("forwards", "seconds")


def check_data(check: MapCheck) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A check as JSON holds it, and its tensors; without what it cost, which is no result."""
    values = {one.name: getattr(check, one.name) for one in fields(check)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    record = {n: v for n, v in values.items() if n not in tensors and n not in _COST}
    return record, tensors


def check_cost(check: MapCheck) -> dict[str, float]:
    """What a check cost, by name: forwards of the prompt, and seconds."""
    return {name: getattr(check, name) for name in _COST}


def check_from(
    data: Mapping[str, Any], tensors: Mapping[str, Tensor], cost: Mapping[str, float]
) -> MapCheck:
    """The check that ``check_data`` and ``check_cost`` wrote.

    Args:
        data: Its record.
        tensors: Its tensors.
        cost: What it cost.

    Raises:
        KeyError, TypeError, ValueError: A field is missing, unknown or wrong.
    """
    rest = {**data, **tensors, **{name: cost[name] for name in _COST}}
    return _made(MapCheck, {**rest, "names": tuple(rest["names"])})


def _made(kind: type[RecordT], data: Mapping[str, Any]) -> RecordT:
    _require_fields(kind, data)
    return kind(**data)


def _require_fields(kind: type[Any], data: Mapping[str, Any]) -> None:
    names = {one.name for one in fields(kind)}
    if names != set(data):
        differing = ", ".join(sorted(names ^ set(data)))
        raise ValueError(f"fields of {kind.__name__} missing or unknown: {differing}")
