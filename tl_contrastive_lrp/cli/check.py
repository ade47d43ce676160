"""The command ``check``: is this model covered, and, on request, is its relevance right?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Argument
from . import options as o
from .errors import CliError, Code, as_option, exit_codes, in_shell, message_of
from .model import Loaded, checked_device, load_model, quiet_libraries
from .print_attribution import finite, print_json
from .prompt import special_notes
from .retype import PROGRAM
from .terminal import print_err, print_out, progress, shell_word, table

if TYPE_CHECKING:
    from ..evaluation.verification.verify import Verification
    from ..hooks.audit.audit import Audit
    from ..hooks.coverage import Coverage

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="Folder of a Hugging Face model, its name on the hub, or a GGUF file. Needed, except "
        "with --adapter.",
        show_default=False,
    ),
]
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Measure on a prompt whether relevance is right.")
]
ConfigOnlyOption = Annotated[
    bool,
    typer.Option(
        "--config-only",
        help="Check before downloading: read only config.json and use random weights. Implied by a "
        "folder that holds no weights.",
    ),
]
CheckPromptOption = Annotated[
    str | None, typer.Option(help="Text for --verify. Default: a few arbitrary tokens.")
]


@dataclass(frozen=True, eq=False, repr=False)
class CheckOptions:
    """The options of ``check``."""

    model: ModelArgument = None
    adapter: o.AdapterOption = None
    verify: VerifyOption = False
    prompt: CheckPromptOption = None
    prepend_bos: o.PrependBosOption = None
    rules: o.RulesOption = o.DEFAULT_RULES
    config_only: ConfigOnlyOption = False
    device: o.DeviceOption = None
    dtype: o.DtypeOption = o.Dtype.FLOAT32
    json: o.JsonOption = False
    quiet: o.QuietOption = False
    debug: o.DebugOption = False

    def require_consistent(self) -> None:
        """Refuse options that contradict each other, before any file is read.

        Raises:
            typer.BadParameter: They contradict each other.
        """
        if self.model is None and self.adapter is None:
            raise typer.BadParameter("Missing argument 'MODEL'.")
        if self.adapter is not None and self.config_only:
            raise typer.BadParameter(
                "--adapter needs the weights: it does not go with --config-only."
            )
        if self.prompt is not None and not self.verify:
            raise typer.BadParameter("--prompt is for --verify; add it.")
        if self.prompt == "":
            raise typer.BadParameter("--prompt is empty.")
        if self.prepend_bos is not None and self.prompt is None:
            raise typer.BadParameter("--bos and --no-bos go with --prompt.")


def _spelled(argument: Argument) -> str:
    """Spell an argument of the library; in this command the model is not an option."""
    if argument.name != "model":
        return as_option(argument)
    if argument.value is None:
        return "the argument MODEL"
    return f"{PROGRAM} check {shell_word(str(argument.value))}"


@o.takes_options
def check_command(options: CheckOptions) -> None:
    """Is a model covered? List its operations, their rules, and what no rule covers.

    Every operation between logits and embeddings must be linear or have a rule; otherwise the
    model is refused, with the operations at fault (exit code 3). **--verify** then measures on a
    prompt: the forward unchanged, nothing lost, nothing detached, finite numbers, precision.

    **--json** prints one object. *status* is "covered" or "refused", with *version, model, class,
    rules, dtype, device, weights* ("checkpoint" or "random"), *operations* (the number examined);
    *coverage* (*component, class_name, operation, rule, attached*); *findings* (*component,
    module_class, operation, why*); *ordinary* (*component, operation* of what keeps its ordinary
    gradient by rule); *verification* (null, or *verdict, objective, n_tokens, checks*: *name,
    verdict, figure, limit, says*); *notes*.
    """
    options.require_consistent()
    rules, prompt = options.rules.value, options.prompt
    with exit_codes(options.debug, _spelled):
        shows_progress = not (options.quiet or options.json)
        with progress("Loading the model", shows_progress):
            loaded, is_random = _load(options)
            model, notes = loaded.bridge, loaded.notes
        if prompt is not None and is_random:
            raise CliError(
                Code.USAGE, "There is no tokenizer with random weights: leave --prompt out."
            )
        if prompt is not None:
            notes = (*notes, *special_notes(model, prompt, options.prepend_bos))
        with progress("Following every operation", shows_progress):
            examined = _examine(model, rules)
        verification = None
        if options.verify and examined.is_covered:
            with progress("Measuring", shows_progress):
                verification = _verify(model, prompt, rules, options.prepend_bos)
        report = _Report(
            name=loaded.name,
            model_class=type(model.original_model).__name__,
            rules=rules,
            dtype=options.dtype.value,
            device=str(next(iter(model.original_model.parameters())).device),
            has_random_weights=is_random,
            examined=examined,
            verification=verification,
            notes=tuple(in_shell(note, _spelled) for note in notes),
        )
        if options.json:
            print_json(report.as_json())
        else:
            report.print(options.quiet)
        if not report.passed:
            raise typer.Exit(Code.MODEL)


def _load(options: CheckOptions) -> tuple[Loaded, bool]:
    """Load the model, or make one with random weights.

    Returns:
        The model, and whether its weights are random.

    Raises:
        CliError: As ``load_model`` and ``random_model``.
    """
    from .random_model import has_weights, random_model

    name, adapter, dtype = options.model, options.adapter, options.dtype.value
    device = None if options.device is None else options.device.value
    if name is not None and (options.config_only or (adapter is None and not has_weights(name))):
        return random_model(name, checked_device(device, dtype), dtype), True
    return load_model(name, device, dtype, adapter), False


@dataclass(frozen=True)
class _Examined:
    """Which rule covers each component, and the audit; or why the model is refused."""

    coverage: Coverage | None = None
    audit: Audit | None = None
    refusal: str = ""

    @property
    def is_covered(self) -> bool:
        return self.audit is not None and self.audit.clean


def _examine(model: Any, rules: str) -> _Examined:
    """Place the rules, and follow every operation of a forward."""
    from ..errors import UncoveredComponentError
    from ..hooks.audit.audit import audit
    from ..hooks.placement import place

    try:
        with quiet_libraries():
            _, coverage = place(model, rules)
            return _Examined(coverage, audit(model))
    except UncoveredComponentError as error:
        return _Examined(refusal=message_of(error, _spelled))


def _verify(model: Any, prompt: str | None, rules: str, prepend_bos: bool | None) -> Verification:
    """Verify on the prompt, or on a few arbitrary tokens."""
    import torch

    from ..evaluation.verification.verify import verify

    text_or_ids: Any = prompt
    if prompt is None:
        n = min(12, int(model.cfg.n_ctx))
        text_or_ids = (torch.arange(n) * 7 + 3) % int(model.cfg.d_vocab)
        text_or_ids = text_or_ids.to(next(iter(model.original_model.parameters())).device)
    with quiet_libraries():
        return verify(model, text_or_ids, rules, prepend_bos=prepend_bos)


@dataclass(frozen=True)
class _Report:
    """The report that the command prints.

    Attributes:
        name: Name of the model.
        model_class: Its class in transformers.
        rules: Name of the rule set.
        dtype: Floating-point type of the weights.
        device: The device it is on.
        has_random_weights: Whether it was made from its configuration alone.
        examined: Coverage and audit.
        verification: The verification, if it was requested.
        notes: Sentences on what the user may not expect.
    """

    name: str
    model_class: str
    rules: str
    dtype: str
    device: str
    has_random_weights: bool
    examined: _Examined
    verification: Verification | None
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the model is covered and no check failed."""
        failed = self.verification is not None and self.verification.verdict == "failed"
        return self.examined.is_covered and not failed

    def print(self, quiet: bool) -> None:
        """Print the report as text."""
        examined = self.examined
        status = "covered" if examined.is_covered else "not covered"
        print_out(f"{self.name} ({self.model_class}): {status}, rules {self.rules}, {self.dtype}")
        if examined.coverage is not None and examined.is_covered:
            headings = ("component", "operation", "rule", "attached")
            rows = [[getattr(row, h) for h in headings] for row in examined.coverage.summary()]
            table([(heading, False) for heading in headings], rows)
        if examined.refusal:
            print_out(examined.refusal)
        elif examined.audit is not None:
            _print_audit(examined.audit)
        if self.verification is not None:
            _print_verification(self.verification)
        if not quiet:
            for note in self.notes:
                print_err(f"Note: {note}")

    def as_json(self) -> dict[str, Any]:
        """The JSON object of ``--json``; the command's help text documents it."""
        from .. import __version__

        coverage, audit = self.examined.coverage, self.examined.audit
        findings = [vars(f) for f in audit.findings] if audit is not None else []
        if self.examined.refusal:
            findings = [
                {
                    "component": "model",
                    "module_class": "",
                    "operation": "",
                    "why": self.examined.refusal,
                }
            ]
        return {
            "status": "covered" if self.examined.is_covered else "refused",
            "version": __version__,
            "model": self.name,
            "class": self.model_class,
            "rules": self.rules,
            "dtype": self.dtype,
            "device": self.device,
            "weights": "random" if self.has_random_weights else "checkpoint",
            "operations": sum(audit.counts.values()) if audit is not None else 0,
            "coverage": [] if coverage is None else [vars(r) for r in coverage.rows],
            "findings": findings,
            "ordinary": [
                {"component": component, "operation": operation}
                for component, operation in (audit.ordinary if audit else ())
            ],
            "verification": _verification_as_json(self.verification),
            "notes": list(self.notes),
        }


def _print_audit(audit: Audit) -> None:
    if audit.clean:
        n = sum(audit.counts.values())
        print_out(
            f"Each of {n} operations between logits and embeddings is linear or has its rule."
        )
        return
    print_out("No rule covers these, so relevance through them would be made up:")
    table(
        [("component", False), ("class", False), ("operation", False), ("why", False)],
        [tuple(vars(f).values()) for f in audit.summary()],
    )


def _print_verification(verification: Verification) -> None:
    print_out(f"Verified on {verification.n_tokens} tokens, {verification.objective}:")
    table(
        [("check", False), ("verdict", False), ("figure", True), ("", False)],
        [
            (c.name, c.verdict, "-" if math.isnan(c.figure) else f"{c.figure:.2g}", c.says)
            for c in verification.checks
        ],
    )


def _verification_as_json(verification: Verification | None) -> dict[str, Any] | None:
    if verification is None:
        return None
    return {
        "verdict": verification.verdict,
        "objective": verification.objective,
        "n_tokens": verification.n_tokens,
        "checks": [
            vars(c) | {"figure": finite(c.figure), "limit": finite(c.limit)}
            for c in verification.checks
        ],
    }
