"""Running a study: collect the cases, then analyse them, model by model.

The work is a list of units that depends on nothing but the settings, the items and the models:
first chunks of ``collect.batch_size`` items, then, for each model, one unit a case and rule set;
where maps are checked, one more for each of the base's.
``workers`` says who does which. Every unit is one atomic write to the store, so a process that is
killed loses the unit it was at, and running again continues; what is stored is verified before it
counts as done, and a damaged file is computed again.

Nothing a unit gives depends on the worker: it is computed from its own case or chunk, on a fixed
number of threads, and keyed by everything that determines it (``keys``).

The file is long because the phases share one run: its settings, keys, workers and models.

One model is in memory at a time, except that siblings join the base while contrasts are taken from
them (``contrast: [..., sibling]``).
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm.auto import tqdm

from ..attribution.check import MapCheck
from ..errors import (
    FileFormatError,
    ModelStateError,
    NonFiniteError,
    NotRunError,
    PromptError,
    SettingsError,
    TokenError,
    is_out_of_memory,
)
from ..inputs.tokens import model_device
from .analyse import AnalysisSettings, analyse, prepare
from .benchmarks import checked_with, open_benchmark
from .benchmarks.item import Benchmark, Item
from .cases import Case, Dropped
from .checks import CheckSettings, check_case
from .collect import LOCATORS, CollectSettings, collect, collect_logged
from .collect.locate import judge
from .keys import (
    analysis_key,
    check_key,
    chunk_key,
    content_hash,
    file_hash,
    function_data,
    model_key,
)
from .logs import LoggedCompletion, completions_from_log
from .models import check_same_tokens, fingerprint, open_model
from .records import (
    analysis_data,
    analysis_from,
    check_cost,
    check_data,
    check_from,
    collected_data,
    collected_from,
)
from .settings import BenchmarkSettings, ModelSettings, StudySettings
from .store import Key, Store
from .workers import Share, Worker

_OF_ONE_CASE = (NonFiniteError, PromptError, TokenError)


@dataclass(frozen=True)
class Failed:
    """A unit that could not be computed.

    Attributes:
        case_id: Its case.
        model: Name of the model.
        rules: Name of the rule set.
        why: The error's message.
        kind: "analysis" or "check".
    """

    case_id: str
    model: str
    rules: str
    why: str
    kind: str = "analysis"


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        cases: Number of cases of the study.
        dropped: Number of completions that became none.
        computed: Units that this process computed.
        found: Units that were in the store, or that other workers computed.
        failed: Units that could not be computed.
        damaged: Files that were computed again because they could not be read.
        seconds: Wall time.
    """

    cases: int
    dropped: int
    computed: int
    found: int
    failed: tuple[Failed, ...]
    damaged: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Chunk:
    """Some items of a benchmark, the unit of work of collecting.

    Attributes:
        settings: The benchmark's part of the settings.
        benchmark: The benchmark.
        items: The items; () of a log.
        logged: Of a log, its completions; None where they are not needed.
        log: Of a log, what says which of its completions these are; {} otherwise.
    """

    settings: BenchmarkSettings
    benchmark: Benchmark
    items: tuple[Item, ...]
    logged: tuple[LoggedCompletion | Dropped, ...] | None = None
    log: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.log["end"] - self.log["start"]) if self.log else len(self.items)

    def __getitem__(self, part: slice) -> Chunk:
        """Some of the same items."""
        logged = None if self.logged is None else self.logged[part]
        return replace(self, items=self.items[part], logged=logged)


@dataclass(eq=False)
class StudyRun:
    """One process's part in running a study.

    Attributes:
        settings: The study's.
        store: Its store.
        share: Which part of the work this process does first.
        sandbox: Runs code, for benchmarks whose checker needs it.
        judges: For the locator "judge".
        progress: Whether to show progress bars on stderr.
    """

    settings: StudySettings
    store: Store
    share: Share = field(default_factory=Share)
    sandbox: Callable[..., bool] | None = None
    judges: Sequence[Any] = ()
    progress: bool = True
    _verified: set[str] = field(default_factory=set)
    _damaged: list[str] = field(default_factory=list)
    _failed: list[Failed] = field(default_factory=list)
    _computed: int = 0
    _units: int = 0

    def collecting_of(self, one: BenchmarkSettings) -> CollectSettings:
        """How the failures of one benchmark become cases.

        Args:
            one: The benchmark's part of the settings.

        Raises:
            SettingsError: A value is out of range, or a name is unknown.
        """
        try:
            return CollectSettings(**one.collecting(self.settings.collect).given())
        except ValueError as error:
            if isinstance(error, SettingsError):
                raise
            where = f"the benchmark {one.name!r}, collect" if one.collect else "collect"
            raise SettingsError(where, str(error)) from error

    @cached_property
    def takes_siblings(self) -> bool:
        """Whether contrasts of any benchmark may come from siblings."""
        return any(
            "sibling" in self.collecting_of(one).contrast for one in self.settings.benchmarks
        )

    @cached_property
    def analysing(self) -> AnalysisSettings:
        """What is computed of each case."""
        given = self.settings.analyse
        return AnalysisSettings(
            **{one.name: getattr(given, one.name) for one in fields(AnalysisSettings)}
        )

    @cached_property
    def checking(self) -> CheckSettings:
        """How maps are checked, where they are."""
        given = self.settings.analyse
        return CheckSettings(
            k=given.check_tokens,
            n_random=given.check_tokens,
            seed=self.settings.seed,
            memory=given.memory,
            attention=given.attention,
        )

    def chunks(self, base_hash: str, base: Any = None) -> tuple[Chunk, ...]:
        """The chunks of all benchmarks, in the order of the settings.

        Args:
            base_hash: Hash of the base model.
            base: The base model, which rebuilds the token ids of logs; without it, what a run has
                stored says how many completions a log has.

        Raises:
            SettingsError: A benchmark or an option of one is unknown.
            NotRunError: There is a log that no run has read, and no model.
            OSError, FileFormatError: Rows or a log cannot be read.
        """
        found = list[Chunk]()
        for place, one in enumerate(self.settings.benchmarks):
            size = self.collecting_of(one).batch_size
            benchmark = self._benchmark(place, one)
            if one.log is not None:
                found += self._chunks_of_log(one, benchmark, base_hash, base, size)
                continue
            items = tuple(benchmark.items())
            found += [
                Chunk(one, benchmark, items[start : start + size])
                for start in range(0, len(items), size)
            ]
        return tuple(found)

    def _benchmark(self, place: int, one: BenchmarkSettings) -> Benchmark:
        # The first items of the benchmark need not be the first of its log.
        limit = one.limit if one.log is None else None
        try:
            return open_benchmark(one.name, one.path, limit, **one.options)
        except FileFormatError:
            raise
        except (ValueError, TypeError) as error:
            raise SettingsError(f"benchmarks[{place}]", str(error)) from error

    def _chunks_of_log(
        self, one: BenchmarkSettings, benchmark: Benchmark, base_hash: str, base: Any, size: int
    ) -> list[Chunk]:
        """The completions of a log, in its order; how many there are is stored."""
        assert one.log is not None
        causes = {
            "log": file_hash(one.log),
            "rows": None if one.path is None else file_hash(one.path),
            "benchmark": one.name,
            "options": content_hash(one.options),
            "limit": one.limit,
        }
        model = {"model": asdict(self.settings.base.spec), "fingerprint": base_hash}
        key, logged = self.store.key("log", **causes, **model), None
        if base is not None:
            read = completions_from_log(base, one.log, benchmark=benchmark)
            logged = tuple(read[: one.limit])
            self.store.put(key, {"n": len(logged)})
        try:
            n = int(self.store.get(key).record["n"])
        except KeyError:
            raise NotRunError(
                f"The log {one.log} has not been read yet; run the study first (clrp study run)."
            ) from None
        return [
            Chunk(
                one, benchmark, (), None if logged is None else logged[start : start + size],
                {**causes, "start": start, "end": min(start + size, n)},
            )
            for start in range(0, n, size)
        ]  # fmt: skip

    def collected(
        self,
        base: Any,
        base_hash: str,
        chunk: Chunk,
        siblings: Mapping[str, Any],
        writer: Any = None,
    ) -> list[Case | Dropped]:
        """What becomes of a chunk's items, or of a log's completions.

        Args:
            base: The base model.
            base_hash: Its hash.
            chunk: The chunk.
            siblings: Models that contrasts may come from, by name; without any, no contrast does.
            writer: The copy of the base that writes; None for the base.
        """
        settings, spec = self.collecting_of(chunk.settings), self.settings.base.spec
        if not siblings:
            own = tuple(name for name in settings.contrast if name != "sibling")
            settings = replace(settings, contrast=own)
        named: dict[str, Any] = {
            "spec": spec, "siblings": siblings, "judges": self.judges, "sandbox": self.sandbox,
            "model_fingerprint": base_hash,
        }  # fmt: skip
        if chunk.logged is None:
            return collect(
                base, chunk.benchmark, chunk.items, settings, writer=writer, **named
            )  # fmt: skip
        usable = [one for one in chunk.logged if not isinstance(one, Dropped)]
        items = [one.item for one in usable]
        found = iter(collect_logged(base, chunk.benchmark, items, usable, settings, **named))
        return [one if isinstance(one, Dropped) else next(found) for one in chunk.logged]

    def rules_of(self, model: ModelSettings) -> tuple[str, ...]:
        """The rule sets under which a model is analysed."""
        rules = self.analysing.rules
        return rules if model.name == self.settings.base.name else rules[:1]

    def checked_rules_of(self, model: ModelSettings) -> tuple[str, ...]:
        """The rule sets under which a model's maps are checked; none but the base's are."""
        check = self.settings.analyse.check
        if check is False or model.name != self.settings.base.name:
            return ()
        return self.rules_of(model)[:1] if check == "first" else self.rules_of(model)

    # ------------------------------------------------------------ running

    def go(self, analyse: bool = True) -> RunSummary:
        """Run what is missing.

        Args:
            analyse: Whether the cases are analysed; else they are collected alone.

        Returns:
            What was done.

        Raises:
            KeyboardInterrupt: Ctrl-C; what is finished is in the store.
            UncoveredComponentError, ModelStateError: A model cannot be explained.
            TokenizerMismatchError: Two models have different tokens.
            OSError, FileFormatError, ValueError: A model or benchmark cannot be opened.
        """
        began = time.perf_counter()
        self.store.sweep()
        worker = Worker(self.store.folder, self.share)
        with worker.alive(), threads(self.settings.threads):
            with self.opened(self.settings.base) as (base, base_hash):
                chunks = self.chunks(base_hash, base)
                tokens = SimpleNamespace(cfg=base.cfg, tokenizer=base.tokenizer)
                cases = self._collect(worker, base, base_hash, chunks)
                if analyse:
                    self._analyse(worker, self.settings.base, base, base_hash, cases)
                    self._check(worker, self.settings.base, base, base_hash, cases)
            del base
            for one in self.settings.models[1:] if analyse else ():
                with self.opened(one) as (model, model_hash):
                    check_same_tokens(tokens, model)
                    self._analyse(worker, one, model, model_hash, cases)
                del model
        dropped = sum(map(len, chunks)) - len(cases)
        return RunSummary(
            cases=len(cases),
            dropped=dropped,
            computed=self._computed,
            found=self._units - self._computed - len(self._failed),
            failed=tuple(self._failed),
            damaged=tuple(self._damaged),
            seconds=time.perf_counter() - began,
        )

    @contextmanager
    def opened(self, one: ModelSettings) -> Iterator[tuple[Any, str]]:
        """A model of the study and its hash, which is stored with its size; freed afterwards."""
        model: Any = open_model(one.spec, self._device(one))
        try:
            found = fingerprint(model)
            n_parameters = sum(p.numel() for p in model.original_model.parameters())
            record = {"fingerprint": found, "n_parameters": n_parameters}
            self.store.put(model_key(self.store, one.spec), record)
            yield model, found
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def writer(self) -> Any:
        """The copy of the base that writes, in the type that the settings ask for."""
        dtype, base = self.settings.collect.writer_dtype, self.settings.base
        if dtype is None or dtype == base.dtype:
            return None
        return open_model(replace(base.spec, dtype=dtype), self._device(base))

    def _device(self, one: ModelSettings) -> str | None:
        """The device of a model of this worker; None leaves it to TransformerLens."""
        if one.device_map is None and torch.cuda.is_available():
            return f"cuda:{self.share.device % torch.cuda.device_count()}"
        return None

    def contrasting(self) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """The siblings that contrasts may come from, together in memory, and their hashes."""
        models: dict[str, Any] = {}
        hashes: list[tuple[str, str]] = []
        for one in self.settings.siblings if self.takes_siblings else ():
            with self.opened(one) as (model, model_hash):
                models[one.name] = model
                hashes.append((one.name, model_hash))
        return models, hashes

    def _collect(
        self, worker: Worker, base: Any, base_hash: str, chunks: Sequence[Chunk]
    ) -> list[Case]:
        siblings, hashes = self.contrasting()
        keys = self.chunk_keys(chunks, base_hash, hashes)

        writer: list[Any] = []

        def compute(i: int) -> bool:
            start = time.perf_counter()
            if not writer:  # only a process that collects opens it
                writer.append(self.writer())
            found = self.collected(base, base_hash, chunks[i], siblings, writer[0])
            self.store.put(
                keys[i],
                {"cases": [collected_data(one) for one in found]},
                notes={"seconds": time.perf_counter() - start, **_made_by(base)},
            )
            return True

        self._phase(worker, "Collecting", keys, range(len(keys)), compute)
        return [one for key in keys for one in cases_of(self.store, key) if isinstance(one, Case)]

    def chunk_keys(
        self, chunks: Sequence[Chunk], base_hash: str, siblings: Sequence[tuple[str, str]]
    ) -> list[Key]:
        """The key of each chunk.

        Args:
            chunks: The chunks.
            base_hash: Hash of the base model.
            siblings: Name and hash of each model that contrasts may come from.
        """
        return [
            chunk_key(
                self.store, chunk.settings, chunk.items, log=chunk.log,
                spec=self.settings.base.spec, fingerprint=base_hash,
                collect=self.collecting_of(chunk.settings), siblings=siblings,
                seed=self.settings.seed, threads=self.settings.threads,
                checker=self._asked(chunk),
                writer=None if chunk.log else self.settings.collect.writer_dtype,
            )
            for chunk in chunks
        ]  # fmt: skip

    def _asked(self, chunk: Chunk) -> str:
        """Hash of what is asked about a chunk's items beside the model.

        The sandbox, the judges, locators that are not the package's, and the checker's libraries.
        """
        used = [LOCATORS[name] for name in self.collecting_of(chunk.settings).locators]
        own = [one for one in used if getattr(one, "__module__", "") != judge.__module__]
        functions = [self.sandbox and function_data(self.sandbox)]
        functions += map(function_data, (*self.judges, *own))
        return content_hash([functions, checked_with(chunk.settings.name)])

    def _analyse(
        self, worker: Worker, one: ModelSettings, model: Any, model_hash: str, cases: list[Case]
    ) -> None:
        units = [(number, rules) for number in range(len(cases)) for rules in self.rules_of(one)]
        keys = [
            analysis_key(
                self.store, cases[number], model=one.name, fingerprint=model_hash, rules=rules,
                settings=self.analysing.under(rules), threads=self.settings.threads,
            )
            for number, rules in units
        ]  # fmt: skip
        last: dict[int, Any] = {}  # what the rule sets of the last case share

        def compute(i: int) -> bool:
            number, rules = units[i]
            case = cases[number]
            try:
                if number not in last:
                    last.clear()
                    last[number] = prepare(model, case)
                found = analyse(
                    model, case, rules, self.analysing, name=one.name, fingerprint=model_hash,
                    prepared=last[number],
                )  # fmt: skip
            except Exception as error:
                if not isinstance(error, _OF_ONE_CASE) and not is_out_of_memory(error):
                    raise
                self._failed.append(Failed(case.id, one.name, rules, str(error)))
                return False
            notes = {"seconds": dict(found.seconds), **_made_by(model)}
            self.store.put(keys[i], *analysis_data(found), notes)
            return True

        numbers = [number for number, _ in units]
        self._phase(worker, f"Analysing, {one.name}", keys, numbers, compute)

    def _check(
        self, worker: Worker, one: ModelSettings, model: Any, model_hash: str, cases: list[Case]
    ) -> None:
        rule_sets = self.checked_rules_of(one)
        units = [(number, rules) for number in range(len(cases)) for rules in rule_sets]
        keys = [self.check_key(cases[n], one.name, model_hash, rules) for n, rules in units]

        def compute(i: int) -> bool:
            number, rules = units[i]
            case = cases[number]
            try:
                found = check_case(model, case, rules, self.checking)
            except Exception as error:
                # ModelStateError: this case's Δℓ differs between two runs by more than rounding.
                expected = isinstance(error, (*_OF_ONE_CASE, ModelStateError))
                if not expected and not is_out_of_memory(error):
                    raise
                self._failed.append(Failed(case.id, one.name, rules, str(error), "check"))
                return False
            notes = {"cost": check_cost(found), **_made_by(model)}
            self.store.put(keys[i], *check_data(found), notes)
            return True

        self._phase(worker, f"Checking, {one.name}", keys, [n for n, _ in units], compute)

    def check_key(self, case: Case, model: str, model_hash: str, rules: str) -> Key:
        """The key of the check of a case's map.

        Args:
            case: The case.
            model: Name of the model.
            model_hash: Its hash.
            rules: Name of the rule set.
        """
        return check_key(
            self.store, case, model=model, fingerprint=model_hash, rules=rules,
            settings=self.checking, threads=self.settings.threads,
        )  # fmt: skip

    def bar(self, title: str, total: int, unit: str) -> Any:
        """A progress bar on stderr, which shows nothing where none is asked for or no terminal is.

        Args:
            title: What is done.
            total: Number of its steps.
            unit: What a step is called.
        """
        shows = self.progress and sys.stderr.isatty()
        return tqdm(total=total, desc=title, unit=unit, disable=not shows)

    def _phase(
        self,
        worker: Worker,
        title: str,
        keys: Sequence[Key],
        numbers: Sequence[int],
        compute: Callable[[int], bool],
    ) -> None:
        self._units += len(keys)
        with self.bar(title, len(keys), "unit") as bar:

            def counted(i: int) -> bool:
                if not compute(i):
                    return False
                self._computed += 1
                self._verified.add(keys[i])
                return True

            def seen(missing: int) -> None:
                bar.update(len(keys) - missing - bar.n)

            worker.work(keys, numbers, self._is_done, counted, seen)

    def _is_done(self, key: str) -> bool:
        """Whether a result is in the store and can be read; a damaged one counts as missing."""
        if key in self._verified:
            return True
        try:
            self.store.get(key)
        except KeyError:
            return False
        except FileFormatError as error:
            if str(error) not in self._damaged:
                self._damaged.append(str(error))
            return False
        self._verified.add(key)
        return True


def cases_of(store: Store, key: str) -> list[Case | Dropped]:
    """What became of a chunk's items.

    Args:
        store: The store.
        key: Key of the chunk.

    Raises:
        KeyError: It is not in the store.
        FileFormatError: Its file is damaged.
    """
    return [collected_from(one) for one in store.get(key).record["cases"]]


def analysis_of(store: Store, key: str) -> Any:
    """A stored analysis.

    Args:
        store: The store.
        key: Its key.

    Raises:
        KeyError: It is not in the store.
        FileFormatError: Its file is damaged.
    """
    entry = store.get(key)
    return analysis_from(entry.record, entry.tensors, entry.notes.get("seconds", {}))


def check_of(store: Store, key: str) -> MapCheck:
    """A stored check.

    Args:
        store: The store.
        key: Its key.

    Raises:
        KeyError: It is not in the store.
        FileFormatError: Its file is damaged.
    """
    entry = store.get(key)
    return check_from(entry.record, entry.tensors, entry.notes["cost"])


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Compute on ``n`` threads while the block runs: sums are rounded by how they are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _made_by(model: Any) -> dict[str, Any]:
    return {"device": str(model_device(model)), "torch": torch.__version__, "at": time.time()}


def store_of(settings: StudySettings, folder: Path) -> Store:
    """The store of a study.

    Args:
        settings: Its settings.
        folder: The folder of its file, to which ``store:`` is relative.

    Raises:
        FileFormatError, NotADirectoryError: As ``Store``.
    """
    return Store(folder / os.path.expanduser(settings.store))
