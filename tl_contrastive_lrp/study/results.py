"""All that a study found, as one plain bundle: what the report and the labelling page show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .analysis import CaseAnalysis
from .cases import Case, Dropped
from .labels import Label

if TYPE_CHECKING:
    from ..attribution.check import MapCheck

ROLES = ("base", "sibling", "checkpoint")


@dataclass(frozen=True)
class ModelEntry:
    """A model of a study.

    Attributes:
        name: Its name in the study.
        role: "base" (its failures are the cases), "sibling" or "checkpoint" (of the base).
        n_parameters: Number of parameters; None if unknown.
        step: Training step of a checkpoint.

    Raises:
        ValueError: The role is unknown, or a checkpoint has no step.

    Example:
        >>> clrp.study.ModelEntry("step 1000", "checkpoint", step=1000).role
        'checkpoint'
    """

    name: str
    role: str
    n_parameters: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role of {self.name!r} is {self.role!r}; use {', '.join(ROLES)}")
        if self.role == "checkpoint" and self.step is None:
            raise ValueError(f"checkpoint {self.name!r} has no step; give its training step")


@dataclass(frozen=True, eq=False)
class StudyResults:
    """Cases, what attribution says of them, and labels.

    Attributes:
        name: The study's name.
        cases: The cases.
        dropped: Completions that did not become cases, and why.
        analyses: At most one for each case, model and rule set; missing ones were not made.
        labels: People's labels, at most one for each case and labeller.
        models: The models, the base among them.
        facts: What the first paragraph of the report says: "date", "versions", "command",
            "settings", "differences" (what differs from the published study, sentences).
        main_rules: Name of the rule set that labels, sizes and checkpoints are about; "" for that
            of the first analysis.
        checks: What replacing tokens says of the base model's maps, by case and rule set; {} where
            they were not checked.

    Raises:
        ValueError: Two records contradict each other or name what is not there.

    Example:
        >>> results.base.name, results.benchmarks, results.rules
        ('demo', ('demo',), ('attnlrp', 'gradient'))
    """

    name: str
    cases: tuple[Case, ...]
    dropped: tuple[Dropped, ...] = ()
    analyses: tuple[CaseAnalysis, ...] = ()
    labels: tuple[Label, ...] = ()
    models: tuple[ModelEntry, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    main_rules: str = ""
    checks: Mapping[tuple[str, str], MapCheck] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _once("case", [case.id for case in self.cases] + [gone.id for gone in self.dropped])
        _once("model", [model.name for model in self.models])
        if sum(model.role == "base" for model in self.models) != 1:
            raise ValueError("a study has exactly one base model, whose failures are its cases")
        _once("analysis", [(a.case_id, a.model, a.rules) for a in self.analyses])
        _once("label", [(label.case_id, label.labeller) for label in self.labels])
        names = {model.name for model in self.models}
        for analysis in self.analyses:
            case = self.by_id.get(analysis.case_id)
            if case is None:
                raise ValueError(f"there is an analysis of {analysis.case_id!r}, which is no case")
            if analysis.model not in names:
                raise ValueError(
                    f"an analysis of {case.id!r} is by {analysis.model!r}; the study's models are "
                    f"{', '.join(sorted(names))}"
                )
            if not len(analysis.tokens) == len(analysis.str_tokens) == len(case.ids):
                raise ValueError(
                    f"an analysis of {case.id!r} has {len(analysis.tokens)} relevances and "
                    f"{len(analysis.str_tokens)} texts for {len(case.ids)} tokens"
                )
        if self.main_rules and self.analyses and self.main_rules not in self.rules:
            raise ValueError(
                f"main_rules is {self.main_rules!r}; the base model was analysed under "
                f"{', '.join(self.rules) or 'no rule set'}"
            )
        for (case_id, rules), check in self.checks.items():
            case = self.by_id.get(case_id)
            if case is None:
                raise ValueError(f"there is a check of {case_id!r}, which is no case")
            if check.rules != rules:
                raise ValueError(
                    f"the check of {case_id!r} under {rules!r} is of a map under {check.rules!r}"
                )
            if check.unit != "token" or len(check.names) != len(case.ids):
                raise ValueError(
                    f"the check of {case_id!r} has {len(check.names)} {check.unit}s for "
                    f"{len(case.ids)} tokens"
                )
        for label in self.labels:
            if label.case_id not in self.by_id:
                raise ValueError(f"{label.labeller!r} labelled {label.case_id!r}, which is no case")

    @cached_property
    def by_id(self) -> dict[str, Case]:
        """The cases by their id.

        Example:
            >>> len(results.by_id) == len(results.cases)
            True
        """
        return {case.id: case for case in self.cases}

    @cached_property
    def base(self) -> ModelEntry:
        """The model whose failures are the cases.

        Example:
            >>> results.base.role
            'base'
        """
        return next(model for model in self.models if model.role == "base")

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Names of the benchmarks, in order of appearance.

        Example:
            >>> results.benchmarks
            ('demo',)
        """
        records: tuple[Case | Dropped, ...] = (*self.cases, *self.dropped)
        return tuple(dict.fromkeys(record.benchmark for record in records))

    @property
    def why_none(self) -> str:
        """Why there is no case: what became of the completions, in words.

        Example:
            >>> import dataclasses
            >>> gone = clrp.study.Dropped("demo/1", "demo", "passes")
            >>> dataclasses.replace(results, cases=(), analyses=(), dropped=(gone,)).why_none
            '1 completion was dropped (passes 1)'
        """
        n, reasons = len(self.dropped), Counter(gone.reason for gone in self.dropped)
        words = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        was = "1 completion was" if n == 1 else f"{n:,} completions were"
        return f"{was} dropped" + (f" ({words})" if words else "")

    @cached_property
    def rules(self) -> tuple[str, ...]:
        """Names of the rule sets of the base model; the first is the study's main one.

        Example:
            >>> results.rules[0]
            'attnlrp'
        """
        found = dict.fromkeys(a.rules for a in self.analyses if a.model == self.base.name)
        first = [self.main_rules] if self.main_rules in found else []
        return tuple(dict.fromkeys([*first, *found]))

    @cached_property
    def checked_rules(self) -> tuple[str, ...]:
        """Names of the rule sets under which maps were checked, the study's main one first.

        Example:
            >>> results.checked_rules
            ()
        """
        found = dict.fromkeys(rules for _, rules in self.checks)
        return tuple(dict.fromkeys([*(r for r in self.rules if r in found), *found]))

    @cached_property
    def _table(self) -> dict[tuple[str, str, str], CaseAnalysis]:
        return {(a.case_id, a.model, a.rules): a for a in self.analyses}

    def analysis(self, case_id: str, model: str, rules: str) -> CaseAnalysis | None:
        """The analysis of a case under a model and a rule set, if it was made.

        Args:
            case_id: The case.
            model: Name of the model.
            rules: Name of the rule set.

        Returns:
            The analysis, or None.

        Example:
            >>> results.analysis(results.cases[0].id, "demo", "relp") is None
            True
        """
        return self._table.get((case_id, model, rules))

    def of_model(self, model: str, rules: str | None = None) -> dict[str, CaseAnalysis]:
        """A model's analyses by case, in the order of the cases.

        Args:
            model: Name of the model.
            rules: Name of the rule set; None for the study's main one.

        Returns:
            The analyses that were made.

        Example:
            >>> len(results.of_model("demo")) == len(results.cases)
            True
        """
        chosen = rules if rules is not None else next(iter(self.rules), "")
        found = ((case.id, self.analysis(case.id, model, chosen)) for case in self.cases)
        return {case_id: analysis for case_id, analysis in found if analysis is not None}


def _once(what: str, keys: Iterable[Any]) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"{what} {twice[0]!r} is there twice")
