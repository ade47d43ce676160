"""The published study of SmolLM2: its page says what its numbers say, and neither holds texts."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.studies import made_up_analysis, made_up_case, made_up_study

from studies.markdown import table, value
from tl_contrastive_lrp.study.report import report
from tl_contrastive_lrp.study.results import ModelEntry, StudyResults

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ID = re.compile(r"(gsm8k/\d+|ifeval/\d+|math/test/[a-z_]+/\d+\.json|humaneval/HumanEval/\d+)")


published = pytest.mark.skipif(
    not (DOCS / "study_smollm2.md").exists(), reason="the study's page is not published yet"
)


def page_module() -> Any:
    path = ROOT / "studies" / "smollm2" / "page.py"
    spec = importlib.util.spec_from_file_location("study_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "study_smollm2.json").read_text("utf-8"))
    return found


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from texts(key)
            yield from texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts(one)


@published
def test_the_page_says_what_the_numbers_say() -> None:
    assert page_module().page(numbers()) == (DOCS / "study_smollm2.md").read_text("utf-8")


@published
def test_the_tables_count_the_cases() -> None:
    found = numbers()
    columns = found["cases"]["columns"]
    cases = [dict(zip(columns, row, strict=True)) for row in found["cases"]["rows"]]
    assert len(cases) >= 150
    assert min(case["delta"] for case in cases) > 1
    by_benchmark = Counter(case["benchmark"] for case in cases)
    for row in found["tables"]["clean"]["rows"]:
        n = len(cases) if row["benchmark"] == "all" else by_benchmark[row["benchmark"]]
        assert row["kept"]["count"] == n
        dropped = sum(count for key, count in row.items() if key.startswith("dropped: "))
        assert row["completions"] == n + dropped
    for row in found["tables"]["table1"]["rows"]:
        if row.get("published"):
            continue
        here = [c for c in cases if row["benchmark"] in (c["benchmark"], "all")]
        outcomes = Counter(case["outcome"] for case in here)
        for outcome in ("M-IA", "NC-IA+M-AG", "NC-IA+AG"):
            assert row[outcome]["count"] == outcomes[outcome]
    assert {row["rules"] for row in found["tables"]["rules"]["rows"]} == {
        "attnlrp", "cplrp", "relp", "gim", "gradient",
    }  # fmt: skip


@published
def test_there_is_no_text_of_a_benchmark() -> None:
    found = numbers()
    known = {
        "own top 10",
        "constraint",
        "divergence",
        "recovery",
        "gsm8k",
        "math",
        "ifeval",
        "humaneval",
    }
    known |= {"M-IA", "NC-IA+M-AG", "NC-IA+AG", "URT", "OIT", "both"}
    for row in found["cases"]["rows"]:
        for text in texts(row):
            assert text in known or ID.fullmatch(text), text
    # Tables and figures name models, metrics and rule sets, but no case.
    for part in ("tables", "figures"):
        for text in texts(found[part]):
            assert not ID.search(text), text
    assert set(found) == {"version", "name", "facts", "tables", "figures", "cases", "seconds"}


def test_of_a_report_the_numbers_alone_are_kept(tmp_path: Path) -> None:
    study = made_up_study(6, people=())
    whole = report(study, tmp_path / "out.html", texts=False)
    for number, case in enumerate(whole["cases"]):
        case["target"], case["contrast"] = f"secret {number}", f"hidden {number}"
    module = page_module()
    kept = module.compact(whole, {"collect": 7200.0, "flip": 1800.0})
    assert not re.search("secret|hidden", json.dumps(kept))
    assert [row[0] for row in kept["cases"]["rows"]] == [case["id"] for case in whole["cases"]]
    for name, data in kept["tables"].items():  # a bar in a title would begin another column
        lines = table(kept, name).splitlines()
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert bars == {len(data["columns"]) + 1}
    written = table(kept, "flips").splitlines()
    assert len(written) == 2 + len(kept["tables"]["flips"]["rows"])
    first = kept["tables"]["flips"]["rows"][0]
    share = first["flipped"]
    assert f"{share['count']}/{share['of']}" in written[2]
    assert value(kept, "flips", {"rules": first["rules"]}, "flipped") in written[2]
    with pytest.raises(ValueError, match="unpack"):
        value(kept, "flips", {"rules": "none"}, "flipped")


def test_digits_are_counted_as_by_hand() -> None:
    # The two strongest of 1..7 count. Digits lie at 2 and 5, the written one at 5.
    texts = ("<s>", "a", "4", " b", "c", " 7", "d", "e")
    rows = {
        "found": [9.0, 0.1, 0.0, 0.2, -3.0, 2.0, 0.0, 0.0],  # strongest: c, then 7
        "missed": [9.0, 5.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0],  # strongest: a, then b
    }
    cases, analyses = [], []
    for name, values in rows.items():
        case = made_up_case(f"gsm8k/{name}", 8, target=" 7")
        cases.append(case)
        analyses.append(made_up_analysis(case, values, str_tokens=texts))
    other = made_up_case("ifeval/1", 8)
    results = StudyResults(
        "made up", (*cases, other), (),
        (*analyses, made_up_analysis(other)), models=(ModelEntry("small", "base"),),
    )  # fmt: skip
    [row] = page_module().digits_table(results, strongest=2)["rows"]
    pairs = list(itertools.combinations(range(1, 8), 2))
    assert row["cases"] == 2
    assert (row["first"]["count"], row["few"]["count"]) == (0, 1)
    assert row["by_chance"] == pytest.approx(
        sum(bool({2, 5} & set(pair)) for pair in pairs) / len(pairs)
    )
    assert (row["same"]["count"], row["same"]["of"]) == (1, 2)
    assert row["same_by_chance"] == pytest.approx(sum(5 in pair for pair in pairs) / len(pairs))
