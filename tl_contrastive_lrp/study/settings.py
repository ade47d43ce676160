"""What a study is: the file ``study.yaml``, read into frozen records that check themselves.

Every key is known or an error: a misspelt one names its path ("collect.max_new_token") and the
nearest known name, and so do values of the wrong type or out of range. Nothing is guessed.

The file is long because each key is documented where it is read, and because the file that
``study init`` writes stands beside them, so that both change together.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import SettingsError
from ..files import atomic_path
from ..rules.rule_sets import RULE_SETS
from .models import ModelSpec

SETTINGS_VERSION = 1

SectionT = TypeVar("SectionT", bound="Section")


@dataclass(frozen=True)
class Section:
    """A part of the file: a mapping whose keys are the fields.

    Raises:
        SettingsError: A value has the wrong type, or is out of range.
    """

    LEAST: ClassVar[Mapping[str, float]] = {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for one in fields(self):
            value = getattr(self, one.name)
            if (expected := _mismatch(value, hints[one.name])) is not None:
                raise SettingsError(one.name, f"it is {_shown(value)}; give {expected}")
            least = self.LEAST.get(one.name)
            if least is not None and value is not None and value < least:
                raise SettingsError(one.name, f"it is {value}; give {least} or more")
        self.check_values()

    def check_values(self) -> None:
        """Check what depends on more than the type of one value.

        Raises:
            SettingsError: Values are out of range or contradict each other.
        """


@dataclass(frozen=True)
class ModelSettings(Section):
    """A model.

    Attributes:
        model: Its name on the hub, a local folder, or a demo model.
        name: What the study calls it; by default ``model``.
        revision: Branch, tag or commit on the hub.
        dtype: "float32", "bfloat16", "float16" or "float64".
        device_map: "auto" spreads the model over the devices that are there.
        step: Training step of a checkpoint.
    """

    LEAST: ClassVar[Mapping[str, float]] = {"step": 0}

    model: str
    name: str = ""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    device_map: str | None = None
    step: int | None = None

    def check_values(self) -> None:
        """Refuse an empty name; without one, the model's own name is taken."""
        if not self.model:
            raise SettingsError("model", "it is empty; give a hub name, a folder, or demo")
        if not self.name:
            revision = f"@{self.revision}" if self.revision else ""
            object.__setattr__(self, "name", self.model + revision)

    @property
    def spec(self) -> ModelSpec:
        """What ``open_model`` loads.

        Raises:
            SettingsError: The fields do not go together.
        """
        try:
            return ModelSpec(self.name, self.model, self.revision, self.dtype, self.device_map)
        except ValueError as error:
            raise SettingsError(f"the model {self.name!r}", str(error)) from error


@dataclass(frozen=True)
class BenchmarkSettings(Section):
    """A benchmark, or a log of one that was run elsewhere.

    Attributes:
        name: Its name, such as "demo" or "gsm8k".
        path: A local file with its rows; by default they come from the hub.
        log: A log with completions and verdicts: an Inspect .eval, lm-evaluation-harness samples,
            or OpenAI-style messages.
        limit: Only that many items, the first.
        options: More options of this benchmark.
        collect: What differs here from the study's own ``collect``, such as {max_new_tokens: 24}.
    """

    LEAST: ClassVar[Mapping[str, float]] = {"limit": 1}

    name: str
    path: str | None = None
    log: str | None = None
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    collect: dict[str, Any] = field(default_factory=dict)

    def check_values(self) -> None:
        """Refuse a name that could not begin a case's id, and what is no part of ``collect``."""
        if not self.name or "/" in self.name:
            raise SettingsError("name", f"it is {self.name!r}; give a name without /")
        if "writer_dtype" in self.collect:
            raise SettingsError(
                "collect.writer_dtype", "one writer completes all benchmarks; give it in collect"
            )
        self.collecting(CollectSection())

    def collecting(self, general: CollectSection) -> CollectSection:
        """How this benchmark's failures are made into cases.

        Args:
            general: The study's ``collect``.

        Raises:
            SettingsError: A key of this benchmark's own is unknown, or a value wrong.
        """
        own = _section(CollectSection, self.collect, "collect")
        given = {name: getattr(own, name) for name in self.collect}
        return dataclasses.replace(general, **given)


@dataclass(frozen=True)
class CollectSection(Section):
    """How failures are made into cases; ``None`` is the default of ``CollectSettings``.

    Attributes:
        max_new_tokens: The longest completion.
        batch_size: Items that are completed together, and the unit of work of a worker.
        thinking: Whether the model may think first, where its chat template offers that.
        locators: Where the first wrong token is looked for, in this order.
        contrast: Where the contrast token is looked for, in this order.
        top_k: How many of the likeliest tokens may be the contrast.
        min_delta: The smallest Δℓ of a case, in logits.
        recovery_top_k: Tokens that the locator "recovery" tries at a position.
        max_rollouts: The most rollouts of that locator for one completion.
        max_prompt_tokens: Longer prompts are dropped.
        open_rollouts: Whether rollouts that the limit cuts off pass while they still can.
        writer_dtype: Type of a copy of the base that writes completions and rollouts, such as
            "bfloat16"; by default the base itself writes. Rank and Δℓ are always those of the base.
    """

    LEAST: ClassVar[Mapping[str, float]] = {
        "max_new_tokens": 1, "batch_size": 1, "top_k": 2, "min_delta": 0,
        "recovery_top_k": 1, "max_rollouts": 1, "max_prompt_tokens": 1,
    }  # fmt: skip

    max_new_tokens: int | None = None
    batch_size: int = 8
    thinking: bool | None = False
    locators: tuple[str, ...] | None = None
    contrast: tuple[str, ...] | None = None
    top_k: int | None = None
    min_delta: float | None = None
    recovery_top_k: int | None = None
    max_rollouts: int | None = None
    max_prompt_tokens: int | None = None
    open_rollouts: bool | None = None
    writer_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None

    def given(self) -> dict[str, Any]:
        """The values that are given, by name: arguments of ``CollectSettings``."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        del values["writer_dtype"]
        return {n: v for n, v in values.items() if v is not None or n == "thinking"}


@dataclass(frozen=True)
class AnalyseSection(Section):
    """What is computed of each case.

    Attributes:
        rules: Rule sets; the base is explained under each, all other models under the first.
        graph: Whether a graph is made: true, false, "first" for the first rule set alone, or "not
            clear" for the cases alone whose input relevance adds up to less than 0 though Δℓ is
            above 1.
        granularity: Sites of the graph: "block" or "sublayer".
        mass: Share of each transition's mass that the pruned graph keeps.
        node_threshold: Nodes with |relevance| at or below it, in logits, are not expanded.
        flip_limit: At most that many tokens are removed to flip the prediction; 0 leaves it out.
        memory: "auto", "plain" or "tiled".
        attention: "auto", "fused" or "eager".
        check: Whether the base's maps are held against replaced tokens, for a verdict: true, false,
            or "first" for those under the first rule set alone.
        check_tokens: How many of a map's strongest tokens are replaced, and how many random others.
    """

    LEAST: ClassVar[Mapping[str, float]] = {
        "node_threshold": 0, "flip_limit": 0, "check_tokens": 1,
    }  # fmt: skip

    rules: tuple[str, ...] = ("attnlrp",)
    graph: bool | Literal["not clear", "first"] = True
    granularity: Literal["block", "sublayer"] = "block"
    mass: float = 0.85
    node_threshold: float = 0.01
    flip_limit: int = 16
    memory: Literal["auto", "plain", "tiled"] = "auto"
    attention: Literal["auto", "fused", "eager"] = "auto"
    check: bool | Literal["first"] = False
    check_tokens: int = 16

    def check_values(self) -> None:
        """Refuse unknown rule sets, and a share that is none."""
        if not self.rules:
            raise SettingsError("rules", f"it is empty; give some of {', '.join(RULE_SETS)}")
        for name in self.rules:
            if name not in RULE_SETS:
                raise SettingsError("rules", _unknown(name, RULE_SETS, "rule set"))
        if len(set(self.rules)) < len(self.rules):
            raise SettingsError("rules", "a rule set is there twice; delete one")
        if not 0 < self.mass <= 1:
            raise SettingsError("mass", f"it is {self.mass}; give a share above 0, up to 1")


@dataclass(frozen=True)
class StudySettings(Section):
    """A whole study.

    Attributes:
        version: Version of the file; this package reads 1.
        base: The model whose failures are the cases.
        benchmarks: Where the failures come from.
        name: Title of the report.
        store: Folder for results, relative to the file.
        seed: Seed for whatever is drawn.
        threads: Threads of one process on a CPU. Sums are rounded differently with another number,
            so it belongs to the study and not to the machine; more processes use more cores.
        siblings: Models of the same tokenizer, usually larger.
        checkpoints: Checkpoints of the base, in the order of training.
        collect: How failures are made into cases.
        analyse: What is computed of each case.
    """

    LEAST: ClassVar[Mapping[str, float]] = {"seed": 0, "threads": 1}

    version: int
    base: ModelSettings
    benchmarks: tuple[BenchmarkSettings, ...]
    name: str = "study"
    store: str = "study"
    seed: int = 0
    threads: int = 1
    siblings: tuple[ModelSettings, ...] = ()
    checkpoints: tuple[ModelSettings, ...] = ()
    collect: CollectSection = field(default_factory=CollectSection)
    analyse: AnalyseSection = field(default_factory=AnalyseSection)

    def check_values(self) -> None:
        """Refuse another version, and names that stand for two things."""
        if self.version != SETTINGS_VERSION:
            raise SettingsError(
                "version",
                f"it is {self.version}; this package reads {SETTINGS_VERSION}. Compare your file "
                "with one that clrp study init writes",
            )
        if not self.benchmarks:
            raise SettingsError("benchmarks", "it is empty; give at least one, such as demo")
        _require_different("benchmarks", [one.name for one in self.benchmarks])
        _require_different("models", [one.name for one in self.models])
        for place, model in enumerate(self.checkpoints):
            if model.step is None:
                raise SettingsError(f"checkpoints[{place}].step", "it is missing; give its step")
        for place, model in enumerate((self.base, *self.siblings)):
            if model.step is not None:
                where = f"siblings[{place - 1}].step" if place else "base.step"
                raise SettingsError(where, "only checkpoints have a step; delete it")

    @property
    def models(self) -> tuple[ModelSettings, ...]:
        """The base, the siblings and the checkpoints."""
        return (self.base, *self.siblings, *self.checkpoints)

    def relative_to(self, folder: Path) -> StudySettings:
        """The same study with paths that do not depend on the working directory.

        Files of benchmarks, and models that are written as paths (./model, ../model, ~/model), are
        relative to the folder of the study's file.

        Args:
            folder: That folder.
        """

        def found(path: str) -> str:
            return str(folder / Path(path).expanduser())

        def model(one: ModelSettings) -> ModelSettings:
            is_path = one.model.startswith(("./", "../", "~"))
            return dataclasses.replace(one, model=found(one.model)) if is_path else one

        return dataclasses.replace(
            self,
            base=model(self.base),
            siblings=tuple(map(model, self.siblings)),
            checkpoints=tuple(map(model, self.checkpoints)),
            benchmarks=tuple(
                dataclasses.replace(
                    one, path=one.path and found(one.path), log=one.log and found(one.log)
                )
                for one in self.benchmarks
            ),
        )

    def as_data(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return dataclasses.asdict(self)


def _require_different(where: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(
                where, f"the name {name!r} is there twice; give each a name: of its own"
            )


# ---------------------------------------------------------------- reading


def load_settings(path: str | os.PathLike[str]) -> StudySettings:
    """Read a study's file.

    Args:
        path: The YAML file.

    Returns:
        The settings.

    Raises:
        FileNotFoundError: There is no such file.
        SettingsError: It is no YAML, or a key or value is wrong; the message names its path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; clrp study init {path} writes one.")
    try:
        return read_settings(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise SettingsError(str(path), "it is no text in UTF-8") from error
    except SettingsError as error:
        where = f"{path}: {error.where}" if error.where else str(path)
        raise SettingsError(where, error.problem) from None


def read_settings(text: str) -> StudySettings:
    """Read the text of a study's file.

    Args:
        text: YAML.

    Returns:
        The settings.

    Raises:
        SettingsError: As ``load_settings``.
    """
    data = _yaml(text)
    _require_finite(data, "")
    return _section(StudySettings, data, "")


def _require_finite(value: object, path: str) -> None:
    """Refuse YAML's .inf and .nan, and numbers too large for one, wherever they stand."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            _require_finite(one, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for i, one in enumerate(value):
            _require_finite(one, f"{path}[{i}]")
    elif not _is_finite(value):
        raise SettingsError(path, f"it is {_shown(value)}; give {_FINITE}")


_FINITE = "a finite number"


def _is_finite(value: object) -> bool:
    """False for a number that is infinite, no number, or too large for a float."""
    try:
        return not isinstance(value, (int, float)) or math.isfinite(value)
    except OverflowError:
        return False


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """SafeLoader, but a key that is there twice is an error."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if isinstance(name, str) and name in seen:
                    line = key.start_mark.line + 1
                    raise SettingsError("", f"line {line}: the key {name!r} is there twice")
                seen.add(name if isinstance(name, str) else id(key))
            return dict(super().construct_mapping(node, deep))

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise SettingsError("", f"it cannot be read as YAML: {error}") from error


def _section(kind: type[SectionT], data: object, path: str) -> SectionT:
    """Make a section of a mapping, its parts first."""
    if not isinstance(data, Mapping):
        raise SettingsError(path, f"it is {_shown(data)}; give a mapping of {_names(kind)}")
    hints, values = get_type_hints(kind), dict[str, Any]()
    known = [one.name for one in fields(kind)]
    for name, value in data.items():
        at = f"{path}.{name}" if path else str(name)
        if name not in known:
            raise SettingsError(at, _unknown(str(name), known, "key"))
        values[name] = _converted(value, hints[name], at)
    for one in fields(kind):
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in values:
            raise SettingsError(f"{path}.{one.name}" if path else one.name, "it is missing")
    try:
        return kind(**values)
    except SettingsError as error:
        where = f"{path}.{error.where}" if path and error.where else path or error.where
        raise SettingsError(where, error.problem) from None


def _converted(value: Any, hint: Any, path: str) -> Any:
    """YAML's lists as tuples, and its mappings as sections, where the field wants them."""
    if isinstance(hint, type) and issubclass(hint, Section):
        return _section(hint, value, path)
    if isinstance(value, list):
        for option in _options(hint):
            if get_origin(option) is tuple:
                inner = get_args(option)[0]
                return tuple(_converted(v, inner, f"{path}[{i}]") for i, v in enumerate(value))
    if float in _options(hint) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _names(kind: type[Section]) -> str:
    return ", ".join(one.name for one in fields(kind))


def _mismatch(value: object, hint: Any) -> str | None:
    """What is expected, in words, if a value is not of a type."""
    options = _options(hint)
    if not _is_finite(value):
        return _FINITE
    if any(_fits(value, option) for option in options):
        return None
    return " or ".join(_in_words(option) for option in options)


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        number = int if hint is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, hint)


_WORDS = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list such as [a, b]" if get_args(hint)[0] is str else "a list of mappings"
    if get_origin(hint) is dict:
        return "a mapping"
    return _WORDS.get(hint, "a mapping")


def _shown(value: object) -> str:
    if value is None:
        return "empty"
    kind = {str: "the text ", bool: "", list: "the list ", tuple: "the list ", dict: "the mapping "}
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return kind.get(type(value), "") + (text if len(text) < 80 else text[:77] + "…")


def _unknown(name: str, known: Sequence[str] | Mapping[str, Any], what: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    instead = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    return f"{name!r} is no {what}; {instead}"


# ---------------------------------------------------------------- writing

_TEMPLATE = """\
# A study: which failures of a model does attribution explain? Run it with
#
#     clrp study plan {file}      cases, tokens, memory and hours, before anything starts
#     clrp study run {file}       collect and analyse; Ctrl-C, and the same command continues
#     clrp study label {file}     confirm or correct the labels
#     clrp study report {file}    one page with tables, figures and every case
version: 1
name: demo family
store: {store}        # folder for results, relative to this file
seed: 0
threads: 1                # of a process, on a CPU; several processes use more cores

# The model whose failures are collected: a hub name (with revision:), a local folder, or demo.
base: {base}

{family}
benchmarks:
  - {{name: demo, limit: 400}}
  # - {{name: gsm8k, path: gsm8k_test.jsonl, limit: 150}}     # rows in a local file
  # - {{name: gsm8k, log: run.eval}}                          # completions of a finished run

collect:
  max_new_tokens: 64      # the longest completion
  batch_size: 16          # items completed together; also the unit of work of a worker
  thinking: false
  locators: [given, recovery]   # where the first wrong token is looked for, in this order
  min_delta: 1.0          # logits; failures with a smaller Δℓ are dropped

analyse:
  # The base under every rule set, all other models under the first.
  rules: [attnlrp, cplrp, relp, gim, gradient]
  graph: true             # or false; "first": of the first rule set alone; or "not clear": only
                          # where input relevance is no clue
  mass: 0.85              # share of each transition's mass that the graph keeps
  node_threshold: 0.01    # logits; smaller nodes are not expanded
  flip_limit: 16          # at most so many tokens are removed to flip the prediction
  check: false            # or true: hold the base's maps against replaced tokens, for a verdict on
                          # each; or "first": those under the first rule set alone
  check_tokens: 16        # a map's strongest tokens that are replaced, and as many random ones
"""

_SIBLINGS = """\
siblings:                 # other sizes with the same tokenizer
  - {name: demo, model: demo}
  - {name: demo large, model: demo/large}
checkpoints:              # of the base, in the order of training
"""
_MISSING = """\
# Siblings and checkpoints need models with the same tokenizer. The demo family has them, in
# demo_family/ of the project's repository; this installation is without it. There, this command
# writes a file with all of its models. Others are named like this:
# siblings:
#   - {name: large, model: my/large}
# checkpoints:
#   - {name: "step 1000", model: my/model, revision: step1000, step: 1000}
"""


def template(file: str, *, family: Sequence[int] | None, store: str = "demo-study") -> str:
    """The text of a commented study file that runs the demo.

    Args:
        file: Name of the file, for the commands in its comments.
        family: Steps of the small model's checkpoints (``family_steps``); None without the family.
        store: Folder for results.

    Returns:
        YAML.
    """
    if family is None:
        text = _MISSING
    else:
        steps = [f'  - {{name: "step {n}", model: demo/small@{n}, step: {n}}}\n' for n in family]
        text = _SIBLINGS + "".join(steps)
    base = "{model: demo}" if family is None else "{model: demo/small}"
    return _TEMPLATE.format(file=file, store=store, base=base, family=text)


def write_template(path: str | os.PathLike[str], *, family: Sequence[int] | None) -> Path:
    """Write a commented study file that runs the demo.

    Args:
        path: The file to write.
        family: As for ``template``.

    Returns:
        The path.

    Raises:
        FileExistsError: There is such a file already.
        FileNotFoundError: Its folder does not exist.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; name another file, or delete it first.")
    with atomic_path(path, example="study.yaml") as temporary:
        temporary.write_text(template(path.name, family=family), "utf-8")
    return path
