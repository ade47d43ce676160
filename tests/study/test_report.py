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
from support.studies import CAPTURED, made_up_check, made_up_checks, made_up_study

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
    numbers = json.loads((folder / "out.json").read_text(encoding="utf-8"))
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


VERDICTS = {0.9: "supported", 0.25: "weak", -0.5: "contradicted", None: "weak", 0.6: "supported"}


def test_verdicts_by_slow_counting(tmp_path: Path) -> None:
    study = made_up_study(12)
    plain = report(study, tmp_path / "out.html")
    assert not {"verdicts", "verdictlabels"} & set(plain["tables"])
    assert not (tmp_path / "out_files" / "checks.csv").exists()
    assert not re.search(r'id="verdicts"|id="verdict"', (tmp_path / "out.html").read_text("utf-8"))

    study = replace(study, checks=made_up_checks(study))
    numbers = report(study, tmp_path / "out.html")
    shares = {case.id: CAPTURED[i % 5] for i, case in enumerate(study.cases)}
    rows = {(row["benchmark"], row["rules"]): row for row in numbers["tables"]["verdicts"]["rows"]}
    # Under gradient every other case was checked, which are those of the first benchmark.
    assert set(rows) == {(b, "attnlrp") for b in ("ifeval", "math", "all")} | {
        (b, "gradient") for b in ("ifeval", "all")
    }
    for (benchmark, rules), row in rows.items():
        cases = [case for case in study.cases if benchmark in (case.benchmark, "all")]
        if rules == "gradient":
            cases = [case for case in cases if case.benchmark == "ifeval"]
        found = [-1.0 if rules == "gradient" else shares[case.id] for case in cases]
        verdicts = ["contradicted" if share == -1.0 else VERDICTS[share] for share in found]
        assert row["cases"] == len(cases)
        for name in ("supported", "weak", "contradicted"):
            assert (row[name]["count"], row[name]["of"]) == (verdicts.count(name), len(cases))
        known = [share for share in found if share is not None]
        assert row["captured"]["n"] == len(known)
        assert row["captured"]["estimate"] == pytest.approx(sum(known) / len(known))
        assert row["sign"]["estimate"] == pytest.approx(sum(s > 0 for s in known) / len(known))
        if rules == "attnlrp":
            assert row["captured"]["low"] < row["captured"]["estimate"] < row["captured"]["high"]
        assert row["forwards"] == 9.5

    crossed = numbers["tables"]["verdictlabels"]["rows"]
    assert {row["labeller"] for row in crossed} == {"automatic", "Ada", "Bo"}
    automatic = [
        automatic_label(c, study.analysis(c.id, "small", "attnlrp"))  # type: ignore[arg-type]
        for c in study.cases
    ]
    labels = [*study.labels, *(label for label in automatic if label)]
    for row in crossed:
        of = [id for id, share in shares.items() if VERDICTS[share] == row["verdict"]]
        mine = [la for la in labels if la.labeller == row["labeller"] and la.case_id in of]
        assert (row["cases"], row["labelled"]) == (len(of), len(mine))
        for outcome in OUTCOMES:
            count = len([la for la in mine if la.outcome == outcome])
            assert (row[outcome]["count"], row[outcome]["of"]) == (count, len(mine))

    for row in numbers["cases"]:
        check = row["checks"]["attnlrp"]
        assert check["verdict"] == VERDICTS[shares[row["id"]]]
        assert check["captured"] == pytest.approx(shares[row["id"]])
        assert check["words"].startswith(check["verdict"] + ": ")
        assert ("gradient" in row["checks"]) == row["id"].startswith("ifeval")
    for frame in (
        pd.read_csv(tmp_path / "out_files" / "checks.csv"),
        pd.read_parquet(tmp_path / "out_files" / "checks.parquet"),
    ):
        assert len(frame) == 12 + 6
        first = frame[frame.rules == "attnlrp"]
        assert first["verdict"].tolist() == [VERDICTS[share] for share in shares.values()]
        assert first["captured"].isna().tolist() == [s is None for s in shares.values()]
        assert set(frame["forwards"]) == {9.5}
    found_tables = Tables((tmp_path / "out.html").read_text(encoding="utf-8")).tables
    assert {"table-verdicts", "table-verdictlabels"} <= set(found_tables)


def test_a_case_shows_its_verdict_and_the_sentence(tmp_path: Path) -> None:
    study = made_up_study(6, hostile=True)
    study = replace(study, checks=made_up_checks(study))
    report(study, tmp_path / "out.html", texts=False)
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert html.count("<script") == 2
    assert "<img" not in html
    assert "<svg/onload" not in html
    assert html.count('<span class="verdict">') == 6
    assert 'title="attnlrp: supported, gradient: contradicted">supported</span>' in html
    assert '<select id="verdict">' in html
    blobs = re.findall(r'"data":"([A-Za-z0-9+/=]+)"', html)
    for case, blob in zip(study.cases, blobs, strict=True):
        data = json.loads(zlib.decompress(base64.b64decode(blob)))
        check = study.checks[case.id, "attnlrp"]
        verdict, sentence, figures = data["checks"]["attnlrp"]
        assert (verdict, sentence) == (check.verdict, check.sentence)
        assert check.cost in figures

    # A rule set of any name, such as one of a study that somebody else wrote, stays a text.
    evil = "</script><img src=x onerror=alert(1)>"
    analyses = tuple(replace(a, rules=evil) if a.rules == "gradient" else a for a in study.analyses)
    checks = {(c.id, evil): made_up_check(c, 0.9, evil) for c in study.cases}
    report(replace(study, analyses=analyses, checks=checks), tmp_path / "out.html")
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert html.count("<script") == 2
    assert "<img" not in html


def test_data_reads_back(made: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = made
    study, files = made_up_study(12), folder / "out_files"
    assert numbers == json.loads((folder / "out.json").read_text(encoding="utf-8"))
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


def test_two_reports_in_one_folder_keep_their_own_files(tmp_path: Path) -> None:
    study = made_up_study(3)
    for name, label in (("a.html", "first"), ("b.HTML", "second"), ("Q-0.6B", "third")):
        report(replace(study, name=label), tmp_path / name)
    for name, label in (("a", "first"), ("b", "second"), ("Q-0.6B", "third")):
        numbers = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert numbers["name"] == label
        assert (tmp_path / f"{name}_files" / "cases.csv").is_file()
    report(replace(study, name="again"), tmp_path / "a.html")  # its own data is replaced
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["name"] == "again"


def test_a_file_that_is_no_data_of_a_report_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "failures.json"
    theirs.write_text('{"eval": {}, "samples": []}')
    with pytest.raises(FileExistsError, match=r"failures\.json is no data of a report"):
        report(made_up_study(3), tmp_path / "failures.html")
    assert theirs.read_text() == '{"eval": {}, "samples": []}'
    assert not (tmp_path / "failures.html").exists()
