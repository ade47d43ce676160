"""How Δℓ changes when tokens are removed in the order of their scores.

MoRF removes the most relevant tokens first (the highest scores, which support the target), LeRF the
least relevant first (Samek et al. 2017, arXiv:1509.06321; as a pair Blücher et al. 2024,
arXiv:2401.06654). With faithful scores, Δℓ falls early under MoRF and late under LeRF. If Δℓ(x) is
the value after the share x of the removable tokens is removed,

    area               ∫₀¹ Δℓ_LeRF(x) − Δℓ_MoRF(x) dx / scale          higher is better, 0 is chance
    comprehensiveness  mean over x of (Δℓ − Δℓ_MoRF(x)) / scale         higher is better
    sufficiency        mean over x of (Δℓ − Δℓ_LeRF(1 − x)) / scale     lower is better

where the last two (DeYoung et al. 2020, arXiv:1911.03429) use x = 1, 5, 10, 20 and 50 %: the
prompt without its top tokens, and with only its top tokens. The scale makes models and prompts
comparable. It is the larger of |Δℓ| and |Δℓ − Δℓ(all removed)|, the largest difference that an
explanation could have to account for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ...attribution.result import Attribution
from ...inputs.objective import question
from ...rules.threads import one_at_a_time
from ..ranking import first_in_order
from .removal import Removal, Replace, prepare_removal

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
Scores = Attribution | Tensor


@dataclass(frozen=True, eq=False)
class FaithfulnessCurves:
    """Δℓ while tokens are removed, for one prompt and one or more rankings.

    Attributes:
        names: Names of the rankings.
        removed: Number of tokens removed at each step.
        removable: Number of tokens that can be removed.
        morf: Δℓ at each step with the most relevant tokens removed first, in logits, averaged over
            draws. Positive values favour the target.
        lerf: The same with the least relevant tokens removed first.
        delta: Δℓ of the whole prompt.
        how: What replaced removed tokens, in words.

    Example:
        >>> curves = clrp.faithfulness_curves(
        ...     model, case.prompt, result, objective, steps=4, progress=False
        ... )
        >>> curves.morf.shape == (1, len(curves.removed))  # one ranking
        True
    """

    names: tuple[str, ...]
    removed: Int[Tensor, " step"]
    removable: int
    morf: Float[Tensor, "name step"]
    lerf: Float[Tensor, "name step"]
    delta: float
    how: str

    @property
    def share(self) -> Float[Tensor, " step"]:
        """Share of the removable tokens that is removed at each step, from 0 to 1.

        Example:
            >>> curves = clrp.faithfulness_curves(
            ...     model, case.prompt, result, objective, steps=4, progress=False
            ... )
            >>> float(curves.share[0]), float(curves.share[-1])
            (0.0, 1.0)
        """
        return self.removed.double() / self.removable

    @property
    def scale(self) -> float:
        """The number by which the measures are divided, in logits.

        It is the larger of |Δℓ| and |Δℓ − Δℓ(all removed)|.

        Example:
            >>> curves = clrp.faithfulness_curves(
            ...     model, case.prompt, result, objective, steps=4, progress=False
            ... )
            >>> curves.scale >= abs(curves.delta)
            True
        """
        return max(abs(self.delta), abs(self.delta - float(self.morf[0, -1])))

    @property
    def area(self) -> dict[str, float]:
        """Area between LeRF and MoRF over ``scale``, by ranking; higher is better, 0 is chance.

        Example:
            >>> effects = clrp.token_effects(
            ...     model, case.prompt, objective, window=None, progress=False
            ... ).effect
            >>> rankings = {"measured": -effects, "turned round": effects}
            >>> area = clrp.faithfulness_curves(
            ...     model, case.prompt, rankings, objective, steps=4, progress=False
            ... ).area
            >>> area["measured"] > 0.5 > 0 > area["turned round"]
            True
            >>> abs(area["measured"] + area["turned round"]) < 1e-3  # LeRF and MoRF change places
            True
        """
        between = torch.trapezoid(self.lerf - self.morf, self.share) / self.scale
        return dict(zip(self.names, between.tolist(), strict=True))

    @property
    def comprehensiveness(self) -> dict[str, float]:
        """Mean fall of Δℓ without the top tokens over ``scale``, by ranking; higher is better.

        The measure of arXiv:1911.03429.

        Example:
            >>> curves = clrp.faithfulness_curves(
            ...     model, case.prompt, result, objective, steps=4, progress=False
            ... )
            >>> curves.comprehensiveness[result.rules] > 0
            True
        """
        steps = torch.isin(self.removed, torch.tensor(_top_counts(self.removable)))
        return self._mean_fall(self.morf[:, steps])

    @property
    def sufficiency(self) -> dict[str, float]:
        """Mean fall of Δℓ with the top tokens alone over ``scale``, by ranking; lower is better.

        The measure of arXiv:1911.03429.

        Example:
            >>> effects = clrp.token_effects(
            ...     model, case.prompt, objective, window=None, progress=False
            ... ).effect
            >>> rankings = {"measured": -effects, "turned round": effects}
            >>> curves = clrp.faithfulness_curves(
            ...     model, case.prompt, rankings, objective, steps=4, progress=False
            ... )
            >>> curves.sufficiency["measured"] < curves.sufficiency["turned round"]
            True
        """
        n_left = self.removable - self.removed
        steps = torch.isin(n_left, torch.tensor(_top_counts(self.removable)))
        return self._mean_fall(self.lerf[:, steps])

    def _mean_fall(self, values: Tensor) -> dict[str, float]:
        fall = ((self.delta - values) / self.scale).mean(1)
        return dict(zip(self.names, fall.tolist(), strict=True))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per step: name, order ("MoRF", "LeRF"), removed, share, delta (logits).

        Example:
            >>> curves = clrp.faithfulness_curves(
            ...     model, case.prompt, result, objective, steps=4, progress=False
            ... )
            >>> list(curves.to_frame().columns)
            ['name', 'order', 'removed', 'share', 'delta']
        """
        import pandas as pd

        parts = [
            pd.DataFrame(
                {
                    "name": name,
                    "order": order,
                    "removed": self.removed.numpy(),
                    "share": self.share.numpy(),
                    "delta": values[row].numpy(),
                }
            )
            for row, name in enumerate(self.names)
            for order, values in (("MoRF", self.morf), ("LeRF", self.lerf))
        ]
        return pd.concat(parts, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """Return one row per ranking, the largest area first.

        The columns are name, area, comprehensiveness and sufficiency.

        Example:
            >>> curves = clrp.faithfulness_curves(
            ...     model, case.prompt, result, objective, steps=4, progress=False
            ... )
            >>> list(curves.summary().columns)
            ['name', 'area', 'comprehensiveness', 'sufficiency']
        """
        import pandas as pd

        columns = {
            "area": self.area,
            "comprehensiveness": self.comprehensiveness,
            "sufficiency": self.sufficiency,
        }
        frame = pd.DataFrame({"name": list(self.names)})
        for column, values in columns.items():
            frame[column] = frame["name"].map(values)
        return frame.sort_values("area", ascending=False, kind="stable", ignore_index=True)

    def plot(self) -> Any:
        """Plot Δℓ over the share removed as a plotly ``Figure``, MoRF solid and LeRF dashed.

        Raises:
            ImportError: plotly is not installed.

        Example:
            >>> curves = clrp.faithfulness_curves(
            ...     model, case.prompt, result, objective, steps=4, progress=False
            ... )
            >>> len(curves.plot().data)  # MoRF and LeRF
            2
        """
        from ...render.plotly_figures import line_figure

        share = self.share.tolist()
        lines = [
            (f"{name} {order}", share, values[row].tolist())
            for row, name in enumerate(self.names)
            for order, values in (("MoRF", self.morf), ("LeRF", self.lerf))
        ]
        return line_figure(
            lines, x=f"share of tokens removed ({self.how})", y="Δℓ (logits)", pairs=True
        )

    def __str__(self) -> str:
        table = self.summary().to_string(index=False, float_format=lambda value: f"{value:.3f}")
        return (
            f"Δℓ={self.delta:+.3f}, {self.removable} tokens removed for {self.how}, "
            f"in {len(self.removed) - 1} steps\n{table}"
        )


def _top_counts(removable: int) -> list[int]:
    """Return how many tokens the top 1, 5, 10, 20 and 50 % are, at least one each."""
    return sorted({max(1, math.ceil(share * removable)) for share in SHARES})


@one_at_a_time
def faithfulness_curves(
    model: Any,
    prompt: str | Tensor,
    scores: Scores | Mapping[str, Scores],
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    target: object = None,
    contrast: object = None,
    pos: int = -1,
    replace: Replace | Tensor = "zero",
    draws: int = 4,
    pool: Tensor | None = None,
    seed: int = 0,
    exclude: Iterable[int] = (),
    include_special: bool = False,
    steps: int = 20,
    batch_size: int = 16,
    progress: bool = True,
    prepend_bos: bool | None = None,
) -> FaithfulnessCurves:
    """Remove the prompt's tokens by their scores, most relevant and least relevant first.

    The curves are those of arXiv:1509.06321 and arXiv:2401.06654.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        scores: Relevance [pos], an ``Attribution``, or several of these by name. The sign is the
            objective's: the highest score supports the target most. Of equal scores, the earlier
            position comes first.
        objective: Maps logits to Δℓ, as for ``attribute``.
        target: The objective's target token, if no ``objective`` is given.
        contrast: The objective's contrast token, if no ``objective`` is given.
        pos: The objective's position, if no ``objective`` is given.
        replace: What replaces removed tokens: "zero" embeddings, "random" other tokens, or token
            ids [pos] or [draw, pos], one for each position.
        draws: Number of random replacements over which results are averaged.
        pool: Token ids from which "random" draws. By default, all of the tokenizer's ids except
            special ones.
        seed: Seed for "random".
        exclude: Positions that are never removed.
        include_special: Whether special tokens and the first token can be removed.
        steps: Number of steps of a curve, at most one per token.
        batch_size: Prompts per forward pass.
        progress: Whether to show a progress bar.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Returns:
        Δℓ in logits at each step, for each ranking and both orders of removal.

    Raises:
        ValueError: Scores have another length or are not finite, an argument is out of range, no
            token can be removed, or Δℓ is 0 both with and without all tokens.
        TypeError, TokenError, PromptError: As for ``attribute``.

    Example:
        >>> rankings = {"relevance": result, "recency": torch.arange(44.0)}
        >>> curves = clrp.faithfulness_curves(
        ...     model, case.prompt, rankings, objective, steps=4, progress=False
        ... )
        >>> curves.area["relevance"] > curves.area["recency"]
        True
    """
    objective = question(model, objective, target, contrast, pos)
    setting = prepare_removal(
        model, prompt, objective, replace=replace, draws=draws, pool=pool, seed=seed,
        exclude=exclude, include_special=include_special, batch_size=batch_size, progress=progress,
        prepend_bos=prepend_bos,
    )  # fmt: skip
    if steps < 1:
        raise ValueError(f"steps={steps} must be 1 or more.")
    rankings = dict(scores) if isinstance(scores, Mapping) else {_name_of(scores): scores}
    if not rankings:
        raise ValueError("scores= is empty; give at least one ranking.")
    removable = len(setting.positions)
    grid = torch.linspace(0, removable, min(steps, removable) + 1).round().long().tolist()
    tops = _top_counts(removable)
    removed = torch.tensor(sorted({*grid, *tops, *(removable - top for top in tops)}))
    n_pos = setting.tokens.shape[1]
    masks = [
        first_in_order(order, removed, n_pos)
        for name, ranking in rankings.items()
        for order in _orders(setting.checked(name, ranking), setting)
    ]
    morf, lerf = rearrange(
        setting.values(torch.cat(masks)),
        "(ranking order step) -> order ranking step",
        ranking=len(rankings),
        order=2,
    )
    curves = FaithfulnessCurves(
        names=tuple(rankings),
        removed=removed,
        removable=removable,
        morf=morf,
        lerf=lerf,
        delta=float(morf[0, 0]),
        how=setting.how,
    )
    if not curves.scale > 1e-6:
        raise ValueError(
            "Δℓ is 0 for the prompt and with all its tokens removed: there is nothing to explain."
        )
    return curves


def _name_of(scores: Scores) -> str:
    return scores.rules if isinstance(scores, Attribution) else "scores"


def _orders(scores: Tensor, setting: Removal) -> tuple[Tensor, Tensor]:
    """Return the removable positions, most relevant first, and the same least relevant first."""
    positions = setting.positions
    order = positions[scores[positions].argsort(descending=True, stable=True)]
    return order, order.flip(0)
