"""``explain_answer``: an answer token by token, with the explanations of those most in doubt.

A page that opens from disk cannot run the model, so what a click on a token opens is computed
before: for the first token at which the model prefers another, which decides what follows, then for
the others of that kind, and then for those where it was least sure, Δℓ between the two. Their
positions differ and their prompt is one, so they share a forward, and each costs a backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.fused import AttentionKind
from ..engine.memory import Memory
from ..inputs.answers import answer_ids
from ..inputs.bridge import require_bridge
from ..inputs.facts import PromptFacts
from ..inputs.forced import extended
from ..inputs.objective import logit_diff
from ..rules.rule_sets import DEFAULT_RULES, RuleSet
from ..rules.threads import one_at_a_time
from .answer_table import answer_table
from .attribute import attribute_each
from .result import Attribution, report_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class AnswerExplanations:
    """An answer's tokens, and the explanations of some of them, as ``explain_answer`` makes them.

    Attributes:
        table: The rows of ``answer_table``.
        results: By row of the table, why the model preferred one of two tokens there: the token
            written and the best other one.

    Example:
        >>> found = clrp.explain_answer(model, case.prompt, case.target)
        >>> list(found.results) == [0]
        True
    """

    table: pd.DataFrame
    results: dict[int, Attribution]

    def save_html(self, path: str | Path) -> Path:
        """Write a page of the answer, in which a click on a token opens its explanation.

        The page opens from disk, requests nothing, and needs no script but those of the reports
        that it holds.

        Args:
            path: Where to write; the folder must exist.

        Returns:
            The path.

        Raises:
            NonFiniteError: A relevance is NaN or infinite.
            OSError: The file cannot be written.

        Example:
            >>> found = clrp.explain_answer(model, case.prompt, case.target)
            >>> found.save_html("answer.html").name
            'answer.html'
        """
        from ..render import save_html
        from ..render.answer import AnswerPage, answer_html

        first = next(iter(self.results.values()))
        rows: list[dict[str, Any]] = [
            {str(name): value for name, value in row.items()}
            for row in self.table.to_dict("records")
        ]
        page = AnswerPage(
            title=f"An answer of {len(rows)} token{'s' * (len(rows) != 1)}",
            model_name=first.model_name,
            rules=first.rules,
            rows=rows,
            # The preferred token need not be in the answer, so no report says that it was written.
            reports={
                row: report_of(result, target_is_top=False) for row, result in self.results.items()
            },
        )
        return save_html(path, answer_html(page))


@one_at_a_time
def explain_answer(
    model: Any,
    prompt: str | Tensor,
    answer: str | Sequence[int | str] | Tensor,
    most: int = 8,
    *,
    rules: str | RuleSet = DEFAULT_RULES,
    memory: Memory = "auto",
    tile: int | None = None,
    progress: bool = True,
    attention: AttentionKind = "auto",
    prepend_bos: bool | None = None,
) -> AnswerExplanations:
    """List an answer token by token, and explain those at which the model was most in doubt.

    At each of them Δℓ is the difference between the token written and the best other one, of which
    the one with the higher logit is the target. The first token at which the model prefers another
    comes first, since all that follows is read after it; then the others by the other's lead, from
    the largest: wrong tokens before close decisions.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: What came before the answer: text, or token ids [pos] or [1, pos].
        answer: The answer, as for ``answer_table``.
        most: How many tokens are explained at most, 1 or more; each costs a backward.
        rules: Name of a rule set, or a ``RuleSet``.
        memory: "auto", "plain" or "tiled", as for ``attribute``.
        tile: Positions per tile, as for ``attribute``.
        progress: Show a progress bar in tiles.
        attention: "auto", "fused" or "eager", as for ``attribute``.
        prepend_bos: Whether the prompt's text begins with the BOS token, as for ``attribute``.

    Returns:
        The table, and the explanations by row; ``save_html`` writes both as one page.

    Warns:
        SpecialTokenWarning: As ``attribute``.

    Raises:
        ValueError: ``most`` is not a number from 1; or as ``attribute``.
        TypeError, TokenError, PromptError, ModelStateError, UncoveredComponentError: As
            ``answer_table`` and ``attribute``.

    Example:
        >>> found = clrp.explain_answer(model, case.prompt, case.target, most=3)
        >>> found.results[0].target == case.target
        True
    """
    require_bridge(model)
    if isinstance(most, bool) or not isinstance(most, Integral) or most < 1:
        raise ValueError(f"most={most!r} must be a number of tokens to explain, 1 or more.")
    how: dict[str, Any] = {
        "memory": memory, "tile": tile, "progress": progress, "attention": attention,
    }  # fmt: skip
    facts = PromptFacts.of(model, prompt, prepend_bos)
    ids = answer_ids(model, answer)
    table = answer_table(model, facts.tokens, torch.tensor(ids), **how)
    whole = extended(model, facts, ids)
    rows = _in_doubt(table["delta"].tolist())[: int(most)]
    objectives = []
    for row in rows:
        pair = (ids[row], int(table["alternative_id"].iloc[row]))
        target, contrast = pair if table["delta"].iloc[row] <= 0 else pair[::-1]
        pos = int(table["pos"].iloc[row]) - 1
        objectives.append(logit_diff(model, target, contrast, pos=pos))
    found = attribute_each(model, whole.tokens, objectives, rules=rules, **how)
    results = {row: with_facts(one, whole) for row, one in zip(rows, found, strict=True)}
    return AnswerExplanations(table, dict(sorted(results.items())))


def _in_doubt(deltas: Sequence[float]) -> list[int]:
    """The rows in the order in which they are worth explaining, by the other token's lead."""
    wrong = [row for row, delta in enumerate(deltas) if delta > 0][:1]
    ranked = sorted(range(len(deltas)), key=lambda row: -deltas[row])
    return [*wrong, *(row for row in ranked if row not in wrong)]


def with_facts(result: Attribution, facts: PromptFacts) -> Attribution:
    """A result that was computed from ids, with what is known of the text that they were."""
    return replace(
        result,
        prepended_bos=facts.prepended_bos,
        segments=facts.segments,
        str_tokens=facts.str_tokens,
    )
