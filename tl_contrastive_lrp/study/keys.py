"""What determines each result of a study, as the causes that its key is the hash of.

Three kinds of results: "chunk", what became of some items of a benchmark; "analysis", what
attribution says of a case under a model and a rule set; "model", a model's hash and size, which
lets a report be written without loading any model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..rules.rule_sets import RULE_SETS
from .records import case_data

if TYPE_CHECKING:
    from .analyse import AnalysisSettings
    from .benchmarks.item import Item
    from .cases import Case
    from .models import ModelSpec
    from .settings import BenchmarkSettings
    from .store import Key, Store


def content_hash(value: Any) -> str:
    """Hash of any data; what JSON has no form for (dates) counts by its ``repr``."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str:
    """Hash of a file's bytes.

    Raises:
        FileNotFoundError: There is no such file.
    """
    with open(path, "rb") as file:
        hashed = hashlib.sha256()
        while part := file.read(1 << 20):
            hashed.update(part)
    return hashed.hexdigest()


def model_key(store: Store, spec: ModelSpec) -> Key:
    """The key of a model's hash and size."""
    return store.key("model", **dataclasses.asdict(spec))


def chunk_key(
    store: Store,
    benchmark: BenchmarkSettings,
    items: Sequence[Item],
    *,
    log: Mapping[str, Any],
    spec: ModelSpec,
    fingerprint: str,
    collect: Any,
    siblings: Sequence[tuple[str, str]],
    seed: int,
    checker: str,
    writer: str | None = None,
) -> Key:
    """The key of what became of some items.

    Args:
        store: The store.
        benchmark: Their benchmark.
        items: The items, with the rows that its checker reads.
        log: Of completions from a log, its hash and which of them; {} otherwise.
        spec: The model that completes them.
        fingerprint: Hash of its weights.
        collect: The ``CollectSettings``.
        siblings: Name and hash of each model that contrasts may come from.
        seed: The study's seed.
        checker: What the verdict depends on besides: the sandbox's and the judges' names.
        writer: Type of the copy that writes; None for the model itself.
    """
    return store.key(
        "chunk",
        benchmark=benchmark.name,
        options=content_hash(benchmark.options),
        items=content_hash([dataclasses.asdict(item) for item in items]),
        log=dict(log),
        model=dataclasses.asdict(spec),
        fingerprint=fingerprint,
        collect=dataclasses.asdict(collect),
        siblings=[list(pair) for pair in siblings],
        seed=seed,
        checker=checker,
        writer=writer,
    )


def analysis_key(
    store: Store,
    case: Case,
    *,
    model: str,
    fingerprint: str,
    rules: str,
    settings: AnalysisSettings,
) -> Key:
    """The key of what attribution says of a case.

    Args:
        store: The store.
        case: The case, every field of it.
        model: The model's name in the study, which the result records.
        fingerprint: Hash of its weights.
        rules: Name of the rule set; its rules count too.
        settings: What is computed; which other rule sets there are does not matter.
    """
    rest = dataclasses.asdict(settings)
    del rest["rules"]
    return store.key(
        "analysis",
        case=case.id,
        content=content_hash(case_data(case)),
        model=model,
        fingerprint=fingerprint,
        rules=rules,
        rule_set=repr(RULE_SETS[rules]),
        settings=rest,
    )
