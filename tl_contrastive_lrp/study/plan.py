"""How large a study is: cases, tokens, memory and hours, from a timed sample.

Some items of each benchmark are completed and made into cases, as the study would do it, and one
case is explained under every model and rule set, and its maps are checked if the study does that,
each twice, of which the second time counts. Time is
taken to be proportional to the number of items, and of cases. Where the study has begun, what is in
the store counts as done, and the number of cases among the collected items as their share.

Nothing of the sample is stored: its chunks are other chunks than the study's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine.fused import fused_blocks
from ..engine.memory import free_bytes, gib, plain_bytes
from ..inputs.tokens import model_device
from .analyse import AnalysisSettings, analyse, prepare
from .cases import Case, Dropped, Provenance, Verdict
from .checks import check_case
from .collect import complete
from .collect.place import Completion
from .keys import analysis_key
from .run import Chunk, StudyRun, cases_of, threads
from .settings import ModelSettings
from .store import Key


@dataclass(frozen=True)
class ModelPlan:
    """What one model costs.

    Attributes:
        name: The model.
        n_parameters: Its size.
        weight_bytes: Bytes of its weights.
        plain_bytes: Bytes that the longest prompt of the sample needs besides, without tiles.
        free_bytes: Bytes that are free with the model loaded.
        seconds: Seconds of one case, by rule set.
        analyses: Analyses that are still to be made, at the expected number of cases.
        check_seconds: Seconds of the check of one map, by rule set; {} where maps are not checked.
        checks: Checks that are still to be made.
    """

    name: str
    n_parameters: int
    weight_bytes: int
    plain_bytes: int
    free_bytes: int
    seconds: dict[str, float]
    analyses: int
    check_seconds: dict[str, float] = field(default_factory=dict)
    checks: int = 0

    @property
    def is_tiled(self) -> bool:
        """Whether the longest prompt runs in tiles, because it does not fit otherwise."""
        return self.plain_bytes > self.free_bytes

    @property
    def hours(self) -> float:
        """Hours of one worker for this model's analyses and checks."""
        each = sum(self.seconds.values()) / len(self.seconds)
        check = sum(self.check_seconds.values()) / max(len(self.check_seconds), 1)
        return (each * self.analyses + check * self.checks) / 3600

    @property
    def seconds_per_case(self) -> float:
        """Seconds of one case under every rule set, with its checks."""
        return sum(self.seconds.values()) + sum(self.check_seconds.values())


@dataclass(frozen=True)
class StudyPlan:
    """How large a study is.

    Attributes:
        items: Items of all benchmarks.
        collected: How many of them are in the store.
        cases: Expected number of cases.
        most_cases: The number if every item that is not collected became one.
        rate_from: What the expectation is from: "the store" or "the sample".
        tokens: Tokens of a prompt with the answer so far, in the sample: median and largest.
        seconds_per_item: Seconds to make a case of an item, or find that it is none.
        models: What each model costs.
    """

    items: int
    collected: int
    cases: int
    most_cases: int
    rate_from: str
    tokens: tuple[int, int]
    seconds_per_item: float
    models: tuple[ModelPlan, ...]

    @property
    def hours(self) -> float:
        """Hours of one worker for all that is missing; n workers take an n-th of that."""
        collecting = self.seconds_per_item * (self.items - self.collected) / 3600
        return collecting + sum(model.hours for model in self.models)

    @property
    def most_hours(self) -> float:
        """Hours that one worker needs if every item becomes a case."""
        a_case = sum(model.seconds_per_case for model in self.models)
        return self.hours + a_case * (self.most_cases - self.cases) / 3600

    def __str__(self) -> str:
        done = f", {self.collected:,} collected already" if self.collected else ""
        lines = [
            f"{self.items:,} items{done}; about {self.cases:,} cases (the share of {self.rate_from}"
            f"), at most {self.most_cases:,}.",
            f"Tokens of a case: {self.tokens[0]:,} in the median, {self.tokens[1]:,} at most "
            "(of the sample).",
            f"Collecting: {self.seconds_per_item:.2g} s an item, "
            f"{_duration(self.seconds_per_item * (self.items - self.collected))} in all.",
        ]
        for model in self.models:
            each, check = _each(model.seconds), _each(model.check_seconds)
            checks = f"; a check {check}; {model.checks:,} checks" if check else ""
            how = "in tiles: not all of it is free" if model.is_tiled else "in one pass"
            lines.append(
                f"{model.name}: {model.n_parameters / 1e6:,.2f}M parameters, "
                f"{gib(model.weight_bytes)}; the longest prompt needs {gib(model.plain_bytes)} "
                f"({how}); a case {each}; {model.analyses:,} analyses{checks}, "
                f"{_duration(model.hours * 3600)}."
            )
        lines.append(
            f"In all about {_duration(self.hours * 3600)} ({self.hours:.2g} hours) with one "
            f"worker, {_duration(self.most_hours * 3600)} if every item became a case; n workers "
            "take an n-th of that."
        )
        return "\n".join(lines)


def _each(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g} s" for name, value in seconds.items())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_study(run: StudyRun, n_items: int = 8) -> StudyPlan:
    """Time a sample of a study, and reckon what all of it takes.

    Args:
        run: The study.
        n_items: Items that are completed for the sample, over all benchmarks.

    Raises:
        ValueError: ``n_items`` is below 1; or as ``StudyRun.go``.
    """
    if n_items < 1:
        raise ValueError(f"items={n_items} must be 1 or more.")
    models: list[ModelPlan] = []
    with threads(run.settings.threads), _shown(run) as step:
        step(f"Opening {run.settings.base.name}")
        with run.opened(run.settings.base) as (base, base_hash):
            chunks = run.chunks(base_hash, base)
            items = sum(map(len, chunks))
            siblings, hashes = run.contrasting()
            found, seconds = _sample(run, base, base_hash, chunks, siblings, n_items, step)
            del siblings
            cases = [one for one in found if isinstance(one, Case)]
            probes = cases or [_made_up(run, base, chunks)]
            collected, known = _known(run, run.chunk_keys(chunks, base_hash, hashes))
            rate = len(cases) / len(found)
            if collected:
                rate = len(known) / collected
            expected = len(known) + math.ceil(rate * (items - collected))
            models.append(
                _model(run, run.settings.base, base, base_hash, probes, known, expected, step)
            )
        for one in run.settings.models[1:]:
            step(f"Opening {one.name}")
            with run.opened(one) as (model, model_hash):
                models.append(_model(run, one, model, model_hash, probes, known, expected, step))
    lengths = sorted(len(case.ids) for case in probes)
    return StudyPlan(
        items=items,
        collected=collected,
        cases=expected,
        most_cases=len(known) + items - collected,
        rate_from="the store" if collected else "the sample",
        tokens=(lengths[len(lengths) // 2], lengths[-1]),
        seconds_per_item=seconds / len(found),
        models=tuple(models),
    )


@contextmanager
def _shown(run: StudyRun) -> Iterator[Callable[[str], None]]:
    """A progress bar: each call of what is given ends a step and names the next."""
    timed = sum(
        len(run.rules_of(one)) + len(run.checked_rules_of(one)) for one in run.settings.models
    )
    sampled = len({one.name for one in run.settings.benchmarks})
    with run.bar("Planning", len(run.settings.models) + sampled + timed, "step") as bar:
        begun = 0

        def step(words: str) -> None:
            nonlocal begun
            bar.update(begun)
            bar.set_description(words)
            begun = 1

        yield step
        bar.update(begun)


def _sample(
    run: StudyRun,
    base: Any,
    base_hash: str,
    chunks: Sequence[Chunk],
    siblings: Mapping[str, Any],
    n_items: int,
    step: Callable[[str], None],
) -> tuple[list[Case | Dropped], float]:
    """What becomes of some items of each benchmark, and the seconds it took.

    They are the first of the middle chunk, so at most as many as are completed together.
    """
    by_benchmark: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_benchmark.setdefault(chunk.settings.name, []).append(chunk)
    found, seconds = list[Case | Dropped](), 0.0
    writer = run.writer()
    share = math.ceil(n_items / len(by_benchmark))
    for name, each in by_benchmark.items():
        part = each[len(each) // 2][:share]
        step(f"Timing the collecting of {name}")
        start = time.perf_counter()
        found += run.collected(base, base_hash, part, siblings, writer)
        seconds += time.perf_counter() - start
    return found, seconds


def _made_up(run: StudyRun, base: Any, chunks: Sequence[Chunk]) -> Case:
    """A case to time where the sample gave none: the end of a completion, its first two choices."""
    for chunk in chunks[:8]:
        usable = [one for one in chunk.logged or () if not isinstance(one, Dropped)]
        item = (usable[0].item if usable else None) if chunk.log else chunk.items[0]
        if item is None:
            continue
        (done,) = complete(base, [item], run.collecting_of(chunk.settings))
        if isinstance(done, Completion) and done.ids:
            ids = (*done.prompt_ids, *done.ids[:-1])
            device = model_device(base)
            with torch.no_grad():
                logits = base(torch.tensor(ids, device=device)[None])[0, -1]
            target = done.ids[-1]
            order = logits.argsort(descending=True)[:2].tolist()
            contrast = order[0] if order[0] != target else order[1]
            return Case(
                id="sample/0", benchmark="sample", prompt=done.prompt, prompt_ids=done.prompt_ids,
                completion=done.text, completion_ids=done.ids, target_position=len(done.ids) - 1,
                target_id=target, target=" ", contrast_id=contrast, contrast=" ", delta=1.0,
                verdict=Verdict(False, "a sample"), provenance=Provenance("sample"),
            )  # fmt: skip
    raise ValueError("None of the sample's items fits into the model's context; try more items.")


def _known(run: StudyRun, keys: Sequence[Key]) -> tuple[int, list[Case]]:
    """How many items are collected, and the cases among them."""
    found = [one for key in keys if run.store.has(key) for one in cases_of(run.store, key)]
    return len(found), [one for one in found if isinstance(one, Case)]


def _model(
    run: StudyRun,
    one: ModelSettings,
    model: Any,
    model_hash: str,
    probes: Sequence[Case],
    known: Sequence[Case],
    expected: int,
    step: Callable[[str], None],
) -> ModelPlan:
    settings: AnalysisSettings = run.analysing
    rules = run.rules_of(one)
    probe = sorted(probes, key=lambda case: len(case.ids))[len(probes) // 2]
    seconds = {}
    for name in rules:
        step(f"Timing an analysis, {one.name}, {name}")
        for _ in range(2):  # the first one audits the model
            start = time.perf_counter()
            analyse(
                model, probe, name, settings, name=one.name, fingerprint=model_hash,
                prepared=prepare(model, probe),
            )  # fmt: skip
            seconds[name] = time.perf_counter() - start
    done = sum(
        run.store.has(
            analysis_key(
                run.store, case, model=one.name, fingerprint=model_hash, rules=name,
                settings=settings.under(name), threads=run.settings.threads,
            )
        )
        for case in known
        for name in rules
    )  # fmt: skip
    checked, check_seconds = run.checked_rules_of(one), {}
    for name in checked:
        step(f"Timing a check, {one.name}, {name}")
        for _ in range(2):
            start = time.perf_counter()
            check_case(model, probe, name, run.checking)
            check_seconds[name] = time.perf_counter() - start
    done_checks = sum(
        run.store.has(run.check_key(case, one.name, model_hash, name))
        for case in known
        for name in checked
    )
    longest = max(len(case.ids) for case in probes)
    parameters = list(model.original_model.parameters())
    return ModelPlan(
        name=one.name,
        n_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        plain_bytes=plain_bytes(
            model, longest, graphs=int(settings.graph is not False), pruned=True,
            fused=fused_blocks(model, settings.attention, longest),
        ),
        free_bytes=free_bytes(model_device(model)),
        seconds=seconds,
        analyses=expected * len(rules) - done,
        check_seconds=check_seconds,
        checks=expected * len(checked) - done_checks,
    )  # fmt: skip
