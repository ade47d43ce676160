"""The report: its numbers by slow counting, page and data in agreement, files that read back."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from support.browser import HOSTILE
from support.studies import made_up_study

from tl_contrastive_lrp.render.study.tables import cell
from tl_contrastive_lrp.study.cases import REASONS, Dropped
from tl_contrastive_lrp.study.criteria import automatic_label
from tl_contrastive_lrp.study.label_page import label_page
from tl_contrastive_lrp.study.labels import OUTCOMES
from tl_contrastive_lrp.study.report import report


class Tables(HTMLParser):
    """The text of each cell of each table with an id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.rows: list[list[str]] | None = None
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            name = dict(attrs).get("id")
            self.rows = self.tables.setdefault(name, []) if name else None
        elif self.rows is not None and tag == "tr":
            self.rows.append([])
        elif self.rows is not None and tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False
        if tag == "table":
            self.rows = None

    def handle_data(self, data: str) -> None:
        if self.inside and self.rows:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("report")
    return folder, report(made_up_study(12), folder / "out.html")


def test_every_number_in_the_tables_is_in_the_data(made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    numbers = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    found = Tables((folder / "out.html").read_text(encoding="utf-8")).tables
    assert {name.removeprefix("table-") for name in found} == set(numbers["tables"])
    for name, table in numbers["tables"].items():
        head, *rows = found[f"table-{name}"]
        assert head == [column["title"] for column in table["columns"]]
        assert len(rows) == len(table["rows"])
        for row, values in zip(rows, table["rows"], strict=True):
            for text, column in zip(row, table["columns"], strict=True):
                expected = cell(values.get(column["key"]), column["kind"])
                assert text.split() == f"{expected.text} {expected.small}".split()


def test_cells_round_what_they_show() -> None:
    shown = {
        ("number", 1234.5): "1,234", ("number", 123.45): "123.5", ("number", -1.005): "−1.00",
        ("number", 0.0049): "0.0049", ("number", 0): "0.00", ("count", 12345): "12,345",
        ("percent", 0.1234): "12.3 %", ("text", "a\0"): "a␀", ("share", None): "–",
    }  # fmt: skip
    assert {key: cell(key[1], key[0]).text for key in shown} == shown
    share = cell({"count": 3, "of": 4, "share": 0.75, "low": 0.2, "high": 1.0}, "share")
    assert (share.text, share.small) == ("3/4 (75.0 %)", "[20.0, 100.0 %]")
    with pytest.raises(ValueError, match="'odd'"):
        cell(1, "odd")


def test_table_1_by_slow_counting(made: tuple[Path, dict[str, Any]]) -> None:
    study, (_, numbers) = made_up_study(12), made
    rows = {(r["benchmark"], r["source"]): r for r in numbers["tables"]["table1"]["rows"]}
    for benchmark in ("ifeval", "math"):
        cases = [c for c in study.cases if c.benchmark == benchmark]
        automatic = [
            automatic_label(c, study.analysis(c.id, "small", "attnlrp"))  # type: ignore[arg-type]
            for c in cases
        ]
        people = {
            "here, Ada": [la for la in study.labels if la.labeller == "Ada"],
            "here, automatic": [la for la in automatic if la],
        }
        for source, labels in people.items():
            row = rows[benchmark, source]
            here = [la for la in labels if la.case_id in {c.id for c in cases}]
            assert row["labelled"] == len(here)
            for outcome in OUTCOMES:
                assert row[outcome]["count"] == len([la for la in here if la.outcome == outcome])
                assert row[outcome]["of"] == len(here)
            assert row["URT"]["of"] == len([la for la in here if la.pattern is not None])
            assert row["tokens"] == sum(len(c.ids) for c in cases) / len(cases)
    # Of four ifeval completions dropped two are passes: six cases of eight failures.
    assert rows["ifeval", "here, Ada"]["kept"]["count"] == 6
    assert rows["ifeval", "here, Ada"]["failures"] == 8
    published = rows["IFEval", "published"]
    assert (published["M-IA"]["count"], published["M-IA"]["of"]) == (46, 55)
    assert sum(r["source"] == "published" for r in numbers["tables"]["table1"]["rows"]) == 4


def test_rules_flips_and_sizes_by_slow_counting(made: tuple[Path, dict[str, Any]]) -> None:
    study, (_, numbers) = made_up_study(12), made
    tables = numbers["tables"]
    for row in tables["flips"]["rows"]:
        found = [a for a in study.analyses if a.rules == row["rules"] and a.model == "small"]
        flipped = [a.tokens_to_flip for a in found if a.tokens_to_flip is not None]
        assert row["flipped"]["count"] == len(flipped)
        assert row["mean"]["estimate"] == pytest.approx(sum(flipped) / len(flipped))
        counted = sum(flipped) + 9 * (len(found) - len(flipped))
        assert row["at_least"]["estimate"] == pytest.approx(counted / len(found))
    for row in tables["rules"]["rows"]:
        ratios, signs = [], 0
        for a in study.analyses:
            if (a.model, a.rules) == ("small", row["rules"]):
                ratios.append(sum(map(float, a.tokens)) / a.delta)
                signs += sum(float(v) for v in a.tokens[1:]) > 0
        assert row["sum"]["estimate"] == pytest.approx(sum(ratios) / 12, rel=1e-5)
        assert row["sign"]["count"] == signs
    assert tables["rules"]["rows"][0]["overlap"]["estimate"] == 1
    large = next(row for row in tables["sizes"]["rows"] if row["model"] == "large")
    deltas = [a.delta for a in study.analyses if a.model == "large"]
    assert large["corrected"]["count"] == sum(d < -1 for d in deltas)
    assert large["not corrected"]["count"] == sum(d > 1 for d in deltas)
    assert large["delta"]["estimate"] == pytest.approx(sum(deltas) / 12)
    assert sum(r["cases"] for r in tables["correction"]["rows"] if r["sibling"] == "large"
               and r["model"] == "small") == sum(abs(d) > 1 for d in deltas)  # fmt: skip


def test_data_reads_back(made: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = made
    study, files = made_up_study(12), folder / "out_files"
    assert numbers == json.loads((folder / "study.json").read_text(encoding="utf-8"))
    for name in ("cases", "analyses", "labels", "dropped"):
        csv, parquet = (
            pd.read_csv(files / f"{name}.csv"),
            pd.read_parquet(files / f"{name}.parquet"),
        )
        assert list(csv.columns) == list(parquet.columns)
        assert len(csv) == len(parquet)
    analyses = pd.read_parquet(files / "analyses.parquet")
    assert len(analyses) == len(study.analyses)
    assert analyses["delta"].tolist() == [a.delta for a in study.analyses]
    tokens = pd.read_parquet(files / "tokens.parquet")
    case = study.cases[3]
    mine = tokens[(tokens.case_id == case.id) & (tokens.model == "large")]
    found = study.analysis(case.id, "large", "attnlrp")
    assert found is not None
    assert mine["relevance"].tolist() == found.tokens.tolist()
    assert mine["token"].tolist() == list(found.str_tokens)
    figures = {path.stem for path in files.glob("*.svg")}
    assert figures == set(numbers["figures"])
    assert {"outcomes", "patterns", "flips", "segments", "scatter-1", "correction-2",
            "trajectories", "checkpoint-segments"} <= figures  # fmt: skip


def test_figures_are_well_formed_and_hold_the_points(made: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = made
    for path in (folder / "out_files").glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height
    scatter = ElementTree.parse(folder / "out_files" / "scatter-1.svg").getroot()
    circles = list(scatter.iter("{http://www.w3.org/2000/svg}circle"))
    points = {
        f"{id}: {x:.2f}, {y:.2f}": (x, y) for id, x, y, _ in numbers["figures"]["scatter-1"]["data"]
    }
    assert len(circles) == len(points) == 12
    # Places are linear in the values: any two points give the same scale.
    placed = sorted((points[c[0].text], float(c.attrib["cx"]), float(c.attrib["cy"]))
                    for c in circles)  # type: ignore[index]  # fmt: skip
    (a, ax, ay), (b, bx, by) = placed[0], placed[-1]
    slope = (bx - ax) / (b[0] - a[0])
    for (x, y), cx, cy in placed:
        assert cx == pytest.approx(ax + slope * (x - a[0]), abs=0.05)
        assert cy == pytest.approx(ay + (by - ay) / (b[1] - a[1]) * (y - a[1]), abs=0.1)
    assert slope > 0 > (by - ay) / (b[1] - a[1])


def test_hostile_texts_are_escaped_everywhere(tmp_path: Path) -> None:
    study = made_up_study(6, hostile=True)
    numbers = report(study, tmp_path / "out.html")
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert html.count("<script") == 2  # the data and the program
    assert "<img" not in html
    assert "<svg/onload" not in html
    assert "'/onmouseover='" not in html
    for path in (tmp_path / "out_files").glob("*.svg"):
        kinds = {e.tag.rpartition("}")[2] for e in ElementTree.parse(path).iter()}
        assert kinds <= {"svg", "title", "g", "rect", "circle", "line", "path", "text"}
    assert [row["id"] for row in numbers["cases"]] == [case.id for case in study.cases]
    assert any(HOSTILE[1] in row["id"] for row in numbers["cases"])


def test_texts_can_be_left_out(tmp_path: Path) -> None:
    study = made_up_study(6)
    secret = "a sentence of the benchmark"
    cases = tuple(
        replace(c, prompt=secret, completion=secret, reference=secret) for c in study.cases
    )
    analyses = tuple(
        replace(a, str_tokens=tuple(f"{secret} {i}" for i in range(len(a.tokens))))
        for a in study.analyses
    )
    study = replace(study, cases=cases, analyses=analyses)
    with_texts = report(study, tmp_path / "with.html")
    without = report(study, tmp_path / "without.html", texts=False)
    assert with_texts["tables"] == without["tables"]
    for name, there in (("with", True), ("without", False)):
        html = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        blobs = re.findall(r'"data":"([A-Za-z0-9+/=]+)"', html)
        assert len(blobs) == 6
        content = html + "".join(zlib.decompress(base64.b64decode(b)).decode() for b in blobs)
        tokens = pd.read_parquet(tmp_path / f"{name}_files" / "tokens.parquet")
        content += tokens.to_csv()
        assert (secret in content) is there


def test_reports_that_cannot_be_made_say_why(tmp_path: Path) -> None:
    study = made_up_study(4)
    with pytest.raises(ValueError, match=r"has no case to report; 4 completions were d.*1"):
        report(replace(study, cases=(), analyses=(), labels=()), tmp_path / "out.html")
    gone = (Dropped("demo/1", "demo", "passes"),)
    none = replace(study, cases=(), analyses=(), labels=(), dropped=gone)
    with pytest.raises(ValueError, match=r"has no case to label; 1 completion was dropped \(pas"):
        label_page(none, tmp_path / "out.html")
    with pytest.raises(ValueError, match=r"out\.html"):
        report(study, tmp_path / "out.pdf")
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_checked_is_no_failure(tmp_path: Path) -> None:
    """Without exact tokens, or too long to be read, a completion may as well have passed."""
    study = made_up_study(4)
    name = study.cases[0].benchmark
    dropped = [Dropped(f"{name}/x{i}", name, reason) for i, reason in enumerate(REASONS)]
    study = replace(study, cases=study.cases, dropped=tuple(dropped))
    kept = sum(case.benchmark == name for case in study.cases)
    table = report(study, tmp_path / "out.html")["tables"]["clean"]
    row = next(row for row in table["rows"] if row["benchmark"] == name)
    # Judged wrong: not located, no contrast, small delta, not the top token.
    assert row["failures"] == kept + 4
    assert (row["kept"]["count"], row["kept"]["of"]) == (kept, kept + 4)
    assert row["completions"] == kept + len(REASONS)


def test_analyses_that_are_missing_are_said(tmp_path: Path) -> None:
    study = made_up_study(3)
    for missing, words in ((0, False), (2, True)):
        facts = {**study.facts, "missing_analyses": missing}
        report(replace(study, facts=facts), tmp_path / "out.html")
        text = (tmp_path / "out.html").read_text("utf-8")
        assert ("2 analyses are missing" in text) == words
        assert ("analyses are missing" in text) == words


def test_a_study_with_one_benchmark_and_nothing_else_has_a_report(tmp_path: Path) -> None:
    study = made_up_study(4, people=())
    base = tuple(a for a in study.analyses if a.model == "small" and a.rules == "attnlrp")
    bare = replace(
        study,
        analyses=tuple(replace(a, tokens_to_flip=None, flip_limit=0, metrics={}) for a in base),
        models=study.models[:1],
        dropped=(),
        facts={},
    )
    numbers = report(bare, tmp_path / "out.html")
    assert not {"flips", "sizes", "correction", "checkpoints", "metrics"} & set(numbers["tables"])
    assert {"clean", "table1", "rules", "segments"} <= set(numbers["tables"])
    assert 'id="sizes"' not in (tmp_path / "out.html").read_text(encoding="utf-8")
