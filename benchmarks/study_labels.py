"""How good the automatic label of a study is on the shipped failures of the demo model.

The decisive tokens of each failure are planted, so it can be counted how often they are among the
strongest, how often by chance, and what the label says of the same cases. Each failure is explained
under each rule set and has one graph under the first.

    python benchmarks/study_labels.py [--out report.html]

Prints the tables "Rule sets side by side" and "Against the planted truth" of the report, and its
"Outcomes and patterns"; about a minute on one core.
"""

from __future__ import annotations

import argparse

import torch

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.render.study.tables import StudyTable, shown
from tl_contrastive_lrp.study import (
    Case,
    CaseAnalysis,
    ModelEntry,
    Provenance,
    StudyResults,
    Verdict,
)
from tl_contrastive_lrp.study.report import report
from tl_contrastive_lrp.study.tables import all_labels, tables_of

RULES = ("attnlrp", "cplrp", "relp", "gim", "gradient")


def case_of(demo: clrp.DemoCase, ids: list[int]) -> Case:
    """A shipped failure as a case whose completion is the wrong token alone."""
    return Case(
        id=f"demo/{demo.id}",
        benchmark="demo",
        prompt=demo.prompt,
        prompt_ids=tuple(ids),
        completion=demo.target,
        completion_ids=(demo.target_id,),
        target_position=0,
        target_id=demo.target_id,
        target=demo.target,
        contrast_id=demo.contrast_id,
        contrast=demo.contrast,
        delta=demo.delta,
        verdict=Verdict(False, f"the right answer is {demo.answer!r}"),
        provenance=Provenance("demo"),
        reference=demo.answer,
        decisive_positions=demo.decisive_positions,
    )


def study_of(demos: tuple[clrp.DemoCase, ...]) -> StudyResults:
    """The failures, explained."""
    model = clrp.load_demo_model()
    cases, analyses = [], []
    for demo in demos:
        ids = model.to_tokens(demo.prompt, prepend_bos=False)[0]
        case = case_of(demo, ids.tolist())
        cases.append(case)
        objective = clrp.logit_diff(model, target=demo.target_id, contrast=demo.contrast_id)
        for rules in RULES:
            result = clrp.attribute(model, ids, objective, rules=rules)
            graph = None
            if rules == RULES[0]:
                full = clrp.attribution_graph(
                    model, ids, objective, rules=rules, node_threshold=0.01
                )
                graph = full.prune(mass=0.85).connected()
            analyses.append(
                CaseAnalysis(
                    case_id=case.id,
                    model="demo",
                    fingerprint="",
                    rules=rules,
                    delta=result.delta,
                    target_rank=1,
                    contrast_rank=2,
                    tokens=result.tokens,
                    str_tokens=tuple(result.str_tokens),
                    special=result.special,
                    segments=(),
                    graph=graph,
                )
            )
    size = sum(p.numel() for p in model.original_model.parameters())
    return StudyResults(
        "The demo's failures", tuple(cases), (), tuple(analyses), (),
        (ModelEntry("demo", "base", size),),
    )  # fmt: skip


def show(table: StudyTable) -> None:
    """Print a table as text."""
    print(f"\n{table.title}")
    rows = [[column.title for column in table.columns]]
    rows += [[f"{c.text} {c.small}".strip() for c in row] for row in shown(table)]
    for row in rows:
        print("  ".join(row))


def main(argv: list[str] | None = None) -> StudyResults:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="also write the whole report there")
    parser.add_argument("--limit", type=int, default=None, help="only so many failures")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = study_of(clrp.load_demo_cases()[: options.limit])
    tables = tables_of(results, all_labels(results))
    for name in ("rules", "truth", "table1"):
        show(tables[name])
    if options.out:
        report(results, options.out)
    return results


if __name__ == "__main__":
    main()
