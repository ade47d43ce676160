"""``Study``: a study's file with its steps, plan, run, label and report."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileFormatError, NotRunError
from .cases import Case, Dropped
from .keys import analysis_key, failure_hash, model_key
from .labels import AUTOMATIC, Label, read_labels
from .plan import StudyPlan, plan_study
from .results import ModelEntry, StudyResults
from .run import RunSummary, StudyRun, analysis_of, cases_of, check_of, store_of
from .settings import ModelSettings, StudySettings, load_settings
from .workers import Share

if TYPE_CHECKING:
    from ..attribution.check import MapCheck
    from .store import Store

_LIBRARIES = ("torch", "transformers", "transformer_lens", "datasets")


@dataclass(eq=False)
class Study:
    """A study: which models, which benchmarks, and what is computed of each failure.

    Its results lie in ``store``, keyed by everything that determines them: a study can be
    interrupted and continued, and after a change of its file only what the change affects is
    computed again.

    Attributes:
        settings: What its file says.
        folder: The folder to which the settings' paths are relative.
        sandbox: Runs code for benchmarks whose checker needs that; nothing is executed without it.
        judges: For the locator "judge": callables that are given an item and the completion's
            tokens, and answer with the index of the first wrong one, or None.

    Example:
        >>> from tl_contrastive_lrp.study.settings import read_settings
        >>> file = "{version: 1, base: {model: demo}, benchmarks: [{name: demo, limit: 4}]}"
        >>> study = clrp.study.Study(read_settings(file), Path("."))
        >>> study.settings.analyse.rules
        ('attnlrp',)
    """

    settings: StudySettings
    folder: Path
    sandbox: Callable[..., bool] | None = None
    judges: Sequence[Any] = field(default_factory=tuple)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Study:
        """Read a study's file.

        Args:
            path: The YAML file; ``clrp study init`` writes a commented one.

        Returns:
            The study.

        Raises:
            FileNotFoundError: There is no such file.
            SettingsError: A key or value is wrong; the message names its path.

        Example:
            >>> _ = Path("study.yaml").write_text(
            ...     "{version: 1, base: {model: demo}, benchmarks: [{name: demo, limit: 4}]}"
            ... )
            >>> clrp.study.Study.load("study.yaml").settings.base.model
            'demo'
        """
        return cls(load_settings(path), Path(path).resolve().parent)

    @cached_property
    def store(self) -> Store:
        """Where the results are.

        Raises:
            FileFormatError: It is of another format version, or the folder holds something else.

        Example:
            >>> from tl_contrastive_lrp.study.settings import read_settings
            >>> file = "{version: 1, base: {model: demo}, benchmarks: [{name: demo, limit: 9}]}"
            >>> clrp.study.Study(read_settings(file), Path(".")).store.keys("analysis")
            []
        """
        return store_of(self.settings, self.folder)

    def _run(self, share: Share | None = None, progress: bool = False) -> StudyRun:
        settings = self.settings.relative_to(self.folder)
        given = share if share is not None else Share()
        return StudyRun(settings, self.store, given, self.sandbox, self.judges, progress)

    def plan(self, *, items: int = 8, progress: bool = True) -> StudyPlan:
        """Say how large the study is, from a timed sample, before anything is run.

        Args:
            items: Number of items that are completed for the sample, over all benchmarks.
            progress: Whether to show what is being measured, where stderr is a terminal.

        Returns:
            Cases, tokens, memory and hours; ``str`` gives them as a text.

        Raises:
            OSError, FileFormatError, ValueError: A model or benchmark cannot be opened.
            ModelStateError, UncoveredComponentError: A model cannot be explained.

        Example:
            >>> from tl_contrastive_lrp.study.settings import read_settings
            >>> file = "{version: 1, base: {model: demo}, benchmarks: [{name: demo, limit: 4}]}"
            >>> study = clrp.study.Study(read_settings(file), Path("."))
            >>> study.plan(items=2, progress=False).items
            4
        """
        return plan_study(self._run(progress=progress), items)

    def run(
        self,
        shard: str | tuple[int, int] | None = None,
        *,
        analyse: bool = True,
        progress: bool = True,
    ) -> RunSummary:
        """Collect and analyse what is not in the store yet.

        Args:
            shard: Which part of the work to do first: "i/n" or (i, n), i from 0. What other workers
                leave undone is done after that, so each returns with the study complete. By
                default, as torchrun or ``accelerate launch`` say, else all.
            analyse: Whether the cases are analysed; else they are collected alone, and
                ``results().cases`` has them.
            progress: Whether to show progress bars, where stderr is a terminal.

        Returns:
            What was done, and which cases failed.

        Raises:
            ValueError: There is no such shard; or as ``open_benchmark``.
            OSError, FileFormatError: A model or benchmark cannot be opened.
            TokenizerMismatchError: Two models have different tokens.
            ModelStateError, UncoveredComponentError: A model cannot be explained.

        Example:
            >>> from tl_contrastive_lrp.study.settings import read_settings
            >>> file = "{version: 1, base: {model: demo}, benchmarks: [{name: demo, limit: 4}]}"
            >>> summary = clrp.study.Study(read_settings(file), Path(".")).run(progress=False)
            >>> summary.cases + summary.dropped, summary.failed
            (4, ())
        """
        if shard is None:
            share = Share.of_environment(os.environ)
        else:
            share = Share.of_text(shard) if isinstance(shard, str) else Share(*shard)
        return self._run(share, progress).go(analyse)

    def label(self, path: str | os.PathLike[str], *, blind: bool = True) -> Path:
        """Write the page on which a person labels the cases, offline and with the keyboard.

        Args:
            path: The HTML file to write.
            blind: Whether the automatic label is hidden until a case is labelled.

        Returns:
            The path.

        Raises:
            NotRunError: The study has not been run.
            ValueError, OSError: As ``label_page``.

        Example:
            >>> from tl_contrastive_lrp.study.settings import read_settings
            >>> file = "{version: 1, base: {model: demo}, benchmarks: [{name: demo, limit: 9}]}"
            >>> study = clrp.study.Study(read_settings(file), Path("."))
            >>> _ = study.run(progress=False)
            >>> study.label("labels.html").name
            'labels.html'
        """
        from .label_page import label_page

        return label_page(self.results(), path, blind=blind, seed=self.settings.seed)

    def add_labels(self, path: str | os.PathLike[str]) -> tuple[Label, ...]:
        """Check labels that the labelling page gave, and keep a copy of them in the store.

        They count for the failures that these cases are now: a label is not taken for that of
        another failure of the same item, as after a change of the model, or in another study with
        the same store. Labels of other cases are kept and do not count.

        Args:
            path: The file of JSON lines; one of the same name is replaced.

        Returns:
            The labels.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: A line is no label, or is an automatic one.
            NotRunError: The study has not been run.

        Example:
            >>> from tl_contrastive_lrp.study.settings import read_settings
            >>> file = "{version: 1, base: {model: demo}, benchmarks: [{name: demo, limit: 9}]}"
            >>> study = clrp.study.Study(read_settings(file), Path("."))
            >>> _ = study.run(progress=False)
            >>> label = clrp.study.Label("demo/1", "Ada", "M-IA", "URT")
            >>> study.add_labels(clrp.study.write_labels("ada.jsonl", [label])) == (label,)
            True
        """
        from ..files import atomic_path

        labels = read_labels(path)
        if any(label.labeller == AUTOMATIC for label in labels):
            raise FileFormatError(
                f"{path} has labels by {AUTOMATIC!r}, which is the name of the study's own first "
                "label. Give people's labels, each by another name."
            )
        failures = {case.id: failure_hash(case) for case in self.results().cases}
        ours = {label.case_id: failures.get(label.case_id) for label in labels}
        folder = self.store.folder / "labels"
        folder.mkdir(exist_ok=True)
        # What the labels are of stands there before they do.
        with atomic_path(folder / (Path(path).stem + ".cases.json")) as temporary:
            temporary.write_text(json.dumps(ours), "utf-8")
        with atomic_path(folder / (Path(path).stem + ".jsonl")) as temporary:
            shutil.copyfile(path, temporary)
        return labels

    def report(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Write the report: one page, its data as CSV and Parquet, and its numbers as JSON.

        Args:
            path: The HTML file to write; the other files lie beside it and are named after it
                (study.html, study.json, study_files).

        Returns:
            Every number of the report.

        Raises:
            NotRunError: The study has not been run.
            ValueError, OSError: As ``report``.

        Example:
            >>> from tl_contrastive_lrp.study.settings import read_settings
            >>> file = "{version: 1, base: {model: demo}, benchmarks: [{name: demo, limit: 9}]}"
            >>> study = clrp.study.Study(read_settings(file), Path("."))
            >>> _ = study.run(progress=False)
            >>> study.report("study.html")["name"]
            'study'
        """
        from .report import report

        return dict(report(self.results(), path))

    def results(self) -> StudyResults:
        """All that was found, from the store: no model is loaded.

        Returns:
            Cases, analyses, checks and labels.

        Raises:
            NotRunError: The study has not been run, or not to its end.
            FileFormatError: A file of the store is damaged; running again replaces it, and adding
                labels again those of labels.
            OSError: A benchmark cannot be opened.
            ValueError: That too, or none of the base's analyses under the first rule set was made,
                though others were.

        Example:
            >>> from tl_contrastive_lrp.study.settings import read_settings
            >>> file = "{version: 1, base: {model: demo}, benchmarks: [{name: demo, limit: 9}]}"
            >>> study = clrp.study.Study(read_settings(file), Path("."))
            >>> _ = study.run(progress=False)
            >>> {analysis.model for analysis in study.results().analyses} <= {"demo"}
            True
        """
        run = self._run()
        hashes = {one.name: self._model(one) for one in run.settings.models}
        siblings = [
            (one.name, str(hashes[one.name]["fingerprint"]))
            for one in (run.settings.siblings if run.takes_siblings else ())
        ]
        found = self._collected(run, str(hashes[run.settings.base.name]["fingerprint"]), siblings)
        cases = tuple(one for one in found if isinstance(one, Case))
        analyses, missing = [], 0
        for one in run.settings.models:
            for case in cases:
                for rules in run.rules_of(one):
                    key = analysis_key(
                        self.store, case, model=one.name,
                        fingerprint=str(hashes[one.name]["fingerprint"]), rules=rules,
                        settings=run.analysing.under(rules), threads=run.settings.threads,
                    )  # fmt: skip
                    if self.store.has(key):
                        analyses.append(analysis_of(self.store, key))
                    else:
                        missing += 1
        checks, unchecked = self._checks(run, cases, hashes)
        return StudyResults(
            name=self.settings.name,
            cases=cases,
            dropped=tuple(one for one in found if isinstance(one, Dropped)),
            analyses=tuple(analyses),
            labels=self._labels(cases),
            models=tuple(
                _entry(run.settings, one, hashes[one.name]) for one in run.settings.models
            ),
            facts=self._facts(missing, unchecked),
            # Not that of the first analysis, which may be missing.
            main_rules=self.settings.analyse.rules[0],
            checks=checks,
        )

    def _checks(
        self, run: StudyRun, cases: Sequence[Case], hashes: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[tuple[str, str], MapCheck], int]:
        """The checks by case and rule set, and how many are missing."""
        found: dict[tuple[str, str], MapCheck] = {}
        missing = 0
        for one in run.settings.models:
            for case in cases:
                for rules in run.checked_rules_of(one):
                    fingerprint = str(hashes[one.name]["fingerprint"])
                    key = run.check_key(case, one.name, fingerprint, rules)
                    if self.store.has(key):
                        found[case.id, rules] = check_of(self.store, key)
                    else:
                        missing += 1
        return found, missing

    def _collected(
        self, run: StudyRun, base_hash: str, siblings: Sequence[tuple[str, str]]
    ) -> list[Case | Dropped]:
        keys = run.chunk_keys(run.chunks(base_hash), base_hash, siblings)
        gone = sum(not self.store.has(key) for key in keys)
        if gone:
            raise NotRunError(
                f"{gone} of {len(keys)} chunks of items are not collected yet; run the study first "
                "(clrp study run)."
            )
        return [one for key in keys for one in cases_of(self.store, key)]

    def _model(self, one: ModelSettings) -> Mapping[str, Any]:
        try:
            return self.store.get(model_key(self.store, one.spec)).record
        except KeyError:
            raise NotRunError(
                f"The store has nothing of the model {one.name!r} yet; run the study first "
                "(clrp study run)."
            ) from None

    def _labels(self, cases: Sequence[Case]) -> tuple[Label, ...]:
        """People's labels of these failures; of several by one person, the last file's counts."""
        failures = {case.id: failure_hash(case) for case in cases}
        labels = {}
        for path in sorted((self.store.folder / "labels").glob("*.jsonl")):
            of = path.with_suffix(".cases.json")
            try:
                known = json.loads(of.read_text("utf-8"))
            except (OSError, ValueError) as error:
                raise FileFormatError(
                    f"{of} says of which failures {path.name} speaks, and cannot be read ({error})."
                    " Add those labels again: clrp study label --add."
                ) from error
            for label in read_labels(path):
                failure = failures.get(label.case_id)
                if failure is not None and known.get(label.case_id) == failure:
                    labels[label.case_id, label.labeller] = label
        return tuple(labels.values())

    def _facts(self, missing: int, unchecked: int) -> dict[str, Any]:
        from .. import __version__

        versions = {"tl_contrastive_lrp": __version__, "python": platform.python_version()}
        for name in _LIBRARIES:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                continue
        return {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "versions": versions,
            "command": _command(sys.argv),
            "settings": self.settings.as_data(),
            "missing_analyses": missing,
            "missing_checks": unchecked,
        }


def _command(argv: Sequence[str]) -> str:
    """What was typed, without the folders of this machine's programs."""
    program = Path(argv[0])
    if program.stem in ("__main__", "clrp", "tl-contrastive-lrp"):
        return shlex.join(["clrp", *argv[1:]])
    if program.suffix == ".py" and "ipykernel" not in program.name:
        return shlex.join(["python", program.name, *argv[1:]])
    return "Study.report, in Python"


def _entry(settings: StudySettings, one: ModelSettings, record: Mapping[str, Any]) -> ModelEntry:
    """A model as the report lists it."""
    role = "base" if one.name == settings.base.name else "sibling"
    role = "checkpoint" if one.step is not None else role
    return ModelEntry(one.name, role, int(record["n_parameters"]), one.step)
