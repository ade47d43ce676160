"""``verify``: can relevance of this model, on this prompt, be trusted? Measured, not promised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...hooks.placement import check_ready, check_single
from ...inputs.bridge import require_bridge
from ...inputs.objective import Objective, for_one_prompt, logit_diff
from ...inputs.tokens import model_name, to_single_prompt
from ...rules.rule_sets import DEFAULT_RULES, RuleSet, get_rule_set
from ...rules.threads import one_at_a_time
from . import checks, precision
from .check import Check, Verdict, dtype_of, skipped

if TYPE_CHECKING:
    import pandas as pd

_ORDER: tuple[Verdict, ...] = ("skipped", "ok", "warning", "failed")
NAMES = ("audit", "forward", "conservation", "gradient", "finite", "precision")
_OVERFLOW = "the model's logits are not finite"
_REFUSED = "the audit failed, so the rules refuse this model"


@dataclass(frozen=True)
class Verification:
    """What ``verify`` measured.

    Attributes:
        model_name: As TransformerLens has it.
        rules: Name of the rule set.
        dtype: The model's floating type.
        n_tokens: Length of the prompt.
        objective: What was explained, in words.
        checks: One ``Check`` each.
    """

    model_name: str
    rules: str
    dtype: str
    n_tokens: int
    objective: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict."""
        return max((c.verdict for c in self.checks), key=_ORDER.index)

    def __getitem__(self, name: str) -> Check:
        """The check of that name; KeyError if there is none."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def to_frame(self) -> pd.DataFrame:
        """The checks as a DataFrame with the columns of ``Check``."""
        import pandas as pd

        return pd.DataFrame([vars(c) for c in self.checks])

    def __str__(self) -> str:
        head = f"{self.model_name}: {self.verdict} ({self.dtype}, rules {self.rules}, "
        head += f"{self.n_tokens} tokens, {self.objective})"
        lines = [
            f"  {c.name:<13} {c.verdict:<10} {_number(c.figure):>9}  {c.says}." for c in self.checks
        ]
        return "\n".join([head, *lines])


def _number(figure: float) -> str:
    return "-" if figure != figure else f"{figure:.0f}" if figure in (0, 1) else f"{figure:.2g}"


def _in_words(objective: object) -> str:
    if isinstance(objective, Objective):
        return str(objective).partition(" (positive")[0]
    return str(getattr(objective, "__name__", repr(objective)))


@one_at_a_time
def verify(
    model: Any,
    prompt: str | Tensor,
    rules: str | RuleSet = DEFAULT_RULES,
    *,
    objective: Callable[[Tensor], Tensor] | None = None,
    prepend_bos: bool | None = None,
) -> Verification:
    """Measure on one prompt whether relevance of this model is what its rules say.

    Six checks, none of which compares the package with itself:

    - *audit*: every operation from logits to embeddings is linear or has its rule;
    - *forward*: logits and residual stream have the same bits with the rules on and off;
    - *conservation*: under CP-LRP, Δℓ = relevance of tokens and positions + what biases took;
    - *gradient*: the plain gradient agrees with finite differences (nothing is detached);
    - *finite*: no relevance is infinite, and none underflows to 0, in the model's type;
    - *precision*: a bfloat16 or float16 model against the same weights in float32.

    Costs some 25 forwards and four backwards and, for low-precision models, for a while a
    float32 copy of the weights. The model is left as it was.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        rules: Name of a rule set, or a ``RuleSet``.
        objective: What to explain; by default the top token against the second, after the prompt.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        PromptError, ModelStateError, TypeError, ValueError: as ``attribute``. A model that the
            rules refuse is no error here but a failed check.
    """
    require_bridge(model)
    rule_set = get_rule_set(rules)
    tokens = to_single_prompt(model, prompt, prepend_bos)
    if objective is not None:
        for_one_prompt(objective)
    check_ready(model, "verify")
    check_single(model)
    with torch.no_grad():
        logits = model(tokens)
    if objective is None:
        best = logits[0, -1].topk(2).indices.tolist()
        objective = logit_diff(model, target=best[0], contrast=best[1])
    if not bool(logits.isfinite().all()):
        overflow = precision.overflow(model)
        made = [overflow if name == "finite" else skipped(name, _OVERFLOW) for name in NAMES]
    elif (audited := checks.check_audit(model)).verdict == "failed":
        made = [audited, *(skipped(name, _REFUSED) for name in NAMES[1:])]
    else:
        made = [
            audited,
            checks.check_forward(model, tokens, rule_set),
            checks.check_conservation(model, tokens, objective),
            checks.check_gradient(model, tokens, objective),
        ]
        found = precision.relevance_at_sites(model, tokens, objective, rule_set)
        exact, why = precision.in_float32_too(model, tokens, objective, rule_set, found)
        made.append(precision.check_finite(model, found, exact))
        made.append(precision.check_precision(model, found, exact, why))
    return Verification(
        model_name(model),
        rule_set.name,
        str(dtype_of(model)).removeprefix("torch."),
        tokens.shape[1],
        _in_words(objective),
        tuple(made),
    )
