"""Studies made up for the tests: planted numbers, hostile texts, and the demo's failures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

import tl_contrastive_lrp as clrp
from support.browser import HOSTILE
from tl_contrastive_lrp.attribution.check import MapCheck
from tl_contrastive_lrp.study.analysis import CaseAnalysis, SegmentSum
from tl_contrastive_lrp.study.cases import Case, Dropped, Provenance, Verdict
from tl_contrastive_lrp.study.labels import OUTCOMES, PATTERNS, Label
from tl_contrastive_lrp.study.results import ModelEntry, StudyResults


def made_up_case(id: str = "ifeval/0", n: int = 30, **given: Any) -> Case:
    """A case of ``n`` tokens, four of them written before the target."""
    values: dict[str, Any] = {
        "id": id,
        "benchmark": id.partition("/")[0],
        "prompt": "a prompt",
        "prompt_ids": tuple(range(n - 4)),
        "completion": "an answer",
        "completion_ids": tuple(range(100, 108)),
        "target_position": 4,
        "target_id": 104,
        "target": " wrong",
        "contrast_id": 205,
        "contrast": " right",
        "delta": 2.5,
        "verdict": Verdict(False, "the checker says no"),
        "provenance": Provenance("small"),
        "segments": {"instruction": ((3, 8),)},
    }
    return Case(**{**values, **given})


def made_up_analysis(
    case: Case, tokens: Any = None, *, model: str = "small", rules: str = "attnlrp", **given: Any
) -> CaseAnalysis:
    """An analysis whose segments are summed here, token by token."""
    n = len(case.ids)
    values = torch.as_tensor(tokens if tokens is not None else [0.1] * n, dtype=torch.float32)
    special = torch.zeros(n, dtype=torch.bool)
    special[0] = True
    largest = (
        max((abs(float(v)) for v, s in zip(values, special, strict=True) if not s), default=0)
        or 1.0
    )
    where = {name: [i for a, b in spans for i in range(a, b)] for name, spans in
             case.segments.items()}  # fmt: skip
    where["answer"] = list(range(len(case.prompt_ids), n))
    taken = {i for at in where.values() for i in at}
    where["query"] = [i for i in range(1, len(case.prompt_ids)) if i not in taken]
    segments = tuple(
        SegmentSum(name, len(at), total := sum(float(values[i]) for i in at), total / largest)
        for name, at in where.items()
    )
    fields: dict[str, Any] = {
        "case_id": case.id,
        "model": model,
        "fingerprint": "0" * 64,
        "rules": rules,
        "delta": case.delta,
        "target_rank": 1,
        "contrast_rank": 2,
        "tokens": values,
        "str_tokens": tuple(f" t{i}" for i in range(n)),
        "special": special,
        "segments": segments,
    }
    return CaseAnalysis(**{**fields, **given})


def made_up_check(case: Case, captured: float | None, rules: str = "attnlrp") -> MapCheck:
    """A check with this share of the effect captured; None for no effect at all.

    The map names token 1 alone; token 3 has the largest effect, +1, and token 2 was drawn.
    """
    n = len(case.ids)
    relevance, predicted = torch.zeros(2, n, dtype=torch.float64)
    relevance[1] = 0.5
    measured = torch.zeros(2, dtype=torch.float64)
    if captured is not None:
        predicted[1], predicted[3] = -1.5 * captured, 1.0
        measured[0], measured[1] = -captured, 0.25
    return MapCheck(
        relevance=relevance,
        predicted=predicted,
        measured=measured,
        measured_at=torch.tensor([1, 2]),
        strongest=torch.tensor([1]),
        drawn=torch.tensor([2]),
        ordinary=torch.arange(n) > 0,
        starts=torch.arange(n),
        stops=torch.arange(n) + 1,
        names=tuple(f" t{i}" for i in range(n)),
        unit="token",
        k=1,
        n_random=1,
        seed=0,
        window=2,
        replaced_with="the zero embedding",
        delta=case.delta,
        objective="made up",
        target=case.target,
        contrast=case.contrast,
        rules=rules,
        model_name="small",
        share_to_tokens=0.5,
        sink_share=0.1,
        saturation=None,
        forwards=9.5,
        seconds=0.25,
    )


# Of the cases in turn: supported, weak, contradicted, weak for want of any effect, supported.
# The last is where "supported" begins.
CAPTURED = (0.9, 0.25, -0.5, None, 0.6)


def made_up_checks(study: StudyResults) -> dict[tuple[str, str], MapCheck]:
    """Under AttnLRP a check of each case, under gradient of every other one."""
    shares = [CAPTURED[i % len(CAPTURED)] for i in range(len(study.cases))]
    found = {
        (case.id, "attnlrp"): made_up_check(case, share)
        for case, share in zip(study.cases, shares, strict=True)
    }
    for case in study.cases[::2]:
        found[case.id, "gradient"] = made_up_check(case, -1.0, "gradient")
    return found


def made_up_study(
    n: int = 12, seed: int = 0, *, hostile: bool = False, people: Sequence[str] = ("Ada", "Bo")
) -> StudyResults:
    """Cases of two benchmarks under a base, two siblings, three checkpoints and two rule sets."""
    g = torch.Generator().manual_seed(seed)
    texts = HOSTILE if hostile else ()

    def evil(i: int) -> str:
        return HOSTILE[i % len(HOSTILE)] if hostile else ""

    cases, analyses, labels = [], [], []
    models = [
        ModelEntry("small", "base", 300_000),
        ModelEntry("large", "sibling", 3_000_000),
        ModelEntry("larger" + evil(1), "sibling", 9_000_000),
        *(ModelEntry(f"step {s}", "checkpoint", 300_000, s) for s in (100, 200, 400)),
    ]
    for i in range(n):
        length = 26 + i
        case = made_up_case(
            f"{('ifeval', 'math')[i % 2]}/{i}{evil(i)}",
            length,
            benchmark=("ifeval", "math")[i % 2],
            target=evil(i) or " wrong",
            contrast=evil(i + 1) or " right",
            delta=float(1.1 + 4 * torch.rand(1, generator=g)),
            decisive_positions=(4, 9) if i % 2 else None,
            verdict=Verdict(False, evil(i + 2) or "wrong"),
            reference=evil(i + 3) or "7",
        )
        cases.append(case)
        for model in models:
            for rules in ("attnlrp", "gradient") if model.role == "base" else ("attnlrp",):
                values = torch.randn(length, generator=g) * torch.rand(length, generator=g) ** 4
                delta = case.delta if model.role == "base" else float(
                    3 * torch.randn(1, generator=g)
                )  # fmt: skip
                flips = int(torch.randint(1, 9, (1,), generator=g)) if model.role == "base" else 0
                analyses.append(
                    made_up_analysis(
                        case,
                        values,
                        model=model.name,
                        rules=rules,
                        delta=delta,
                        str_tokens=tuple(
                            texts[k % len(texts)] if texts else f" t{k}" for k in range(length)
                        ),
                        tokens_to_flip=flips if 0 < flips < 8 else None,
                        flip_limit=8 if flips else 0,
                        groups={
                            "with target": float(values[3]),
                            "without target": float(values[5]),
                        },
                        metrics={"edges": float(20 + i), "lookback": float(values[7])}
                        if rules == "attnlrp"
                        else {},
                        target_rank=1 if model.role == "base" else 3,
                    )
                )
        for k, person in enumerate(people):
            outcome = list(OUTCOMES)[(i * (k + 1)) % 3]
            labels.append(
                Label(case.id, person + evil(2), outcome, [*PATTERNS, None][i % 4], evil(5))
            )
    dropped = [
        Dropped(f"ifeval/d{i}", "ifeval", reason, evil(i))
        for i, reason in enumerate(("passes", "passes", "no contrast", "small delta"))
    ]
    return StudyResults(
        "made up" + evil(1),
        tuple(cases),
        tuple(dropped),
        tuple(analyses),
        tuple(labels),
        tuple(models),
        {
            "date": "2026-01-02",
            "command": "clrp study report study.yaml" + evil(2),
            "versions": {"torch": "2.6" + evil(3)},
            "differences": ["Another model" + evil(1)],
        },
    )


@lru_cache(maxsize=2)
def demo_study(limit: int = 60, graphs: bool = True) -> StudyResults:
    """The demo's failures under two rule sets, with the graph of the first one."""
    model = clrp.load_demo_model()
    cases, analyses = [], []
    for demo in clrp.load_demo_cases()[:limit]:
        ids = model.to_tokens(demo.prompt, prepend_bos=False)[0]
        case = made_up_case(
            f"demo/{demo.id}",
            benchmark="demo",
            prompt=demo.prompt,
            prompt_ids=tuple(ids.tolist()),
            completion=demo.target,
            completion_ids=(demo.target_id,),
            target_position=0,
            target_id=demo.target_id,
            target=demo.target,
            contrast_id=demo.contrast_id,
            contrast=demo.contrast,
            delta=demo.delta,
            segments={},
            decisive_positions=demo.decisive_positions,
        )
        cases.append(case)
        tokens = {"target": demo.target, "contrast": demo.contrast}
        for rules in ("attnlrp", "gradient"):
            found = clrp.attribute(model, ids, rules=rules, **tokens)
            graph = None
            if graphs and rules == "attnlrp":
                full = clrp.attribution_graph(model, ids, clrp.logit_diff(model, **tokens))
                graph = full.prune(mass=0.85).connected()
            analyses.append(
                made_up_analysis(
                    case,
                    found.tokens,
                    model="demo",
                    rules=rules,
                    delta=found.delta,
                    str_tokens=tuple(found.str_tokens),
                    special=found.special,
                    graph=graph,
                )
            )
    return StudyResults(
        "demo", tuple(cases), (), tuple(analyses), (), (ModelEntry("demo", "base", 850_000),)
    )
