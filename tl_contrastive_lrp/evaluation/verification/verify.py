"""``verify``: measures whether relevance of this model can be trusted on this prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...hooks.placement import check_ready, check_single
from ...inputs.bridge import require_bridge
from ...inputs.located import LocatedObjective
from ...inputs.objective import for_one_prompt, logit_diff
from ...inputs.tokens import model_name, to_single_prompt
from ...rules.rule_sets import DEFAULT_RULES, RuleSet, get_rule_set
from ...rules.threads import one_at_a_time
from . import checks, precision
from .checks import Check, Verdict, dtype_of, skipped

if TYPE_CHECKING:
    import pandas as pd

_ORDER: tuple[Verdict, ...] = ("skipped", "ok", "warning", "failed")
NAMES = ("audit", "forward", "conservation", "gradient", "finite", "precision")
_OVERFLOW = "the model's logits are not finite"
_REFUSED = "the audit failed, so the rules refuse this model"


@dataclass(frozen=True)
class Verification:
    """The checks that ``verify`` ran, with their verdicts. Printing it shows all of them.

    Attributes:
        model_name: The model's name in TransformerLens.
        rules: Name of the rule set.
        dtype: The model's floating-point type, as a string.
        n_tokens: Number of tokens in the prompt.
        objective: The objective that was explained, in words.
        checks: One ``Check`` for each thing that was measured: its name, verdict, figure, limit
            and a sentence that explains the figure.

    Example:
        >>> checked = clrp.verify(model, case.prompt)
        >>> checked["conservation"].figure <= checked["conservation"].limit
        True
    """

    model_name: str
    rules: str
    dtype: str
    n_tokens: int
    objective: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict: "ok", "warning" or "failed" (or "skipped", if no check was run).

        Example:
            >>> checked = clrp.verify(model, case.prompt)
            >>> checked.verdict
            'ok'
        """
        return max((c.verdict for c in self.checks), key=_ORDER.index)

    def __getitem__(self, name: str) -> Check:
        """Return the check of that name.

        Raises:
            KeyError: There is none.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per check: name, verdict, figure, limit, says.

        Example:
            >>> checked = clrp.verify(model, case.prompt)
            >>> list(checked.to_frame().columns)
            ['name', 'verdict', 'figure', 'limit', 'says']
        """
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
    return "-" if math.isnan(figure) else f"{figure:.0f}" if figure in (0, 1) else f"{figure:.2g}"


def _in_words(objective: object) -> str:
    if isinstance(objective, LocatedObjective):
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
    """Measure on one prompt whether relevance of this model follows its rules.

    Six checks are run, none of which compares the package with itself:

    - *audit*: Every operation from logits to embeddings is linear or has its rule.
    - *forward*: Logits and residual stream have the same bits with the rules on and off.
    - *conservation*: Under CP-LRP (arXiv:2202.07304), Δℓ is the sum of the relevance of tokens,
      positions, biases and constants.
    - *gradient*: The plain gradient agrees with finite differences, so nothing is detached.
    - *finite*: In the model's dtype, no relevance is infinite and none underflows to 0.
    - *precision*: A bfloat16 or float16 model agrees with the same weights in float32.

    The checks cost about 25 forward and four backward passes. For low-precision models, a float32
    copy of the weights exists temporarily. The model is left unchanged.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        rules: A rule set or its name.
        objective: Maps logits [1, pos, vocab] to a scalar, in logits. By default, the top token
            minus the second, after the prompt.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Returns:
        The checks. A model that the rules refuse is not an error here but a failed check.

    Warns:
        SpecialTokenWarning: As for ``attribute``.

    Raises:
        PromptError, ModelStateError, TypeError, ValueError: As for ``attribute``.

    Example:
        >>> print(clrp.verify(model, case.prompt))
        demo model: ok (float32, rules attnlrp, 44 tokens, ...)
          audit         ok ... each of ... operations ... is linear or has its rule.
          ...
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
        results = [overflow if name == "finite" else skipped(name, _OVERFLOW) for name in NAMES]
    elif (audited := checks.check_audit(model)).verdict == "failed":
        results = [audited, *(skipped(name, _REFUSED) for name in NAMES[1:])]
    else:
        results = [
            audited,
            checks.check_forward(model, tokens, rule_set),
            checks.check_conservation(model, tokens, objective),
            checks.check_gradient(model, tokens, objective),
        ]
        relevance = precision.relevance_at_sites(model, tokens, objective, rule_set)
        exact, why = precision.relevance_in_float32(model, tokens, objective, rule_set, relevance)
        results.append(precision.check_finite(model, relevance, exact))
        results.append(precision.check_precision(model, relevance, exact, why))
    return Verification(
        model_name(model),
        rule_set.name,
        str(dtype_of(model)).removeprefix("torch."),
        tokens.shape[1],
        _in_words(objective),
        tuple(results),
    )
