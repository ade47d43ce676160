"""The page of the study, written from its numbers: no figure in it is typed by hand.

``write`` reads a finished store, makes the report without the benchmarks' texts, and puts into
``docs`` the numbers (``study_smollm2.json``), the figures (``study_smollm2_*.svg``) and the page
(``study_smollm2.md``). ``page`` makes the text of the page from the numbers alone, so a test can
hold the one against the other.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies.markdown import RULES, filled
from tl_contrastive_lrp.study.criteria import ordinary
from tl_contrastive_lrp.study.tables import portion

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
NAME = "study_smollm2"
RUN = "python studies/smollm2/run.py --data DATA --out OUT --processes 2"
PAGE = "python studies/smollm2/run.py --out OUT --page"
LEAST_CASES = 150
FIGURES = {
    "outcomes": "Outcomes, here and as published",
    "patterns": "Patterns, here and as published",
    "flips": "Share of cases flipped by the k most relevant tokens",
    "segments": "Mean normalised segment sums",
}
# What is kept of a case: no text of a benchmark.
CASE = ("id", "benchmark", "delta", "tokens", "locator", "contrast_source")
DIFFERENCES = (
    "The model is SmolLM2-135M-Instruct, as a four-bit file dequantised, in place of Qwen3-0.6B",
    "There are no judges: the first wrong token is found by rules, the violated constraint (IFEval,"
    " GSM8K), the first token that leaves the published answer (MATH), or recovery by another token"
    " (HumanEval)",
    "GSM8K takes the place of GAIA2, and HumanEval's own tests that of EvalPlus",
    'Answers are short: GSM8K\'s begin with "####" and MATH\'s with "\\boxed{", which are given, '
    "so the model does not reason first; IFEval's are judged as cut off after 48 tokens, where a"
    " repaired answer counts as right while it still can become so; HumanEval's are cut off after"
    " 56",
    "Prompts are short, by a limit for each benchmark",
    "Labels are automatic, by stated criteria; nobody has confirmed them",
)


def write(out: Path) -> None:
    """Write report, numbers, figures and page.

    Args:
        out: The work folder, with the store.

    Raises:
        SystemExit: There are too few cases, or analyses are missing.
    """
    from tl_contrastive_lrp.study import Study
    from tl_contrastive_lrp.study.report import report
    from tl_contrastive_lrp.study.settings import load_settings

    os.chdir(out)
    study = Study(load_settings(HERE / "study.yaml"), Path(), sandbox=_sandbox())
    results = study.results()
    complete = len(results.analyses) == len(results.cases) * len(RULES)
    if len(results.cases) < LEAST_CASES or not complete:
        raise SystemExit(
            f"There are {len(results.cases)} cases and {len(results.analyses)} analyses of them; "
            f"a page needs {LEAST_CASES} cases, each with {len(RULES)} analyses."
        )
    facts = {**results.facts, "command": RUN, "differences": DIFFERENCES}
    results = dataclasses.replace(results, facts=facts)
    numbers = compact(report(results, "report.html", texts=False), _seconds(study, results))
    numbers["tables"]["digits"] = digits_table(results)
    DOCS.joinpath(f"{NAME}.json").write_text(
        json.dumps(numbers, ensure_ascii=True, allow_nan=False, indent=None) + "\n", "utf-8"
    )
    for name in FIGURES:
        svg = Path("report_files", f"{name}.svg").read_text("utf-8")
        DOCS.joinpath(f"{NAME}_{name}.svg").write_text(svg, "utf-8")
    DOCS.joinpath(f"{NAME}.md").write_text(page(numbers), "utf-8")


def _sandbox() -> Any:
    """The sandbox that the run was made with: its name is part of what results are found by."""
    from tools.sandbox import sandbox

    return sandbox


def _seconds(study: Any, results: Any) -> dict[str, float]:
    """Wall time by part, over all processes, of this study's results alone."""
    spent: Counter[str] = Counter()
    for analysis in results.analyses:
        spent.update(analysis.seconds)
    run, base = study._run(), results.analyses[0].fingerprint
    for key in run.chunk_keys(run.chunks(base), base, ()):
        spent["collect"] += study.store.get(key).notes["seconds"]
    return dict(spent)


def digits_table(results: Any, benchmark: str = "gsm8k", strongest: int = 5) -> dict[str, Any]:
    """Whether relevance of a wrong digit lies on the digits of the question.

    Counted are ordinary tokens, neither special nor the first. By chance is the mean probability
    that as many tokens, drawn at random from a case's, hold a digit.

    Args:
        results: The study.
        benchmark: The benchmark whose answers are digits.
        strongest: How many tokens of the largest |relevance| a reader looks at.
    """
    rows = []
    for rules in results.rules:
        first, few, same, by_chance, same_by_chance = [], [], [], [], []
        for case_id, analysis in results.of_model(results.base.name, rules).items():
            case = results.by_id[case_id]
            if case.benchmark != benchmark:
                continue
            counted = ordinary(analysis).nonzero().flatten().tolist()
            texts = [analysis.str_tokens[i].strip() for i in counted]
            sizes = analysis.tokens.double().abs()[counted].tolist()
            order = sorted(range(len(counted)), key=lambda i: (-sizes[i], i))[:strongest]
            digits = [text.isdecimal() for text in texts]
            first.append(digits[order[0]])
            few.append(any(digits[i] for i in order))
            by_chance.append(_hit(len(texts), sum(digits), len(order)))
            if case.target.strip().isdecimal() and case.target.strip() in texts:
                copies = [text == case.target.strip() for text in texts]
                same.append(any(copies[i] for i in order))
                same_by_chance.append(_hit(len(texts), sum(copies), len(order)))
        rows.append(
            {
                "rules": rules,
                "cases": len(few),
                "first": portion(sum(first), len(first)),
                "few": portion(sum(few), len(few)),
                "by_chance": sum(by_chance) / max(len(by_chance), 1),
                "same": portion(sum(same), len(same)),
                "same_by_chance": sum(same_by_chance) / max(len(same_by_chance), 1),
            }
        )
    titles = {
        "rules": ("rule set", "text"),
        "cases": ("cases", "count"),
        "first": ("the strongest token is a digit", "share"),
        "few": (f"a digit is among the {strongest} strongest", "share"),
        "by_chance": ("by chance", "percent"),
        "same": ("the written digit is in the question, and among them", "share"),
        "same_by_chance": ("by chance", "percent"),
    }
    columns = [{"key": k, "title": title, "kind": kind} for k, (title, kind) in titles.items()]
    return {"title": "Digits of the question", "columns": columns, "rows": rows, "note": ""}


def _hit(n: int, wanted: int, drawn: int) -> float:
    """The probability that tokens drawn without replacement hold a wanted one."""
    return 1 - math.comb(n - wanted, drawn) / math.comb(n, drawn)


def compact(numbers: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of a report without any text of a benchmark.

    Args:
        numbers: What ``report`` gives.
        seconds: Wall time by part, over all processes.
    """
    cases = []
    for case in numbers["cases"]:
        [label] = case["labels"] or [{"outcome": None, "pattern": None}]
        cases.append([*(case[name] for name in CASE), label["outcome"], label["pattern"]])
    return {
        "version": numbers["version"],
        "name": numbers["name"],
        "facts": numbers["facts"],
        "tables": numbers["tables"],
        "figures": {id: figure["data"] for id, figure in numbers["figures"].items()},
        "cases": {"columns": [*CASE, "outcome", "pattern"], "rows": cases},
        "seconds": dict(seconds),
    }


def page(numbers: Mapping[str, Any]) -> str:
    """The text of the page.

    Args:
        numbers: What ``compact`` gives.
    """
    text = HERE.joinpath("page.md").read_text("utf-8")
    facts = numbers["facts"]
    hours = {name: spent / 3600 for name, spent in numbers["seconds"].items()}
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    own = {
        "differences": " ".join(f"{one}." for one in DIFFERENCES),
        "cases": str(len(numbers["cases"]["rows"])),
        "counts": _counts(numbers),
        "run": RUN,
        "page": PAGE,
        "date": facts["date"],
        "versions": versions,
        "hours collecting": f"{hours['collect']:.1f}",
        "hours analysing": f"{sum(hours.values()) - hours['collect']:.1f}",
        "limits": _limits(facts["settings"]),
        **{
            f"figure {name}": f"![{words}]({NAME}_{name}.svg)" for name, words in FIGURES.items()
        },
    }  # fmt: skip
    return filled(text, numbers, own)


def _counts(numbers: Mapping[str, Any]) -> str:
    """How many cases are of which benchmark: most are of one, and a reader must know."""
    rows = numbers["tables"]["clean"]["rows"]
    return ", ".join(
        f"{r['kept']['count']} {r['benchmark']}" for r in rows if r["benchmark"] != "all"
    )


def _limits(settings: Mapping[str, Any]) -> str:
    """Which items were taken, in words."""
    words = []
    for one in settings["benchmarks"]:
        first = f"of the first {one['limit']} items" if one["limit"] else "of all items"
        most = one["collect"]["max_prompt_tokens"]
        words.append(f"{one['name']}, {first} those of at most {most} tokens")
    return "; ".join(words)
