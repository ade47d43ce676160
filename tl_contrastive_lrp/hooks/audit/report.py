"""The result of an audit, its findings, and the errors that say so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UncoveredComponentError
from ..coverage import ranges

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 8  # lines of a refusal; the rest is counted


@dataclass(frozen=True)
class Finding:
    """One operation on the way from the logits to the input that no rule accounts for.

    Attributes:
        component: The module whose forward ran it, by TransformerLens' path ("blocks.0.mlp", or
            "blocks.0.mlp.act_fn" for a module inside the one that a component wraps).
        module_class: Class of that module, of a component the wrapped module's.
        operation: Autograd's name for it: "Mul", "Exp", "Softplus"; "halving" for a rule in the
            wrong place.
        why: What is wrong with it.
    """

    component: str
    module_class: str
    operation: str
    why: str


@dataclass(frozen=True)
class Audit:
    """Whether every operation that relevance flows through is linear or has a rule.

    Attributes:
        findings: The operations that are neither, from the logits down; empty if there are none.
        counts: How many operations of each kind were examined, by autograd's name.
        ordinary: (component, operation) of what is not linear and keeps its ordinary gradient
            because that is its rule: softmaxes, and sigmoids and quotients that weigh something.
        hooks: HookPoints that carry hook functions of the user. They are not part of this audit:
            each is examined in every run under rules, once it has computed something.

    Example:
        >>> print(clrp.audit(model))
        audit: clean; each of ... operations is linear or has its rule
    """

    findings: tuple[Finding, ...]
    counts: dict[str, int]
    ordinary: tuple[tuple[str, str], ...] = ()
    hooks: tuple[str, ...] = ()

    @property
    def of_hooks(self) -> str:
        """A sentence about ``hooks``; empty if there are none.

        Example:
            >>> with model.hooks(fwd_hooks=[("blocks.0.hook_in", lambda x, hook: None)]):
            ...     print(clrp.audit(model).of_hooks)
            the hooks that you put at blocks.0.hook_in are not part of this audit; ...
        """
        if not self.hooks:
            return ""
        points = ", ".join(self.hooks[:4]) + (", ..." if len(self.hooks) > 4 else "")
        return (
            f"the hooks that you put at {points} are not part of this audit; what they compute is "
            "checked in every run, and listed in its coverage"
        )

    @property
    def clean(self) -> bool:
        """Whether there are no findings.

        Example:
            >>> clrp.audit(model).clean
            True
        """
        return not self.findings

    def summary(self) -> tuple[Finding, ...]:
        """The findings, with equal ones of different blocks merged into one (``blocks.0-27.mlp``).

        Example:
            >>> clrp.audit(model).summary()
            ()
        """
        blocks: dict[Finding, list[int]] = {}
        for f in self.findings:
            layer = re.search(r"(?:^|\.)blocks\.(\d+)(?=\.|$)", f.component)
            number = int(layer[1]) if layer else -1
            general = f.component
            if layer:
                general = f"{general[: layer.start(1)]}{{}}{general[layer.end(1) :]}"
            key = Finding(general, f.module_class, f.operation, f.why)
            blocks.setdefault(key, []).append(number)
        return tuple(
            Finding(
                key.component.replace("{}", ranges(sorted(set(numbers)))),
                key.module_class,
                key.operation,
                key.why,
            )
            for key, numbers in blocks.items()
        )

    def to_frame(self) -> pd.DataFrame:
        """The findings as a DataFrame: component, module_class, operation, why.

        Example:
            >>> clrp.audit(model).to_frame().columns.tolist()
            ['component', 'module_class', 'operation', 'why']
        """
        import pandas as pd

        columns = ("component", "module_class", "operation", "why")
        return pd.DataFrame([vars(f) for f in self.findings], columns=list(columns))

    def __str__(self) -> str:
        n = sum(self.counts.values())
        note = [f"note: {self.of_hooks}."] if self.hooks else []
        if self.clean:
            clean = f"audit: clean; each of {n} operations is linear or has its rule"
            return "\n".join([clean, *note])
        lines = [_line(f) for f in self.summary()]
        return "\n".join([f"audit: {len(lines)} findings among {n} operations", *lines, *note])


def _line(f: Finding) -> str:
    kind = f" ({f.module_class})" if f.module_class else ""
    return f"  {f.component}{kind}: {f.operation}: {f.why}."


def not_run(model: Any, error: Exception) -> UncoveredComponentError:
    """The error for a model that the audit could not run."""
    kind, what = type(model.original_model).__name__, type(error).__name__
    return UncoveredComponentError(
        f"No rule was checked on this model ({kind}): it does not run on a few token ids alone "
        f"({what}: {str(error)[:200]}). Relevance is defined here for models that read one prompt "
        "of tokens; leave one that needs images, audio or a second sequence to activation patching."
    )


def refusal(audit: Audit) -> UncoveredComponentError:
    """The error for an audit that is not clean."""
    lines = [_line(f) for f in audit.summary()]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"  and {len(lines) - _SHOWN} more (clrp.audit(model))."]
    return UncoveredComponentError(
        "No rule covers all that this model computes, so relevance through it would be made up. "
        "On the way from the logits to the input:\n"
        + "\n".join(lines)
        + "\nUse activation patching on this model, or name these operations when asking for "
        "the family to be covered."
    )
