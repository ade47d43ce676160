"""``check``: is this model covered, and, on request, is its relevance right?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .errors import CliError, Code, exit_codes, words_of
from .model import Loaded, checked_device, load_model, quiet_libraries
from .print_attribution import finite, print_json
from .prompt import special_notes
from .terminal import print_err, print_out, progress, table

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
# Here the model is an argument; messages of ``load_model`` know it as an option.
_AS_ARGUMENT = {
    "It holds a whole model: --model ": "It holds a whole model. Type: tl-contrastive-lrp check ",
    "--model gives another": "the argument MODEL gives another",
    "Give it with --model": "Give it as the argument MODEL",
    "and --model is ": "and the model given is ",
    "Give the unquantised model with --model": "Give the unquantised model",
}
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Measure on a prompt whether relevance is right.")
]
ConfigOnlyOption = Annotated[
    bool,
    typer.Option(
        "--config-only",
        help="Ask before downloading: read config.json alone and use random weights. Implied by a "
        "folder that holds no weights.",
    ),
]
CheckPromptOption = Annotated[
    str | None, typer.Option(help="Text for --verify. Default: a few arbitrary tokens.")
]


def check_command(
    model: ModelArgument = None,
    adapter: o.AdapterOption = None,
    verify: VerifyOption = False,
    prompt: CheckPromptOption = None,
    prepend_bos: o.PrependBosOption = None,
    rules: o.RulesOption = o.DEFAULT_RULES,
    config_only: ConfigOnlyOption = False,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = o.Dtype.FLOAT32,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Is a model covered? List its operations, their rules, and what no rule covers.

    Every operation between logits and embeddings must be linear or have a rule; otherwise the
    model is refused, with what stands in the way (exit code 3). **--verify** then measures on a
    prompt: the forward unchanged, nothing lost, nothing detached, finite numbers, precision.

    **--json** prints one object. *status* is "covered" or "refused", with *version, model, class,
    rules, dtype, device, weights* ("checkpoint" or "random"), *operations* (how many were looked
    at); *coverage* (*component, class_name, operation, rule, attached*); *findings* (*component,
    module_class, operation, why*); *ordinary* (*component, operation* of what keeps its ordinary
    gradient by rule); *verification* (null, or *verdict, objective, n_tokens, checks*: *name,
    verdict, figure, limit, says*); *notes*.
    """
    if model is None and adapter is None:
        raise typer.BadParameter("Missing argument 'MODEL'.")
    if adapter is not None and config_only:
        raise typer.BadParameter("--adapter needs the weights: it does not go with --config-only.")
    if prompt is not None and not verify:
        raise typer.BadParameter("--prompt is for --verify; add it.")
    if prompt == "":
        raise typer.BadParameter("--prompt is empty.")
    if prepend_bos is not None and prompt is None:
        raise typer.BadParameter("--bos and --no-bos go with --prompt.")
    with exit_codes(debug):
        spins = not (quiet or json)
        with progress("Loading the model", spins):
            loaded, random = _load(model, config_only, device, dtype.value, adapter)
            bridge, notes = loaded.bridge, loaded.notes
        if prompt is not None and random:
            raise CliError(
                Code.USAGE, "There is no tokenizer with random weights: leave --prompt out."
            )
        if prompt is not None:
            notes = (*notes, *special_notes(bridge, prompt, prepend_bos))
        with progress("Following every operation", spins):
            coverage, audit, why = _examined(bridge, rules.value)
        verification = None
        if verify and why is None and audit is not None and audit.clean:
            with progress("Measuring", spins):
                verification = _verified(bridge, prompt, rules.value, prepend_bos)
        found = _Checked(bridge, rules.value, dtype.value, coverage, audit, why, verification)
        if json:
            print_json(found.as_json(loaded.name, "random" if random else "checkpoint", notes))
        else:
            found.print(loaded.name, notes, quiet)
        if not found.good:
            raise typer.Exit(Code.MODEL)


def _load(
    name: str | None, config_only: bool, device: o.Device | None, dtype: str, adapter: str | None
) -> tuple[Loaded, bool]:
    """The model, and whether its weights are random.

    Raises:
        CliError: as ``load_model`` and ``sketch``.
    """
    from .random_model import has_weights, sketch

    where = None if device is None else device.value
    if name is not None and (config_only or (adapter is None and not has_weights(name))):
        made = sketch(name, checked_device(where, dtype), dtype)
        return Loaded(made.bridge, name, made.notes), True
    try:
        loaded = load_model(name, where, dtype, adapter)
    except CliError as error:
        raise CliError(error.code, _as_argument(str(error))) from error
    return replace(loaded, notes=tuple(map(_as_argument, loaded.notes))), False


def _as_argument(message: str) -> str:
    for option, argument in _AS_ARGUMENT.items():
        message = message.replace(option, argument)
    return message


def _examined(bridge: Any, rules: str) -> tuple[Coverage | None, Audit | None, str | None]:
    """The coverage, the audit, and why there is none."""
    from ..errors import UncoveredComponentError
    from ..hooks.audit.audit import audit
    from ..hooks.placement import place

    try:
        with quiet_libraries():
            _, coverage = place(bridge, rules)
            return coverage, audit(bridge), None
    except UncoveredComponentError as error:
        return None, None, words_of(error)


def _verified(
    bridge: Any, prompt: str | None, rules: str, prepend_bos: bool | None
) -> Verification:
    import torch

    from ..evaluation.verification.verify import verify

    ids: Any = prompt
    if prompt is None:
        n = min(12, int(bridge.cfg.n_ctx))
        ids = (torch.arange(n) * 7 + 3) % int(bridge.cfg.d_vocab)
        ids = ids.to(next(iter(bridge.original_model.parameters())).device)
    with quiet_libraries():
        return verify(bridge, ids, rules, prepend_bos=prepend_bos)


class _Checked:
    """What was found, and how it is told."""

    def __init__(
        self,
        bridge: Any,
        rules: str,
        dtype: str,
        coverage: Coverage | None,
        audit: Audit | None,
        why: str | None,
        verification: Verification | None,
    ) -> None:
        self.bridge, self.rules, self.dtype = bridge, rules, dtype
        self.coverage, self.audit, self.why = coverage, audit, why
        self.verification = verification
        self.covered = why is None and audit is not None and audit.clean

    @property
    def good(self) -> bool:
        failed = self.verification is not None and self.verification.verdict == "failed"
        return self.covered and not failed

    def print(self, name: str, notes: tuple[str, ...], quiet: bool) -> None:
        kind = type(self.bridge.original_model).__name__
        status = "covered" if self.covered else "not covered"
        print_out(f"{name} ({kind}): {status}, rules {self.rules}, {self.dtype}")
        if self.coverage is not None and self.covered:
            headings = ("component", "operation", "rule", "attached")
            rows = [[getattr(row, h) for h in headings] for row in self.coverage.summary()]
            table([(heading, False) for heading in headings], rows)
        if self.why is not None:
            print_out(self.why)
        elif self.audit is not None:
            self._print_audit(self.audit)
        if self.verification is not None:
            self._print_verification(self.verification)
        if not quiet:
            for note in notes:
                print_err(f"Note: {note}")

    def _print_audit(self, audit: Audit) -> None:
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

    def _print_verification(self, verification: Verification) -> None:
        print_out(f"Verified on {verification.n_tokens} tokens, {verification.objective}:")
        table(
            [("check", False), ("verdict", False), ("figure", True), ("", False)],
            [
                (c.name, c.verdict, "-" if math.isnan(c.figure) else f"{c.figure:.2g}", c.says)
                for c in verification.checks
            ],
        )

    def as_json(self, name: str, weights: str, notes: tuple[str, ...]) -> dict[str, Any]:
        from .. import __version__

        audit, v = self.audit, self.verification
        findings = [vars(f) for f in audit.findings] if audit is not None else []
        if self.why is not None:
            findings = [
                {"component": "model", "module_class": "", "operation": "", "why": self.why}
            ]
        return {
            "status": "covered" if self.covered else "refused",
            "version": __version__,
            "model": name,
            "class": type(self.bridge.original_model).__name__,
            "rules": self.rules,
            "dtype": self.dtype,
            "device": str(next(iter(self.bridge.original_model.parameters())).device),
            "weights": weights,
            "operations": sum(audit.counts.values()) if audit is not None else 0,
            "coverage": [] if self.coverage is None else [vars(r) for r in self.coverage.rows],
            "findings": findings,
            "ordinary": [
                {"component": c, "operation": op} for c, op in (audit.ordinary if audit else ())
            ],
            "verification": None
            if v is None
            else {
                "verdict": v.verdict,
                "objective": v.objective,
                "n_tokens": v.n_tokens,
                "checks": [
                    vars(c) | {"figure": finite(c.figure), "limit": finite(c.limit)}
                    for c in v.checks
                ],
            },
            "notes": list(notes),
        }
