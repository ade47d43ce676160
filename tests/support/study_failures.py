"""Cases for tests of the study, made of the demo's recorded failures."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.study.cases import Case, Provenance, Verdict


@cache
def demo_model() -> Any:
    return clrp.load_demo_model(device="cpu")


def case_of(demo: Any, *, model: Any = None, **changes: Any) -> Case:
    """A demo case as a case of a study; the answer written so far is its completion."""
    tokenizer = (model or demo_model()).tokenizer
    ids = tokenizer(demo.prompt, add_special_tokens=False)["input_ids"]
    assert len(ids) == demo.n_tokens
    prefix = demo.prompt[: len(demo.prompt) - len(demo.answer_prefix)]
    begins = len(tokenizer(prefix, add_special_tokens=False)["input_ids"])
    case = Case(
        id=f"demo/{demo.id}",
        benchmark="demo",
        prompt=prefix,
        prompt_ids=tuple(ids[:begins]),
        completion=demo.answer_prefix + demo.target,
        completion_ids=(*ids[begins:], demo.target_id),
        target_position=len(ids) - begins,
        target_id=demo.target_id,
        target=demo.target,
        contrast_id=demo.contrast_id,
        contrast=demo.contrast,
        delta=demo.delta,
        verdict=Verdict(False, "wrong"),
        provenance=Provenance("demo", fingerprint="f", decoding={"max_new_tokens": 3}),
        messages=({"role": "user", "content": demo.user},),
        reference=demo.answer,
        decisive_positions=demo.decisive_positions,
    )
    return dataclasses.replace(case, **changes)


def some_cases(n: int) -> list[Case]:
    return [case_of(demo) for demo in clrp.load_demo_cases()[:: max(1, 40 // n)][:n]]


def made_up(ids: list[int], target: int, contrast: int, text: str = "t", **changes: Any) -> Case:
    """A case of ids alone, for models without a tokenizer of words."""
    base = Case(
        id="made/up", benchmark="made", prompt="", prompt_ids=tuple(ids[:-2]), completion="",
        completion_ids=(*ids[-2:], target), target_position=2, target_id=target, target=text,
        contrast_id=contrast, contrast="c", delta=1.0, verdict=Verdict(False),
        provenance=Provenance("made"),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def same_analysis(one: Any, other: Any) -> bool:
    """Whether two analyses are equal, bit for bit, wall times aside."""
    from tl_contrastive_lrp.study.records import analysis_data
    from tl_contrastive_lrp.study.store import digest_of

    return digest_of(*analysis_data(one)) == digest_of(*analysis_data(other))
