"""What determines each result of a study, as the causes that its key is the hash of.

Four kinds of results: "chunk", what became of some items of a benchmark; "analysis", what
attribution says of a case under a model and a rule set; "check", what replacing the strongest
tokens of that map does; "model", a model's hash and size, which lets a report be written without
loading any model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..rules.rule_sets import RULE_SETS
from .records import collected_data

if TYPE_CHECKING:
    from .analyse import AnalysisSettings
    from .benchmarks.item import Item
    from .cases import Case
    from .checks import CheckSettings
    from .models import ModelSpec
    from .settings import BenchmarkSettings
    from .store import Key, Store


def content_hash(value: Any) -> str:
    """Hash of any data; what JSON has no form for (dates) counts by its ``repr``."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def failure_hash(case: Case) -> str:
    """Hash of what a person labels: the model's weights, the ids it read, and the two tokens."""
    what = [case.provenance.fingerprint, case.ids, case.target_id, case.contrast_id]
    return content_hash(what)


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


def function_data(function: Any) -> Any:
    """What tells one of a user's functions (a sandbox, a judge, a locator) from another.

    Two functions can have one name: two lambdas, or one whose lines were changed. So this is the
    name and the code, default values and enclosed values, as far as Python knows them; not what
    the code calls, nor a service that it asks.

    Args:
        function: A function, a ``functools.partial``, or an object that can be called.

    Returns:
        JSON data that is the same in each process.
    """
    if isinstance(function, functools.partial):
        given = (function.args, function.keywords)
        return ["partial", function_data(function.func), _shown(given)]
    inner = getattr(function, "__func__", function)
    if isinstance(inner, types.FunctionType):
        enclosed = [cell.cell_contents for cell in inner.__closure__ or () if _is_full(cell)]
        rest = [inner.__defaults__, inner.__kwdefaults__, getattr(function, "__self__", None)]
        name = f"{inner.__module__}.{inner.__qualname__}"
        return [name, _code(inner.__code__), _shown(enclosed), _shown(rest)]
    kind = type(function)
    call = getattr(kind, "__call__", None)  # noqa: B004
    if isinstance(call, types.FunctionType):
        return [f"{kind.__module__}.{kind.__qualname__}", function_data(call), _shown(function)]
    return [getattr(function, "__module__", ""), _shown(function)]


def _is_full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not bound yet
        return False


def _code(code: types.CodeType) -> list[Any]:
    """Code without the file and the lines that it is in."""
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), list(code.co_varnames), constants]


def _shown(value: Any) -> Any:
    """A value that a function holds; of an object without a text of its own, what it holds."""
    if isinstance(value, list | tuple):
        return [_shown(part) for part in value]
    if isinstance(value, Mapping):
        return [[repr(name), _shown(part)] for name, part in value.items()]
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        return function_data(value)
    own_text: Any = type(value).__repr__
    held = getattr(value, "__dict__", None) if own_text is object.__repr__ else None
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return text if not held else [text, [[n, repr(type(v)), _plain(v)] for n, v in held.items()]]


def _plain(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


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
    threads: int,
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
        threads: Threads of one process on a CPU, on which rounding depends.
        checker: Hash of the user's functions that it depends on: the sandbox, the judges, and
            locators that are not the package's; and of the libraries that its checker asks.
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
        threads=threads,
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
    threads: int,
) -> Key:
    """The key of what attribution says of a case.

    Args:
        store: The store.
        case: The case, every field of it.
        model: The model's name in the study, which the result records.
        fingerprint: Hash of its weights.
        rules: Name of the rule set; its rules count too.
        settings: What is computed; which other rule sets there are does not matter.
        threads: Threads of one process on a CPU, on which rounding depends.
    """
    rest = dataclasses.asdict(settings)
    del rest["rules"]
    return store.key(
        "analysis",
        case=case.id,
        content=content_hash(collected_data(case)),
        model=model,
        fingerprint=fingerprint,
        rules=rules,
        rule_set=repr(RULE_SETS[rules]),
        settings=rest,
        threads=threads,
    )


def check_key(
    store: Store,
    case: Case,
    *,
    model: str,
    fingerprint: str,
    rules: str,
    settings: CheckSettings,
    threads: int,
) -> Key:
    """The key of what replacing tokens says of a case's map.

    Args:
        store: The store.
        case: The case, every field of it.
        model: The model's name in the study.
        fingerprint: Hash of its weights.
        rules: Name of the rule set of the map; its rules count too.
        settings: What is replaced, and how the map is computed.
        threads: Threads of one process on a CPU, on which rounding depends.
    """
    return store.key(
        "check",
        case=case.id,
        content=content_hash(collected_data(case)),
        model=model,
        fingerprint=fingerprint,
        rules=rules,
        rule_set=repr(RULE_SETS[rules]),
        settings=dataclasses.asdict(settings),
        threads=threads,
    )
