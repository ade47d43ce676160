"""The report of a study: a page, its figures and data as files, and every number as JSON.

``report("out.html")`` writes ``out.html``; ``out.json`` beside it, with every number of the page;
and the folder ``out_files`` with the figures as SVG and the data as CSV and Parquet. Nothing is
computed in the page: its tables are formatted from the values in ``out.json``. All are named after
the page, so reports in one folder keep their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import atomic_path, save_html, why_not_a_page
from ..render.study.page import CaseEntry, Section, report_page
from ..render.study.tables import StudyTable
from .analysis import CaseAnalysis
from .case_view import case_view
from .criteria import notebook_reading
from .figures import Figure, figures_of
from .labels import Label
from .results import StudyResults
from .sizes import segment_values
from .tables import all_labels, tables_of

if TYPE_CHECKING:
    import pandas as pd

    from ..attribution.check import MapCheck

REPORT_VERSION = 1

# Id, heading, tables and figures of each section, in order. A figure's name ending in
# "*" stands for all that begin so.
_SECTIONS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("about", "Models", ("models",), ()),
    ("clean", "From completions to cases", ("clean",), ()),
    ("table1", "Outcomes and patterns (Table 1)", ("table1",), ("outcomes", "patterns")),
    ("rules", "Rule sets side by side", ("rules",), ()),
    ("verdicts", "Verdicts on the maps", ("verdicts", "verdictlabels"), ()),
    ("flips", "Tokens to flip", ("flips",), ("flips",)),
    ("segments", "Segment sums", ("segments",), ("segments",)),
    ("sizes", "Larger models", ("sizes", "correction"), ("scatter-*", "correction-*")),
    ("training", "Over training", ("checkpoints",), ("trajectories", "checkpoint-segments")),
    ("metrics", "Graph metrics", ("metrics",), ()),
    ("truth", "Against the planted truth", ("truth",), ()),
    ("labels", "Labels and their agreement", ("agreement", "notebooks"), ()),
)
_INTERVALS = (
    "Brackets are 95 % intervals of a bootstrap over cases (2,000 resamples; BCa for means; for "
    "shares of none or all cases, where a bootstrap has no width, Wilson's)."
)


def report(
    results: StudyResults, path: str | os.PathLike[str], *, texts: bool = True
) -> dict[str, Any]:
    """Write the report of a study.

    Args:
        results: The study.
        path: The HTML file to write.
        texts: Whether prompts, completions and tokens are shown and written. Without them the page
            has the same numbers, and of a case's texts only the two tokens compared: for
            benchmarks whose text must not be passed on.

    Returns:
        The content of the JSON file: "tables" and "figures" by name, "facts", and "cases".

    Raises:
        ValueError: The study has no case, or the file's name is no page's.
        FileNotFoundError: The folder does not exist.
        FileExistsError: Where the page's JSON would lie is a file that is none of a report.

    Example:
        >>> from tl_contrastive_lrp.study.report import report
        >>> numbers = report(results, "report.html")
        >>> numbers["tables"]["truth"]["rows"][0]["k"]
        1
    """
    path = Path(path)
    if (why := why_not_a_page(path)) is not None:
        raise ValueError(why)
    if not results.cases:
        raise ValueError(f"study {results.name!r} has no case to report; {results.why_none}")
    data = data_path(path)
    if data.exists() and not data.read_bytes().startswith(_BEGINNING.encode()):
        raise FileExistsError(
            f"{data} is no data of a report, and that of {path.name} would replace it; give the "
            "page another name."
        )
    labels = all_labels(results)
    tables = tables_of(results, labels)
    figures = figures_of(results, tables)
    numbers: dict[str, Any] = {
        "version": REPORT_VERSION,
        "name": results.name,
        "facts": _plain(results.facts),
        "tables": {id: _table(table) for id, table in tables.items()},
        "figures": {id: {"caption": f.caption, "data": f.data} for id, f in figures.items()},
        "cases": [_case_row(results, case_id, labels) for case_id in results.by_id],
    }
    numbers = {key: _plain(value) for key, value in numbers.items()}
    html = report_page(
        results.name,
        _facts(results, texts),
        _sections(tables, figures),
        _entries(results, labels, texts),
    )
    save_html(path, html)
    folder = data.with_name(f"{data.name.removesuffix('.json')}_files")
    folder.mkdir(exist_ok=True)
    text = json.dumps(numbers, ensure_ascii=True, allow_nan=False, indent=1)
    _write_text(data, text + "\n")
    for figure in figures.values():
        _write_text(folder / f"{figure.id}.svg", str(figure.svg))
    for name, frame in _frames(results, labels, texts).items():
        _write_frame(folder, name, frame)
    return numbers


_BEGINNING = '{\n "version": '  # of every JSON file that a report writes


def data_path(page: Path) -> Path:
    """Where the numbers of a report lie: named after its page.

    Args:
        page: The page's path.
    """
    # In "Qwen3-0.6B" the end is part of the name, as for pages.
    name = page.stem if page.suffix[1:2].isalpha() else page.name
    return page.with_name(f"{name}.json")


def _table(table: StudyTable) -> dict[str, Any]:
    return {
        "title": table.title,
        "columns": [{"key": c.key, "title": c.title, "kind": c.kind} for c in table.columns],
        "rows": [dict(row) for row in table.rows],
        "note": table.note,
    }


def _plain(value: Any) -> Any:
    """A value for JSON: numpy numbers as Python's, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _facts(results: StudyResults, texts: bool) -> list[str]:
    """The sentences of the first paragraph."""
    facts, base = results.facts, results.base
    benchmarks = ", ".join(results.benchmarks)
    size = f" ({base.n_parameters / 1e6:,.3g} M parameters)" if base.n_parameters else ""
    sentences = [
        f"{len(results.cases)} failures of {base.name}{size} on {benchmarks}, explained by "
        f"contrastive attribution under {', '.join(results.rules) or 'no rule set'}."
    ]
    others = [f"{m.name} ({m.role})" for m in results.models if m.role != "base"]
    if others:
        sentences.append(f"The same cases through {', '.join(others)}.")
    if missing := facts.get("missing_analyses"):
        words = "1 analysis is" if missing == 1 else f"{missing:,} analyses are"
        sentences.append(f"{words} missing: the run was not finished, or could not make them.")
    if missing := facts.get("missing_checks"):
        words = "1 check of a map is" if missing == 1 else f"{missing:,} checks of maps are"
        sentences.append(f"{words} missing: the run was not finished, or could not make them.")
    differences = facts.get("differences") or ()
    if isinstance(differences, str):
        differences = (differences,)
    if differences:
        words = " ".join(f"{str(one).rstrip('.')}." for one in differences)
        sentences.append(f"What differs from arXiv 2604.17761: {words}")
    if facts.get("date"):
        sentences.append(f"Made on {facts['date']}.")
    versions = facts.get("versions")
    if isinstance(versions, Mapping) and versions:
        words = ", ".join(f"{name} {version}" for name, version in versions.items())
        sentences.append(f"Versions: {words}.")
    elif versions:
        sentences.append(f"Versions: {versions}.")
    if facts.get("command"):
        sentences.append(f"Command: {facts['command']}.")
    sentences.append("Positive relevance (red) supports the wrong token that was written.")
    sentences.append(_INTERVALS)
    if not texts:
        sentences.append("The texts of the benchmarks are left out.")
    return sentences


def _sections(tables: Mapping[str, StudyTable], figures: Mapping[str, Figure]) -> list[Section]:
    sections = []
    for id, title, names, patterns in _SECTIONS:
        chosen = [
            figure
            for pattern in patterns
            for name, figure in figures.items()
            if name == pattern or (pattern[-1] == "*" and name.startswith(pattern[:-1]))
        ]
        sections.append(
            Section(
                id,
                title,
                [tables[name] for name in names if name in tables],
                [(figure.caption, figure.svg) for figure in chosen],
            )
        )
    return sections


def _sign(value: float) -> int:
    return int(value > 0) - int(value < 0)


def _entries(results: StudyResults, labels: Sequence[Label], texts: bool) -> list[CaseEntry]:
    by_case: dict[str, list[Label]] = {}
    for label in labels:
        by_case.setdefault(label.case_id, []).append(label)
    entries = []
    for case in results.cases:
        found = [results.analysis(case.id, results.base.name, rules) for rules in results.rules]
        analyses = [analysis for analysis in found if analysis is not None]
        if not analyses:
            continue
        checks = _checks(results, case.id)
        view = case_view(case, analyses, checks)
        if not texts:
            hidden = tuple("\u25aa" for _ in view.str_tokens)
            graph = view.graph and replace(view.graph, str_tokens=hidden)
            view = replace(view, str_tokens=hidden, facts=(), graph=graph)
        entries.append(
            CaseEntry(
                view,
                [(la.labeller, la.outcome, la.pattern) for la in by_case.get(case.id, ())],
                {name: _sign(value) for name, value in segment_values(analyses[0]).items()},
                {r: checks[r].verdict if r in checks else "" for r in results.checked_rules},
            )
        )
    return entries


def _checks(results: StudyResults, case_id: str) -> dict[str, MapCheck]:
    """The checks of a case's maps, by rule set."""
    return {
        rules: results.checks[case_id, rules]
        for rules in results.checked_rules
        if (case_id, rules) in results.checks
    }


def _case_row(results: StudyResults, case_id: str, labels: Sequence[Label]) -> dict[str, Any]:
    case = results.by_id[case_id]
    return {
        "id": case.id,
        "benchmark": case.benchmark,
        "delta": case.delta,
        "tokens": len(case.ids),
        "target": case.target,
        "contrast": case.contrast,
        "locator": case.locator,
        "contrast_source": case.contrast_source,
        "labels": [
            {"labeller": la.labeller, "outcome": la.outcome, "pattern": la.pattern}
            for la in labels
            if la.case_id == case.id
        ],
        "checks": {
            rules: {"verdict": check.verdict, "captured": check.captured, "words": check.sentence}
            for rules, check in _checks(results, case.id).items()
        },
    }


def _check_row(case_id: str, check: MapCheck) -> dict[str, Any]:
    return {
        "case_id": case_id,
        "rules": check.rules,
        "verdict": check.verdict,
        **check.statistics,
        "delta": check.delta,
        "k": check.k,
        "n_random": check.n_random,
        "measured": len(check.measured),
        "seed": check.seed,
        "window": check.window,
        "replaced_with": check.replaced_with,
        "forwards": check.forwards,
        "seconds": check.seconds,
    }


def _analysis_row(analysis: CaseAnalysis) -> dict[str, Any]:
    reading = notebook_reading(analysis)
    return {
        "case_id": analysis.case_id,
        "model": analysis.model,
        "fingerprint": analysis.fingerprint,
        "rules": analysis.rules,
        "delta": analysis.delta,
        "target_rank": analysis.target_rank,
        "contrast_rank": analysis.contrast_rank,
        "tokens_to_flip": analysis.tokens_to_flip,
        "flip_limit": analysis.flip_limit,
        "notebook_reading": reading.reading,
        "notebook_graph_needed": reading.graph_needed,
        **{f"segment_{name}": value for name, value in segment_values(analysis).items()},
        **{f"group_{name}".replace(" ", "_"): v for name, v in analysis.groups.items()},
        **{f"metric_{name}": value for name, value in analysis.metrics.items()},
        **{f"seconds_{name}": value for name, value in analysis.seconds.items()},
    }


def _frames(results: StudyResults, labels: Sequence[Label], texts: bool) -> dict[str, pd.DataFrame]:
    """The data as tables: one row a case, analysis, check, label, drop and, in Parquet only, token.

    Without checks there is no table of them.
    """
    import pandas as pd

    cases = [
        {k: v for k, v in _case_row(results, case_id, ()).items() if k not in ("labels", "checks")}
        for case_id in results.by_id
    ]
    frames = {
        "cases": pd.DataFrame(cases),
        "analyses": pd.DataFrame([_analysis_row(a) for a in results.analyses]),
        "labels": pd.DataFrame(
            [[la.case_id, la.labeller, la.outcome, la.pattern, la.note, la.date] for la in labels],
            columns=["case_id", "labeller", "outcome", "pattern", "note", "date"],
        ),
        "dropped": pd.DataFrame(
            [[d.id, d.benchmark, d.reason, d.detail if texts else ""] for d in results.dropped],
            columns=["id", "benchmark", "reason", "detail"],
        ),
    }
    if results.checks:
        rows = [_check_row(case_id, check) for (case_id, _), check in results.checks.items()]
        frames["checks"] = pd.DataFrame(rows)
    for frame in frames.values():
        for column in frame.select_dtypes(include=["object", "str"]).columns:
            frame[column] = [
                _readable(one) if isinstance(one, str) else one for one in frame[column]
            ]
    frames["tokens"] = _token_frame(results.analyses, texts)
    return frames


def _token_frame(analyses: Sequence[CaseAnalysis], texts: bool) -> pd.DataFrame:
    """One row for each token of each analysis; names repeat, so they are categories."""
    import pandas as pd

    lengths = [len(a.tokens) for a in analyses]

    def repeated(names: list[str]) -> Any:
        kinds = list(dict.fromkeys(_readable(name) for name in names))
        at = {kind: i for i, kind in enumerate(kinds)}
        codes = np.repeat([at[_readable(name)] for name in names], lengths).astype(np.int64)
        return pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(kinds))

    def joined(parts: list[Any], kind: Any) -> Any:
        return np.concatenate([np.zeros(0, kind), *parts])

    columns: dict[str, Any] = {
        "case_id": repeated([a.case_id for a in analyses]),
        "model": repeated([a.model for a in analyses]),
        "rules": repeated([a.rules for a in analyses]),
        "position": joined([np.arange(n) for n in lengths], np.int64),
    }
    if texts:
        columns["token"] = [_readable(text) for a in analyses for text in a.str_tokens]
    columns["special"] = joined([a.special.numpy() for a in analyses], bool)
    columns["relevance"] = joined([a.tokens.float().numpy() for a in analyses], np.float32)
    return pd.DataFrame(columns)


def _readable(text: str) -> str:
    """A text that UTF-8 can hold: lone surrogates are replaced."""
    return text.encode("utf-8", "replace").decode()


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_frame(folder: Path, name: str, frame: pd.DataFrame) -> None:
    with atomic_path(folder / f"{name}.parquet") as temporary:
        frame.to_parquet(temporary, index=False)
    if name != "tokens":
        with atomic_path(folder / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
